"""Generation with a KV cache equals generation without, in any batch and at any length."""

import math
import random

import pytest
import torch

from nanogpt.inference import engine
from nanogpt.inference.engine import (
    Completion,
    Engine,
    Text,
    complete,
    longest_prefix_match,
    packed,
    score,
    window_start,
)
from nanogpt.inference.kv_cache import Step
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer

GREEDY = SamplingOptions(temperature=0.0)
BLOCK = 16
V = 50
SWITCHES = {
    "gpt2": {},
    "odd context": {"block_size": 7, "vocab_multiple": 64},
    "context of one": {"block_size": 1, "smear": True},
    "rope, fast recipe": {
        "position": "rope",
        "norm": "rms",
        "activation": "relu2",
        "qk_norm": True,
        "tied": False,
        "softcap": 15.0,
        "smear": True,
        "bias": False,
    },
    "n-grams": {"position": "rope", "smear": True, "ngram_orders": "4,2", "ngram_rows": 3000},
    "alibi, grouped": {"position": "alibi", "n_kv_head": 2, "smear": True, "activation": "swiglu"},
    "rope, one head of keys": {"position": "rope", "n_kv_head": 1, "head_dim": 4},
}


def model_of(**changes) -> GPT:
    torch.manual_seed(0)
    usual = {"vocab_size": V, "block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**{**usual, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(V) for _ in range(1 + i * longest // count)] for i in range(count)]


@torch.inference_mode()
def uncached(model: GPT, ids: list[int]) -> torch.Tensor:
    """Return the logits (V,) after `ids`, computed without a cache."""
    return model(torch.tensor([ids[window_start(len(ids), model.config.block_size) :]]))[0][0, -1]


def write(model: GPT, texts: list[Text], count: int, slots: int = 0) -> list[list[int]]:
    """Generate `count` tokens for each text; `slots`: 0 for one slot per text."""
    decoder = Engine(model, slots or len(texts))
    done = [Completion(text, ByteTokenizer(), count) for text in texts]
    for _ in complete(decoder, done):
        pass
    assert decoder.texts == []
    return [text.new for text in texts]


def assert_as_uncached(model: GPT, waiting: list[Text], decoder: Engine) -> None:
    """Generate six tokens per text, adding and removing texts; assert equal tokens, and logits to 1e-5."""
    logits: list[torch.Tensor] = []
    head = model.head
    model.head = lambda x: logits.append(head(x)) or logits[-1]
    while waiting or decoder.texts:
        decoder.add([waiting.pop() for _ in range(min(decoder.free, len(waiting)))])
        before = [list(text.ids) for text in decoder.texts]
        found = decoder.step()
        for ids, row, (text, token) in zip(before, logits.pop(), found, strict=True):
            expected = uncached(model, ids)
            logits.clear()
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
            assert token.id == expected.argmax()
            if len(text.new) == 6:
                decoder.remove(text)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_cached_generation_equals_uncached(switches):
    """200 prompts of length 1 to twice the context, in mixed batches."""
    model = model_of(**switches)
    waiting = [Text(ids, GREEDY) for ids in prompts(200, 2 * model.config.block_size)]
    random.Random(2).shuffle(waiting)
    assert_as_uncached(model, waiting, Engine(model, slots=16))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_non_cpu_decode_step_equals_uncached(switches):
    model = model_of(**switches)
    decoder = Engine(model, slots=4)
    decoder.flat = None
    assert_as_uncached(model, [Text(ids, GREEDY) for ids in prompts(20, 2 * BLOCK)], decoder)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_shared_prefixes_are_computed_once(switches, monkeypatch):
    """Prompts over two token ids, so that most share a prefix with a current or earlier text."""
    model = model_of(**switches)
    reads = {1: 0, 1000: 0}
    hidden = model.hidden

    def counted(idx, past=None, documents=None):
        # Decode steps on other devices than the CPU also call this.
        reads[engine.SHARED] += 0 if past is None or isinstance(past, Step) else idx.numel()
        return hidden(idx, past)

    model.hidden = counted
    draw = random.Random(4)
    texts = [[draw.randrange(2) for _ in range(draw.randint(1, BLOCK))] for _ in range(60)]
    for least in reads:
        monkeypatch.setattr(engine, "SHARED", least)
        assert_as_uncached(model, [Text(ids, GREEDY) for ids in texts], Engine(model, slots=5))
    assert reads[1] <= 0.9 * reads[1000]


def test_longest_cached_prefix_is_reused():
    held = {0: [1, 2, 3], 4: [], 5: [1, 2, 3, 4, 5], 7: [1, 2, 9, 4, 5, 6], 8: [2]}
    assert longest_prefix_match((1, 2, 3, 4, 9), held) == (5, 4)
    assert longest_prefix_match((1, 2, 9, 4), held) == (7, 4)
    assert longest_prefix_match((1, 2, 3), held) == (0, 3)
    assert longest_prefix_match((3, 1), held) == longest_prefix_match((1,), {}) == (-1, 0)


def test_context_window_shifts_by_half_a_context():
    for block_size in (1, 2, 7, 16):
        starts = [window_start(n, block_size) for n in range(1, 5 * block_size)]
        assert starts[: block_size + 1] == [0] * block_size + [max(1, block_size // 2)]
        assert starts == sorted(starts)
        for n, start in enumerate(starts, 1):
            assert n <= block_size or block_size - max(1, block_size // 2) < n - start <= block_size
    assert len({window_start(n, 16) for n in range(1, 161)}) == 1 + (160 - 16) // 8


def test_result_is_independent_of_prompt_boundary():
    """The visible context depends on the number of tokens, not on how many of them were the prompt."""
    model = model_of()
    (whole,) = write(model, [Text([1, 2, 3], GREEDY)], 60)
    for cut in (1, 13, 14, 30, 45):
        assert write(model, [Text([1, 2, 3, *whole[:cut]], GREEDY)], 60 - cut) == [whole[cut:]]


def test_seeded_text_is_independent_of_the_batch():
    model = model_of(position="rope", smear=True)
    options = [SamplingOptions(temperature=0.9, top_k=k, repetition_penalty=r) for k, r in ((0, 1), (9, 1.3))]
    everyone = [(ids, options[i % 2], i) for i, ids in enumerate(prompts(8, 2 * BLOCK))]
    alone = [write(model, [Text(*one)], 50)[0] for one in everyone]
    assert len({tuple(new) for new in alone}) == 8
    assert write(model, [Text(*one) for one in everyone], 50) == alone
    assert write(model, [Text(*one) for one in everyone], 50, slots=3) == alone  # start as slots free up
    assert write(model, [Text(everyone[3][0], everyone[3][1], seed=99)], 50)[0] != alone[3]


def test_prompt_of_several_samples_is_computed_once():
    model = model_of(smear=True)
    reads = []
    hidden = model.hidden
    model.hidden = lambda idx, past=None: reads.append(tuple(idx.shape)) or hidden(idx, past)
    prompt = prompts(1, 1)[0] * 12
    together = write(model, [Text(prompt, seed=i) for i in range(5)], 30)
    assert reads[0] == (1, 11)
    assert together == [write(model, [Text(prompt, seed=i)], 30)[0] for i in range(5)]


def test_texts_can_be_added_and_removed_at_any_time():
    model = model_of(position="alibi", n_kv_head=2, smear=True)
    draw = random.Random(3)
    expected = {ids: write(model, [Text(list(ids), GREEDY)], 40)[0] for ids in map(tuple, prompts(30, 30))}
    waiting = [(Text(list(ids), GREEDY), new) for ids, new in expected.items()]
    decoder, right = Engine(model, 5), dict[Text, list[int]]()
    while waiting or decoder.texts:
        for _ in range(draw.randint(0, min(decoder.free, len(waiting)))):
            text, new = waiting.pop()
            right[text] = new
            decoder.add([text])
        assert len(decoder.texts) + decoder.free == 5
        for text, token in decoder.step():
            assert token.id == right[text][len(text.new) - 1]
            if draw.random() < 0.1 or len(text.new) == 40:
                decoder.remove(text)


def test_log_probabilities_match_the_model_and_sum_to_one():
    model = model_of(softcap=5.0)
    text = Text([1, 2, 3], SamplingOptions(temperature=0.3, top_k=5, repetition_penalty=1.5), logprobs=V)
    decoder = Engine(model, 1)
    decoder.add([text])
    tokens = [decoder.step()[0][1] for _ in range(40)]
    for n, token in enumerate(tokens):
        expected = uncached(model, text.ids[: 3 + n]).log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-5)
        assert dict(token.top)[token.id] == token.logprob
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) == pytest.approx(1, abs=1e-5)
    scored = score(model, text.ids, alternatives=2)
    assert [token.id for token in scored] == text.ids[1:]
    assert [t.logprob for t in scored[2:]] == pytest.approx([t.logprob for t in tokens], abs=1e-5)
    assert [[i for i, _ in t.top] for t in scored[2:]] == [[i for i, _ in t.top[:2]] for t in tokens]
    assert score(model, [7]) == []


def test_completion_finish_reasons():
    model, letters = model_of(vocab_size=26), CharTokenizer("abcdefghijklmnopqrstuvwxyz")
    (new,) = write(model, [Text([0], GREEDY)], 20)
    whole = "".join(chr(97 + token) for token in new)

    def run(**options) -> Completion:
        completion = Completion(Text([0], GREEDY), letters, 20, **options)
        pieces = [piece for _, _, piece in complete(Engine(model, 1), [completion])]
        assert "".join(pieces) == completion.string
        return completion

    assert (run().string, run().finish_reason) == (whole, "length")
    stop = whole[4:7]
    found = run(stop=[stop, "ÿ"])
    assert (found.string, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    end = new[5]
    found = run(end_of_text=end)
    assert (found.string, found.finish_reason) == (whole[: new.index(end)], "stop")
    assert [token.id for token in found.tokens] == new[: new.index(end)]


def test_closing_the_iterator_releases_the_slots():
    decoder = Engine(model_of(), 2)
    writing = complete(decoder, [Completion(Text([1]), ByteTokenizer(), 9) for _ in range(4)])
    next(writing)
    assert decoder.free == 0
    writing.close()
    assert decoder.free == 2


def test_batched_prefill_has_little_padding():
    texts = [(0,) * n for n in [1, 1, 2, 3, 3, 3, 40, 41, 300, 4000, 4001]]
    groups = list(packed(texts))
    assert [ids for group in groups for ids in group] == texts
    for group in groups:
        assert len(group) == 1 or len(group[-1]) * len(group) <= min(4096, 1.5 * sum(map(len, group)))


def test_warmed_up_decoder_gives_the_same_text():
    model = model_of(position="rope", smear=True)
    cold, warm = Engine(model, 4), Engine(model, 4)
    warm.warm(1000)
    assert warm.free == 4
    for decoder in (cold, warm):
        decoder.add([Text([0] * 9 + [i], seed=i) for i in range(3)])
        for _ in range(20):
            decoder.step()
    assert [text.ids for text in cold.texts] == [text.ids for text in warm.texts]


def test_generated_ids_stay_in_the_vocabulary():
    """10,000 tokens of a model with a padded vocabulary."""
    model = model_of(vocab_multiple=64)
    new = write(model, [Text([1], SamplingOptions(temperature=5.0), i) for i in range(50)], 200)
    assert {token for row in new for token in row} == set(range(V))
