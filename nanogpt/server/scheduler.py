"""Requests onto the slots of a decoder: one thread owns the model, and every step serves all of them.

A choice waits in a bounded queue until a slot is free, and leaves its slot with its last token, or when its
client has left: texts join and go between any two steps (continuous batching: Yu et al. 2022, Orca).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanogpt.inference.engine import Completion, Engine, Text, Token, score
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.server.metrics import Meters
from nanogpt.tokenizer.tokenizer import Tokenizer

PROMPT_TOKENS = 512  # read between two steps, at most: others wait that long for their next token


class Full(Exception):
    """The queue has no room for these."""


@dataclass(frozen=True)
class Piece:
    """What a choice has more: whole characters, and the tokens since the last piece."""

    text: str
    tokens: Sequence[Token]
    finish: str | None = None  # "stop", "length", or "error"


class PromptScores:
    """The tokens of a prompt with their log-probabilities, computed once for all of its choices."""

    def __init__(self, ids: list[int], alternatives: int):
        self.ids, self.alternatives = ids, alternatives
        self.tokens: list[Token] | None = None


@dataclass(eq=False)
class Choice:
    """One text to be written. `emit` gets its pieces, in the scheduler's thread."""

    prompt: list[int]
    options: SamplingOptions
    seed: int
    max_tokens: int
    logprobs: int | None
    stop: Sequence[str]
    emit: Callable[["Choice", Piece], None]
    scores: PromptScores | None = None  # to be filled before the first piece
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    written: int = 0
    read: int = 0  # tokens of the prompt, ahead
    _pending: list[Token] = field(default_factory=list)
    _completion: Completion | None = None

    def begin(self, known: Tokenizer) -> Text:
        text = Text(self.prompt, self.options, seed=self.seed, logprobs=self.logprobs)
        self._completion = Completion(text, known, self.max_tokens, self.stop, known.end_of_text)
        return text

    def accept(self, token: Token, end_of_text: int | None) -> Piece | None:
        """What `token` adds, if that is certain; its `finish` is set if it was the last."""
        assert self._completion
        self.written += 1
        text = self._completion.take(token)
        if token.id != end_of_text:
            self._pending.append(token)
        finish = self._completion.finish_reason or None
        if not text and not finish:
            return None
        tokens, self._pending = self._pending, []
        return Piece(text, tokens, finish)


class Scheduler:
    """Owns `decoder` in a thread of its own. At most `queue` choices wait."""

    def __init__(self, decoder: Engine, known: Tokenizer, queue: int, meters: Meters):
        self._decoder, self._known, self._meters = decoder, known, meters
        self.queue = queue
        self._waiting: deque[Choice] = deque()
        self._active: dict[Text, Choice] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.failure: BaseException | None = None  # what has ended the thread
        self._warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        """Serve from now on, with all of the decoder's memory taken; raises what that fails with."""
        self._thread.start()
        try:
            self._warm.result()
        except BaseException:  # Ctrl-C, too: a thread that computes would not let the program end
            self.close()
            raise

    def close(self) -> None:
        """End the thread after its present step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    def submit(self, choices: Sequence[Choice]) -> None:
        """All of them, or Full and none."""
        with self._changed:
            room = self.queue + self._decoder.free - len(self._waiting)
            if self._closed or len(choices) > room:
                raise Full
            self._waiting.extend(choices)
            self._changed.notify()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Write no more of these; their slots are free before the next step."""
        with self._changed:
            for choice in choices:
                choice.cancelled = True
            self._changed.notify()

    # ------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            self._decoder.warm(PROMPT_TOKENS)  # here, where its buffers and threads then are
            self._warm.set_result(None)
        except Exception as error:
            self._warm.set_exception(error)
            return
        while not self._closed:
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
            try:
                self._turn()
            except Exception as error:  # out of memory, say: these requests fail, the server stays
                self.failure = error if isinstance(error, MemoryError) else None
                self._fail_all()

    def _turn(self) -> None:
        """Free the slots of those who left, fill free ones, and give every text one more token."""
        for text in [text for text, choice in self._active.items() if choice.cancelled]:
            self._leave(text)
        fresh = self._taken()
        for choice in fresh:
            self._score(choice)
        texts = []
        for choice in fresh:
            if choice.cancelled:
                continue
            self._meters.read(len(choice.prompt))
            if choice.max_tokens == 0:
                choice.emit(choice, Piece("", [], "length"))
                continue
            text = choice.begin(self._known)
            self._active[text] = choice
            texts.append(text)
        if texts:
            self._decoder.add(texts)
        if self._active:
            started = time.perf_counter()
            found = self._decoder.step()
            now = time.perf_counter()
            self._meters.wrote(len(found), now - started)
            for text, token in found:
                choice = self._active[text]
                if choice.written == 0:
                    self._meters.first_token(now - choice.submitted)
                piece = choice.accept(token, self._known.end_of_text)
                if piece and piece.finish:
                    self._leave(text)  # before its client knows: whoever comes then finds the slot free
                if piece:
                    choice.emit(choice, piece)

    def _taken(self) -> list[Choice]:
        """The choices that join now: as many as fit the slots and PROMPT_TOKENS. Of a longer prompt a part is
        read, and its choice waits, unless nobody else is served."""
        found: list[Choice] = []
        tokens, long = 0, None
        with self._changed:
            while self._waiting and len(found) < self._decoder.free:
                choice = self._waiting[0]
                if choice.cancelled:
                    self._waiting.popleft()
                    continue
                # A prompt shared with the one before is read once.
                cost = 0 if found and found[-1].prompt is choice.prompt else len(choice.prompt) - choice.read
                if found and tokens + cost > PROMPT_TOKENS:
                    break
                if cost > PROMPT_TOKENS and self._active:
                    long = choice
                    break
                tokens += cost
                found.append(self._waiting.popleft())
        if long:
            long.read += PROMPT_TOKENS
            self._decoder.read(long.prompt[: long.read])
        return found

    def _score(self, choice: Choice) -> None:
        scores = choice.scores
        if scores is not None and scores.tokens is None and not choice.cancelled:
            first = Token(scores.ids[0], None, [])
            scores.tokens = [first, *score(self._decoder.model, scores.ids, scores.alternatives)]

    def _leave(self, text: Text) -> None:
        self._decoder.remove(text)
        del self._active[text]

    def _fail_all(self) -> None:
        with self._changed:
            failed = [*self._active.values(), *self._waiting]
            self._waiting.clear()
        for text in list(self._active):
            if text in self._decoder.texts:
                self._decoder.remove(text)
        self._active.clear()
        for choice in failed:
            choice.emit(choice, Piece("", [], "error"))
