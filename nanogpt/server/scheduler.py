"""Continuous batching (Yu et al. 2022, Orca): one thread owns the model and steps all active requests.

A choice waits in a bounded queue until a slot is free, and frees its slot after its last token or when its
client disconnects; choices are added and removed between any two steps.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanogpt.inference.engine import Completion, Engine, Text, Token, score
from nanogpt.server.metrics import Meters

PROMPT_TOKENS = 512  # prompt tokens prefilled between two steps, at most: bounds the delay of active texts


class Full(Exception):
    """The queue has no room for the submitted choices."""


@dataclass(frozen=True)
class Piece:
    """New output of a choice: complete characters, and the tokens since the last piece."""

    text: str
    tokens: Sequence[Token]
    finish: str | None = None  # "stop", "length", or "error"


class PromptScores:
    """Prompt tokens with log-probabilities (echo), computed once for all choices of the prompt."""

    def __init__(self, ids: list[int], alternatives: int):
        self.ids, self.alternatives = ids, alternatives
        self.tokens: list[Token] | None = None


@dataclass(eq=False)
class Choice:
    """One completion to generate. `emit` is called with its pieces, in the scheduler's thread."""

    prompt: list[int]
    completion: Completion
    emit: Callable[[Piece], None]
    scores: PromptScores | None = None  # filled before the first piece
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    written: int = 0
    read: int = 0  # prompt tokens prefilled in advance
    _pending: list[Token] = field(default_factory=list)

    def accept(self, token: Token) -> Piece | None:
        """Return the output that `token` completes, if any; `finish` is set if it was the last."""
        self.written += 1
        text = self.completion.take(token)
        if token.id != self.completion.end_of_text:
            self._pending.append(token)
        finish = self.completion.finish_reason or None
        if not text and not finish:
            return None
        tokens, self._pending = self._pending, []
        return Piece(text, tokens, finish)


class Scheduler:
    """Runs `decoder` in its own thread. At most `queue` choices wait for a slot."""

    def __init__(self, decoder: Engine, queue: int, meters: Meters):
        self._decoder, self._meters = decoder, meters
        self.queue = queue
        self._waiting: deque[Choice] = deque()
        self._active: dict[Text, Choice] = {}
        meters.waiting.set_function(lambda: self.waiting)
        meters.active.set_function(lambda: self.active)
        self._changed = threading.Condition()
        self._closed = False
        self.failure: BaseException | None = None  # error that ended the thread
        self._warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        """Start serving, after allocating all of the decoder's memory; raise any error from that."""
        self._thread.start()
        try:
            self._warm.result()
        except BaseException:  # Ctrl-C, too: a busy thread blocks exit
            self.close()
            raise

    def close(self) -> None:
        """Stop the thread after its current step."""
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
        """Enqueue all of `choices`, or raise Full and enqueue none."""
        with self._changed:
            room = self.queue + self._decoder.free - len(self._waiting)
            if self._closed or len(choices) > room:
                raise Full
            self._waiting.extend(choices)
            self._changed.notify()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Cancel `choices`; their slots are freed before the next step."""
        with self._changed:
            for choice in choices:
                choice.cancelled = True
            self._changed.notify()

    # ------------------------------------------------------------------------- scheduler thread

    def _run(self) -> None:
        try:
            self._decoder.warm(PROMPT_TOKENS)  # in this thread, which owns buffers and workers
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
            except Exception as error:  # e.g. out of memory: fail these requests, keep serving
                self.failure = error if isinstance(error, MemoryError) else None
                self._fail_all()

    def _turn(self) -> None:
        """Free the slots of cancelled choices, fill free slots, generate one token per text."""
        for text in [text for text, choice in self._active.items() if choice.cancelled]:
            self._leave(text)
        fresh = [choice for choice in self._taken() if not choice.cancelled]
        self._active |= {choice.completion.text: choice for choice in fresh}
        for choice in fresh:
            self._score(choice)
            self._meters.read.inc(len(choice.prompt))
            if choice.completion.max_new_tokens == 0:
                del self._active[choice.completion.text]
                choice.emit(Piece("", [], "length"))
        if texts := [choice.completion.text for choice in fresh if choice.completion.text in self._active]:
            self._decoder.add(texts)
        if self._active:
            started = time.perf_counter()
            tokens = self._decoder.step()
            now = time.perf_counter()
            self._meters.wrote.inc(len(tokens))
            self._meters.step.observe(now - started)
            for text, token in tokens:
                choice = self._active[text]
                if choice.written == 0:
                    self._meters.first.observe(now - choice.submitted)
                piece = choice.accept(token)
                if piece and piece.finish:
                    self._leave(text)  # before the client is notified: its next request finds the slot free
                if piece:
                    choice.emit(piece)

    def _taken(self) -> list[Choice]:
        """Dequeue the choices to add now, limited by free slots and PROMPT_TOKENS.

        A longer prompt is prefilled in parts while its choice waits, unless no text is active.
        """
        taken: list[Choice] = []
        tokens, long = 0, None
        with self._changed:
            while self._waiting and len(taken) < self._decoder.free:
                choice = self._waiting[0]
                if choice.cancelled:
                    self._waiting.popleft()
                    continue
                # a prompt shared with the previous choice is prefilled once
                cost = 0 if taken and taken[-1].prompt is choice.prompt else len(choice.prompt) - choice.read
                if taken and tokens + cost > PROMPT_TOKENS:
                    break
                if cost > PROMPT_TOKENS and self._active:
                    long = choice
                    break
                tokens += cost
                taken.append(self._waiting.popleft())
        if long:
            long.read += PROMPT_TOKENS
            self._decoder.read(long.prompt[: long.read])
        return taken

    def _score(self, choice: Choice) -> None:
        scores = choice.scores
        if scores is not None and scores.tokens is None:
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
            choice.emit(Piece("", [], "error"))
