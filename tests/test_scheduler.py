"""Whose turn it is on the model: what is read between two steps, and that it changes no text."""

import queue
import time

import pytest
import torch

from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.server import scheduler
from nanogpt.server.scheduler import Choice, Full, Scheduler
from nanogpt.tokenizer.tokenizer import ByteTokenizer

GREEDY = SamplingOptions(temperature=0)


class Nobody:
    """Counts nothing."""

    def read(self, tokens):
        pass

    def wrote(self, tokens, seconds):
        pass

    def first_token(self, seconds):
        pass


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=256, block_size=512, n_layer=2, n_head=2, n_embd=32)).eval()


def asked(prompt, count, answers) -> Choice:
    return Choice(prompt, GREEDY, 0, count, None, (), emit=lambda choice, piece: answers.put((choice, piece)))


def finished(answers, choices) -> list[list[int]]:
    """The tokens of each choice, once all have ended; others' are passed over."""
    ids = {choice: [] for choice in choices}
    left = set(choices)
    while left:
        choice, piece = answers.get(timeout=20)
        if choice in ids:
            ids[choice] += [token.id for token in piece.tokens]
            left -= {choice} if piece.finish else set()
    return list(ids.values())


def alone(model, prompt, count) -> list[int]:
    decoder, text = Engine(model, 1), Text(prompt, GREEDY)
    decoder.add([text])
    for _ in range(count):
        decoder.step()
    return text.new


def test_a_long_prompt_is_read_in_parts_while_others_are_served(model, monkeypatch):
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 8)
    monkeypatch.setattr("nanogpt.inference.engine.SHARED", 4)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (n,), generator=draw).tolist() for n in (3, 50, 6, 41)]
    expected = [alone(model, prompt, 12) for prompt in prompts]
    reads = []
    hidden = model.hidden
    model.hidden = lambda idx, past=None: reads.append(idx.numel()) or hidden(idx, past)
    answers = queue.Queue()
    running = Scheduler(Engine(model, 3), ByteTokenizer(), 8, Nobody())
    choices = [asked(prompt, 12, answers) for prompt in prompts]
    busy = asked([7], 10**6, answers)  # so that somebody always waits for a token
    running.submit([busy])
    running.start()
    while not running.active:
        time.sleep(0.001)
    running.submit(choices)
    try:
        assert finished(answers, choices) == expected
        assert max(reads) <= 8 + 1 and len(reads) >= 12
        running.cancel([busy])
    finally:
        running.close()


def test_more_than_the_queue_holds_is_refused_whole(model):
    running = Scheduler(Engine(model, 2), ByteTokenizer(), 3, Nobody())
    answers = queue.Queue()
    running.submit([asked([1], 2, answers) for _ in range(5)])
    with pytest.raises(Full):
        running.submit([asked([1], 2, answers)])
    assert running.waiting == 5


def test_a_decoder_without_room_is_told_at_the_start(model):
    decoder = Engine(model, 2)
    decoder.warm = lambda prompt: (_ for _ in ()).throw(MemoryError("no room"))
    running = Scheduler(decoder, ByteTokenizer(), 3, Nobody())
    with pytest.raises(MemoryError, match="no room"):
        running.start()
    assert not running.alive
