"""Streaming detokenization: emits complete characters only, and never part of a stop string."""

import codecs
from collections.abc import Callable, Sequence

from nanogpt.errors import UserError
from nanogpt.tokenizer.tokenizer import CharTokenizer, Tokenizer, decode


class TextStream:
    """Incremental decoder: `push` each token, then call `end`. The concatenated pieces equal
    `tokenizer.decode` of all tokens, truncated before the first complete stop string.

    Incomplete UTF-8 characters and possible prefixes of a stop string are held back. `stopped` is set once a
    stop string has been found; later calls return "". Raise UserError if a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise UserError("a stop string is empty; give at least one character, or omit it")
        self.stop = stop
        self.stopped = False
        self._held = ""
        self._decode = _decoder(tokenizer)

    def push(self, token: int) -> str:
        """Add `token`; return the text that can be emitted after it, possibly ""."""
        return "" if self.stopped else self._sift(self._decode(token))

    def end(self) -> str:
        """Finish the stream; return the text held back. Incomplete characters become U+FFFD."""
        if self.stopped:
            return ""
        certain = self._sift(self._decode(None))
        certain, self._held = certain + self._held, ""
        return certain

    def _sift(self, new: str) -> str:
        text = self._held + new
        # Pick the stop string that ends first, whatever the token boundaries; in a tie, the longer one.
        spans = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stop if stop in text]
        if spans:
            self.stopped, self._held = True, ""
            return text[: min(spans)[1]]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def _decoder(tokenizer: Tokenizer) -> Callable[[int | None], str]:
    """Return a function from a token to the text it adds; None flushes the pending bytes."""
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
    """Fallback for tokenizers whose text depends on neighboring tokens (such as spaces in WordPiece): decode
    all tokens each time, and hold back an incomplete character at the end."""

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
