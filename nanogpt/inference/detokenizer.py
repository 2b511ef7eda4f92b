"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Sequence

from nanogpt.errors import UserError
from nanogpt.tokenizer.tokenizer import CharTokenizer, Tokenizer, decode


class TextStream:
    """`push` each token, then `end`: the pieces together are what `tokenizer.decode` gives of all tokens,
    up to the first stop string that is complete.

    A character whose bytes are not all there is held back, and so is what may be the beginning of a stop
    string. `stopped` says that one was found; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise UserError("a stop string is empty; give at least one character, or no stop string")
        self.stop = stop
        self.stopped = False
        self._held = ""
        self._decode = _decoder(tokenizer)

    def push(self, token: int) -> str:
        """The text that is certain with `token`, after what was certain before."""
        return "" if self.stopped else self._sift(self._decode(token))

    def end(self) -> str:
        """The text that was held back: nothing follows. Half characters become U+FFFD."""
        if self.stopped:
            return ""
        certain = self._sift(self._decode(None))
        certain, self._held = certain + self._held, ""
        return certain

    def _sift(self, new: str) -> str:
        text = self._held + new
        # The one that is complete first, whatever the borders of tokens; of two, the longer.
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def _decoder(tokenizer: Tokenizer) -> Callable[[int | None], str]:
    """From a token to the text it adds; from None, what was left."""
    if isinstance(tokenizer, CharTokenizer):
        characters = tokenizer.characters
        return lambda token: "" if token is None else characters[token]
    if not tokenizer.bytewise:
        return _WholeText(tokenizer).add
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(token: int | None) -> str:
        return utf8.decode(b"", True) if token is None else utf8.decode(tokenizer.decode_bytes([token]))

    return add


class _WholeText:
    """For tokenizers whose text depends on neighbouring tokens (blanks of WordPiece, say): all tokens are
    decoded anew, and the end is held back while it is no whole character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.given = tokenizer, list[int](), ""

    def add(self, token: int | None) -> str:
        if token is not None:
            self.ids.append(token)
        text = decode(self.tokenizer, self.ids)
        if token is not None:
            text = text.rstrip("�")
        new = text[len(self.given) :] if text.startswith(self.given) else ""
        self.given += new
        return new
