"""The request scheduler: prompts are prefilled between decode steps, without changing any text."""

import queue
import time

import pytest
import torch

from nanogpt.inference.engine import Completion, Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.server import scheduler
from nanogpt.server.metrics import Meters
from nanogpt.server.scheduler import Choice, Full, Scheduler
from nanogpt.tokenizer.tokenizer import ByteTokenizer

GREEDY = SamplingOptions(temperature=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=256, block_size=512, n_layer=2, n_head=2, n_embd=32)).eval()


def asked(prompt, count, answers) -> Choice:
    completion = Completion(Text(prompt, GREEDY), ByteTokenizer(), count)
    choice = Choice(prompt, completion, lambda piece: answers.put((choice, piece)))
    return choice


def finished(answers, choices) -> list[list[int]]:
    """Wait until all `choices` have finished; return their tokens, ignoring those of other choices."""
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


def test_long_prompt_is_prefilled_in_chunks_while_others_are_served(model, monkeypatch):
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 8)
    monkeypatch.setattr("nanogpt.inference.engine.SHARED", 4)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (n,), generator=draw).tolist() for n in (3, 50, 6, 41)]
    expected = [alone(model, prompt, 12) for prompt in prompts]
    reads = []
    hidden = model.hidden
    model.hidden = lambda idx, past=None: reads.append(idx.numel()) or hidden(idx, past)
    answers = queue.Queue()
    running = Scheduler(Engine(model, 3), 8, Meters())
    choices = [asked(prompt, 12, answers) for prompt in prompts]
    busy = asked([7], 10**6, answers)  # keeps one text decoding at all times
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


def test_request_exceeding_the_queue_is_rejected_completely(model):
    running = Scheduler(Engine(model, 2), 3, Meters())
    answers = queue.Queue()
    running.submit([asked([1], 2, answers) for _ in range(5)])
    with pytest.raises(Full):
        running.submit([asked([1], 2, answers)])
    assert running.waiting == 5


def test_insufficient_cache_memory_is_reported_at_startup(model):
    decoder = Engine(model, 2)
    decoder.warm = lambda prompt: (_ for _ in ()).throw(MemoryError("no room"))
    running = Scheduler(decoder, 3, Meters())
    with pytest.raises(MemoryError, match="no room"):
        running.start()
    assert not running.alive


def test_failure_while_prompts_are_scored_reaches_the_client(model, monkeypatch):
    def fail(*given):
        raise RuntimeError("no room")

    monkeypatch.setattr(scheduler, "score", fail)
    answers = queue.Queue()
    running = Scheduler(Engine(model, 2), 3, Meters())
    choice = asked([1, 2], 2, answers)
    choice.scores = scheduler.PromptScores([1, 2], 0)
    running.submit([choice])
    running.start()
    try:
        assert answers.get(timeout=20)[1].finish == "error" and running.active == 0
    finally:
        running.close()
