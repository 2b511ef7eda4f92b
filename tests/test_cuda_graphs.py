"""CUDA graph capture and replay give the eager results. Stand-ins for CUDA's capture run the same work on the
same memory at each replay."""

import itertools
from functools import partial

import pytest
import torch

import train
from nanogpt import optim, runtime
from nanogpt.config import pick_fields
from nanogpt.errors import UserError
from nanogpt.gpu import auto_batch_size, cuda_graphs
from nanogpt.inference import graph_decode
from nanogpt.inference.engine import Completion, Engine, Text, complete
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.tokenizer.tokenizer import ByteTokenizer
from nanogpt.world import World
from tests.conftest import update
from tests.test_generate import SWITCHES, model_of

pytestmark = pytest.mark.cpu  # test_gpu.py captures real CUDA graphs
CPU = runtime.Machine(torch.device("cpu"), "float32", "test")
GREEDY = SamplingOptions(temperature=0.0)


class Recorder:
    """Stand-in for the capture of a CUDA graph: nothing runs before a replay, outputs keep their memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def step(self, work):
        self.recorded += 1
        result = torch.empty(()), torch.empty(())

        def replay():
            self.replayed += 1
            for place, part in zip(result, work(), strict=True):
                place.copy_(part)

        return result, replay

    def text(self, work):
        self.recorded += 1
        result = tuple(torch.full_like(part, -1) for part in work())

        def replay():
            self.replayed += 1
            for place, part in zip(result, work(), strict=True):
                place.copy_(part)

        return result, replay


@pytest.mark.parametrize("rules", ["adamw", "muon"])
def test_captured_training_step_equals_the_eager_one(rules):
    """Ten updates of two micro-batches, with dropout, varying learning rate and one batch of another size."""
    found, recorder = [], Recorder()
    for graph in (None, cuda_graphs.StepGraph(train.train_step, 8, CPU, recorder.step)):
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2, bias=False)
        )
        # No cautious decay: it depends on the sign of weights that are nearly 0.
        rule = OptimizerOptions(rules)
        optimizer = optim.build(rule, model.named_parameters(), model.part_heights())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = []
        for i in range(10):
            rows = 3 if i == 6 else 4
            idx = torch.randint(10, (2, rows, 17), generator=torch.Generator().manual_seed(i))
            batches = ((part[:, :-1], part[:, 1:]) for part in idx)
            how = {"iter_num": i, "lr": 1e-2 / (i + 1), "take": graph}
            losses.append([float(part) for part in update(model, optimizer, CPU, scaler, batches, **how)])
        found.append((losses, [p.detach() for p in model.parameters()]))
    assert recorder.recorded == 1 and recorder.replayed == 10 - cuda_graphs.WARM_UPS - 1
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), rtol=1e-5, atol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_uncapturable_configs_are_rejected():
    cuda = torch.device("cuda")
    machine = runtime.Machine(cuda, "bfloat16", "test")
    cuda_graphs.require_recordable(Config, machine, scored=False)
    with pytest.raises(UserError, match=r"does not support float16.* and data of prompts"):
        cuda_graphs.require_recordable(Config, runtime.Machine(cuda, "float16", "test"), scored=True)
    with pytest.raises(UserError, match=r"does not support several processes and --activation_checkpointing"):
        several = runtime.Machine(cuda, "bfloat16", "test", World(0, 2))
        cuda_graphs.require_recordable(Recomputing, several, scored=False)
    with pytest.raises(UserError, match="needs a CUDA GPU, and this is cpu"):
        graph_decode.GraphEngine(model_of(), 1)


# ----------------------------------------------------------------------------- decoding


def written(decoder, texts, count):
    done = [Completion(text, ByteTokenizer(), count) for text in texts]
    for _ in complete(decoder, done):
        pass
    return [text.new for text in texts]


OPTIONS = {
    "greedy": [GREEDY],
    "drawn": [SamplingOptions(temperature=0.9, top_k=9)],
    "min-p": [SamplingOptions(temperature=1.1, min_p=0.05)],
    "mixed": [SamplingOptions(top_p=0.8), SamplingOptions(repetition_penalty=1.3), GREEDY],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_captured_decoding_writes_the_same_texts(switches, options, monkeypatch):
    """Seven texts of various lengths, also beyond the context, in three slots, with several cache lengths."""
    monkeypatch.setattr(graph_decode, "SHORTEST", 4)
    model, recorder = model_of(**switches), Recorder()
    prompts = [[(3 * i + j) % 50 for j in range(1 + 4 * i)] for i in range(7)]
    found = []
    for kind in (Engine, lambda *given: graph_decode.GraphEngine(*given, record=recorder.text)):
        texts = [Text(ids, options[i % len(options)], seed=i) for i, ids in enumerate(prompts)]
        found.append(written(kind(model, 3), texts, 12))
    assert found[0] == found[1]
    assert recorder.replayed > 20 >= recorder.recorded


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=0.9, top_k=9)])
def test_multi_step_decoding_equals_single_steps(options):
    model, recorder = model_of(position="rope", smear=True, block_size=64), Recorder()
    found = []
    for at_once in (False, True):
        texts = [Text([1, 2, 3 + i], options, seed=i) for i in range(3)]
        decoder = graph_decode.GraphEngine(model, 3, 40, recorder.text) if at_once else Engine(model, 3, 40)
        decoder.add(texts)
        if at_once:
            first = decoder.run(20)
            assert first.shape == (20, 3) and first.T.tolist() == [text.new for text in texts]
            decoder.run(1)
        for _ in range(4 if at_once else 25):
            decoder.step()
        found.append([text.ids for text in texts])
    assert found[0] == found[1]


# ----------------------------------------------------------------------------- automatic batch size


def test_micro_batch_is_halved_until_it_fits(monkeypatch):
    """Devices on which 1 to 65 sequences fit, for several numbers of sequences per iteration."""
    tried = []

    def one_try(room, rows):
        tried.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(auto_batch_size.gc, "collect", lambda: 0)
    for room, sequences in itertools.product(range(1, 66), (1, 12, 48, 49, 64)):
        tried.clear()
        trial = partial(one_try, room)
        rows = auto_batch_size.largest(
            sequences, lambda n, trial=trial: auto_batch_size.fits(n, trial), lambda flag: flag
        )
        assert rows and sequences % rows == 0 and rows <= room
        assert all(b <= a // 2 for a, b in itertools.pairwise(tried)) and len(tried) <= 7
    assert auto_batch_size.largest(8, lambda n: False, lambda flag: flag) == 0


def test_batch_size_that_one_rank_cannot_hold_is_not_chosen():
    elsewhere = iter([True, True, False])
    assert auto_batch_size.largest(64, lambda rows: True, lambda failed: failed or next(elsewhere)) == 16


def test_trial_batch_size_is_limited_to_the_share_of_a_rank():
    tried = []
    assert (
        auto_batch_size.largest(480, lambda rows: not tried.append(rows), bool, processes=8) == 60 == tried[0]
    )
    assert (
        auto_batch_size.largest(10, lambda rows: True, bool, processes=4) == 2
    )  # 3, 3, 2, 2 sequences, in micro-batches of 2


class Config:
    """The fields of train.Config that a trial uses."""

    activation_checkpointing = False
    optimizer, loss_chunk_size, block_size, grad_clip = "muon", 8, 16, 1.0
    batch_tokens, vocab_size, n_layer, n_head, n_embd = 64, 10, 1, 2, 16


class Recomputing(Config):
    activation_checkpointing = True


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize(("how", "pieces"), [(False, 0), (True, 1), ("blocks", 1)])
def test_batch_size_trial_runs_real_steps(activation_checkpointing, how, pieces, monkeypatch):
    """Compiled if the run is, which takes a third of the memory; in one graph for all sizes tried."""
    taken, real, compiled = [], train.train_step, []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(dynamic) or f)

    def step(model, optimizer, scaler, micro_batches, *rates):
        taken.extend(len(batch[0]) for _, batch in micro_batches)
        return real(model, optimizer, scaler, micro_batches, *rates)

    monkeypatch.setattr(train, "train_step", step)
    sizes = {
        "block_size": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "optimizer": "muon",
        "loss_chunk_size": 8,
    }
    config = train.Config(**sizes, compile=how, activation_checkpointing=activation_checkpointing)
    trial = partial(train.try_batch_size, config, CPU, pick_fields(GPTConfig, config, vocab_size=10))
    assert auto_batch_size.fits(4, trial) and taken == [4, 4]
    assert compiled == [True] * pieces


def test_no_fitting_batch_size_is_reported(monkeypatch):
    class Gpu(runtime.Machine):
        def name(self):
            return "a GPU"

    gpu = Gpu(torch.device("cuda"), "float32", "test")
    monkeypatch.setattr(auto_batch_size, "fits", lambda *unused, **named: False)
    with pytest.raises(UserError, match="not one sequence of 16 tokens fits in the memory of a GPU"):
        auto_batch_size.choose(Config, gpu, "", lambda rows: None)
