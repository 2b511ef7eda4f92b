"""Streaming detokenization: emits complete characters only, and never part of a stop string."""

import codecs
from collections.abc import Callable, Sequence

from nanogpt.errors import UserError
from nanogpt.tokenizer.tokenizer import CharTokenizer, Tokenizer, decode


class TextStream:
    """Incremental decoder: `push` each token that follows `prompt`, then call `end`. The text of the prompt
    and the concatenated pieces equal `tokenizer.decode` of all tokens, truncated before the first complete
    stop string.

    Incomplete UTF-8 characters and possible prefixes of a stop string are held back. `stopped` is set once a
    stop string has been found; later calls return "". Raise UserError if a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        if "" in stop:
            raise UserError("a stop string is empty; give at least one character, or omit it")
        self.stop = stop
        self.stopped = False
        self._held = ""
        self._decode = decoder(tokenizer, prompt)

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


def decoder(tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Callable[[int | None], str]:
    """Return a function from each token that follows `prompt` to the text that is certain with it; None
    flushes the pending bytes."""
    if isinstance(tokenizer, CharTokenizer):
        characters = tokenizer.characters
        return lambda token: "" if token is None else characters[token]
    if not tokenizer.bytewise:
        return _WholeText(tokenizer, prompt).add
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(token: int | None) -> str:
        return utf8.decode(b"", True) if token is None else utf8.decode(tokenizer.decode_bytes([token]))

    return add


class _WholeText:
    """Fallback for tokenizers whose text depends on neighboring tokens (such as spaces in WordPiece): decode
    all tokens each time. Bytes at the end are held back: the library decodes a run of them as a whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.given = len(decode(tokenizer, prompt))
        self.byte_ids = getattr(tokenizer, "byte_ids", ())

    def add(self, token: int | None) -> str:
        if token is not None:
            self.ids.append(token)
        text = decode(self.tokenizer, self.ids)
        if token is not None and (token in self.byte_ids or text.endswith("\ufffd")):
            return ""
        new = text[self.given :]
        self.given = max(self.given, len(text))
        return new


def text_of(tokenizer: Tokenizer, token: int, before: int | None) -> str:
    """Return the text that `token` adds after the token `before` (None: at the beginning)."""
    if before is None or tokenizer.bytewise:
        return decode(tokenizer, [token])
    return decode(tokenizer, [before, token])[len(decode(tokenizer, [before])) :]
