"""ddp, fsdp and hsdp train as a single process does and write the same files. Uses gloo, in processes forked
once for all runs (tests/processes.py)."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from nanogpt import compile, metrics
from nanogpt.checkpoint import reader
from nanogpt.data import loader
from nanogpt.data.token_files import Tokens
from nanogpt.distributed import parallelize
from nanogpt.distributed.layout import Replicated
from nanogpt.errors import UserError
from nanogpt.evaluation import log_likelihood
from nanogpt.gpu import auto_batch_size
from nanogpt.model import GPT, IGNORE, GPTConfig
from nanogpt.ngrams.embedding import NGramEmbedding
from nanogpt.optim import build
from nanogpt.options import OptimizerOptions
from nanogpt.prepare import corpus
from nanogpt.runtime import Machine
from nanogpt.world import World
from tests import processes
from tests.conftest import words, write_dataset
from tests.processes import Job

SHAPE = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --dropout=0 --device=cpu --compile=False "
    "--dtype=float32 --learning_rate=1e-3 --muon_lr=0.005 --warmup_iters=5 --max_iters=20 "
    "--lr_decay_iters=20 --eval_interval=20 --save_interval=10 --eval_iters=1000 --log_interval=1 "
    "--gradient_accumulation_steps=1"
)
# 15 sequences on 2 ranks: 8 and 7, in 3 micro-batches each
UNEVEN = ["--batch_size=3", "--gradient_accumulation_steps=5", "--eval_iters=10"]
RAGGED = ["--batch_size=2", "--gradient_accumulation_steps=5"]  # 10 on 4: 3, 3, 2, 2, in 2 or 1 micro-batches
SHORT = [
    "--max_iters=4",
    "--batch_size=2",
    "--gradient_accumulation_steps=3",
    "--eval_interval=4",
    "--eval_iters=1",
]
TASKS = ["--eval_tasks=questions.jsonl", "--sample_prompt=abc", "--sample_tokens=8"]
COUNT = "tests.test_parallelize:print_rows"
DENSE = "tests.test_parallelize:make_table_gradients_dense"
LOOKING = ["--sample_prompt=abc", "--sample_tokens=8"]


def job(name: str, number: int, *options: str, resumes: str = "") -> Job:
    """Return a job; `name` starts with the optimizer and the number of sequences in a batch."""
    return Job(name, number, [f"--optimizer={name.split('-')[0]}", *options], resumes)


FEW = ["--max_iters=8", "--eval_interval=8"]
RECIPE = ["--position=rope", "--tied=False", "--init=zero", "--parallel=ddp"]
FAST = ["--loss_chunk_size=20", "--deterministic=True"]
EVALUATE = ["--eval_only=True", "--init_from=resume", "--batch_size=4"]
STOP, GO_ON = ["--max_iters=5"], ["--init_from=resume", "--max_iters=10"]
TABLES = ["--ngram_orders=2,3", "--ngram_rows=500"]
JOBS = [
    job("adamw-15", 1, "--batch_size=15", "--eval_iters=2"),
    job("muon-15", 1, "--batch_size=15", "--eval_iters=2"),
    job("muon-10", 1, "--batch_size=10", *FEW, "--eval_iters=1"),
    job("muon-15-ngrams", 1, "--batch_size=15", "--eval_iters=2", *TABLES),
    job("muon-15-ngrams-ddp", 2, *UNEVEN, "--parallel=ddp", *TABLES),
    Job("muon-15-dense", 2, ["--optimizer=muon", *UNEVEN, "--parallel=ddp", *TABLES], prepare=DENSE),
    job("muon-15-ngrams-stopped", 2, *UNEVEN, *STOP, "--parallel=ddp", *TABLES),
    job("muon-15-ngrams-on-2", 2, *UNEVEN, *GO_ON, "--parallel=ddp", resumes="muon-15-ngrams-stopped"),
    job("muon-15-ngrams-on-1", 1, *UNEVEN, *GO_ON, resumes="muon-15-ngrams-stopped"),
    job("adamw-15-fsdp", 2, *UNEVEN, "--parallel=fsdp"),
    job("muon-15-ddp", 2, *UNEVEN, "--parallel=ddp"),
    job("muon-15-fsdp", 2, *UNEVEN, "--parallel=fsdp"),
    job("muon-10-fsdp", 4, *RAGGED, *FEW, "--parallel=fsdp", "--eval_iters=5"),
    job("muon-10-hsdp", 4, "--batch_size=10", *FEW, "--parallel=hsdp", "--shard_size=2", "--eval_iters=1"),
    *[job(f"muon-10-fast-{name}", 2, "--batch_size=5", *FEW, *RECIPE, "--eval_iters=2") for name in "ab"],
    job("adamw-15-stopped", 2, *UNEVEN, *STOP, "--parallel=fsdp"),
    job("adamw-15-on-4", 4, *UNEVEN, *GO_ON, "--parallel=ddp", resumes="adamw-15-stopped"),
    job("muon-15-stopped", 2, *UNEVEN, *STOP, "--parallel=fsdp"),
    job("muon-15-on-2", 2, *UNEVEN, *GO_ON, "--parallel=fsdp", resumes="muon-15-stopped"),
    job("muon-15-on-1", 1, *UNEVEN, *GO_ON, resumes="muon-15-stopped"),
    Job("lora-fsdp", 2, [*SHORT, "--lora_rank=2", "--parallel=fsdp", *LOOKING]),
    Job("lora-alone", 1, [*SHORT, "--lora_rank=2", *LOOKING]),
    Job("bfloat16-ddp", 2, [*SHORT, "--dtype=bfloat16", "--parallel=ddp"]),
    Job("bfloat16-fsdp", 2, [*SHORT, "--dtype=bfloat16", "--parallel=fsdp"]),
    Job(
        "bfloat16-recompute",
        2,
        [*SHORT, "--dtype=bfloat16", "--parallel=fsdp", "--activation_checkpointing=True"],
    ),
    Job("autocast-ddp", 2, [*SHORT, "--dtype=bfloat16", "--casting=autocast", "--parallel=ddp"]),
    Job("autocast-fsdp", 2, [*SHORT, "--dtype=bfloat16", "--casting=autocast", "--parallel=fsdp"]),
    job("muon-15-fast", 2, *UNEVEN, *FEW, "--parallel=fsdp", *FAST),
    Job("bfloat16-fast", 2, [*SHORT, "--dtype=bfloat16", "--parallel=fsdp", *FAST]),
    Job("float16-ddp", 2, [*SHORT, "--dtype=float16", "--parallel=ddp"]),
    Job("float16-fsdp", 2, [*SHORT, "--dtype=float16", "--parallel=fsdp"]),
    Job("responses-15", 1, ["--batch_size=15", "--eval_iters=2"]),
    Job("responses-15-ddp", 2, [*UNEVEN, "--parallel=ddp"]),
    Job("responses-15-fsdp", 2, [*UNEVEN, "--parallel=fsdp"]),
    Job("responses-10", 1, ["--batch_size=10", *FEW, "--eval_iters=1"]),
    Job("responses-10-ddp", 4, [*RAGGED, *FEW, "--parallel=ddp", "--eval_iters=5"]),
    Job("responses-10-fsdp", 4, [*RAGGED, *FEW, "--parallel=fsdp", "--eval_iters=5"]),
    *[Job(f"tasks-{n}", n, [*SHORT, *TASKS, "--parallel=ddp"], prepare=COUNT) for n in (1, 2, 4)],
    Job("tasks-fsdp", 2, [*SHORT, *TASKS, "--parallel=fsdp"], prepare=COUNT),
    Job("eval-1", 1, EVALUATE, resumes="adamw-15-fsdp"),
    Job("eval-4", 4, [*EVALUATE, "--parallel=fsdp"], resumes="adamw-15-fsdp"),
]


def print_rows() -> None:
    """Print the number of rows of each batch that a rank scores, and make batches small."""
    real, log_likelihood.BATCH_TOKENS = log_likelihood._losses, 256

    def losses(subject, ids, *given):
        print(f"scored {len(ids)} rows", file=sys.stderr)
        return real(subject, ids, *given)

    log_likelihood._losses = losses


def make_table_gradients_dense() -> None:
    NGramEmbedding.sparse = False  # as on a GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run all jobs; return the folder of their runs."""
    folder = tmp_path_factory.mktemp("runs")
    datasets = {False: write_dataset(folder / "words", words(3000)), True: write_responses(folder)}
    jobs = []
    questions = [
        {"context": "abc"[: i % 4], "choices": [words(1 + i % 5, i), words(2, i)], "label": i % 2}
        for i in range(60)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for job in JOBS:
        dataset = datasets[job.name.startswith("responses")]
        options = [option.replace("questions.jsonl", str(folder / "tasks.jsonl")) for option in job.options]
        jobs.append(replace(job, options=[*SHAPE.split(), f"--dataset={dataset}", *options]))
    for number in (1, 2, 4):
        given = [f"--dataset={datasets[False]}", f"--tasks={folder / 'tasks.jsonl'}", "--device=cpu"]
        given += [f"--{kind}={folder / f'score-{number}'}.{kind}" for kind in ("out", "items")]
        name = f"score-{number}"
        jobs.append(Job(name, number, [*given, "--batch_size=4"], resumes="tasks-1", program="eval"))
    processes.run(folder, jobs)
    return folder


def write_responses(folder: Path) -> Path:
    """Write data with prompts so long that many sequences of 16 tokens contain no response token."""
    parts = words(12600).split("\n")
    rows = [{"prompt": " ".join(parts[i : i + 6]), "response": parts[i + 6]} for i in range(0, 2100, 7)]
    lines = folder / "questions.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus.prepare([lines], folder / "questions", kind="bpe:300", text_key="prompt+response")
    return folder / "questions"


def losses(run: Path, event: str = "step", key: str = "loss") -> list[float]:
    return [row[key] for row in metrics.read(run) if row["event"] == event]


def saved(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint of a run."""
    found, damage = reader.find(run, which)
    assert found and not damage
    files = ("model.safetensors", "optimizer.safetensors")
    return {f"{file}: {name}": t for file in files for name, t in load_file(found.path / file).items()}


@pytest.mark.parametrize(
    "name",
    [
        *("adamw-15-fsdp", "muon-15-ddp", "muon-15-fsdp", "muon-10-fsdp", "muon-10-hsdp"),
        "muon-15-ngrams-ddp",
        *("responses-15-ddp", "responses-15-fsdp", "responses-10-ddp", "responses-10-fsdp"),
    ],
)
def test_every_parallel_mode_trains_as_one_process(folder, name):
    """Also if a rank has one sequence or one micro-batch less than the other ranks."""
    like, mode = name.rsplit("-", 1)
    run, alone = folder / name, folder / like
    assert f"parallel: {mode}" in processes.said(folder, name)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-6)
    assert losses(run, key="grad_norm") == pytest.approx(losses(alone, key="grad_norm"), rel=1e-4)
    assert losses(run, "eval", "val_loss") == pytest.approx(losses(alone, "eval", "val_loss"), rel=1e-6)
    assert len(losses(run)) == len(losses(alone)) == (20 if "15" in name else 8)
    found, expected = saved(run), saved(alone)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for tensor, whole in found.items():
        torch.testing.assert_close(whole, expected[tensor], rtol=1e-2, atol=1e-4, msg=tensor)


def test_dense_gradients_of_tables_train_as_sparse_ones_of_one_process(folder):
    dense, sparse = folder / "muon-15-dense", folder / "muon-15-ngrams"
    assert losses(dense) == pytest.approx(losses(sparse), rel=1e-6) and len(losses(dense)) == 20
    assert losses(dense, key="grad_norm") == pytest.approx(losses(sparse, key="grad_norm"), rel=1e-4)


def test_some_ranks_had_no_response_tokens(folder):
    """Check that the runs above include micro-batches, and complete rank shares, without a target."""
    tokens, scored = loader.load(folder / "questions").train, []
    for rank in range(4):
        batches = loader.TrainBatches(tokens, 16, 2, 5, 1337, torch.device("cpu"), world=World(rank, 4))
        scored += [[bool((b[1] != IGNORE).any()) for b in batches.step(step)] for step in range(8)]
    assert [len(parts) for parts in scored] == [2] * 16 + [1] * 16
    assert {any(parts) for parts in scored} == {True, False} and [True, False] in scored


def test_stopped_run_resumes_at_another_world_size_and_mode(folder):
    before = {"muon-15-on-1": "muon-15-fsdp", "adamw-15-on-4": "adamw-15-fsdp"}
    for name, begun in (before | {"muon-15-ngrams-on-1": "muon-15-ngrams-ddp"}).items():
        unbroken = losses(folder / begun)[:10]
        assert losses(folder / name) == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.parametrize(
    ("unbroken", "resumed"),
    [("muon-15-fsdp", "muon-15-on-2"), ("muon-15-ngrams-ddp", "muon-15-ngrams-on-2")],
)
def test_resume_at_the_same_world_size_is_bit_identical(folder, unbroken, resumed):
    unbroken, resumed = folder / unbroken, folder / resumed
    assert losses(resumed) == losses(unbroken)[:10]
    before, after = saved(unbroken, "10"), saved(resumed, "10")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_repeated_run_is_bit_identical(folder):
    first, second = (saved(folder / f"muon-10-fast-{name}") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_with_frozen_weights_under_fsdp(folder):
    alone, found = saved(folder / "lora-alone"), saved(folder / "lora-fsdp")
    assert losses(folder / "lora-fsdp") == pytest.approx(losses(folder / "lora-alone"), rel=1e-6)
    assert found.keys() == alone.keys() and any("lora_b" in tensor for tensor in found)
    frozen = [tensor for tensor in found if tensor.startswith("model") and "lora" not in tensor]
    assert frozen and all(torch.equal(found[tensor], alone[tensor]) for tensor in frozen)


def test_samples_under_fsdp_use_the_full_model(folder):
    files = [folder / name / "samples" / "step-000004.txt" for name in ("lora-alone", "lora-fsdp")]
    assert files[0].read_text(encoding="utf-8") == files[1].read_text(encoding="utf-8")


def test_performance_options_do_not_change_the_loss(folder):
    fast, plain = folder / "muon-15-fast", folder / "muon-15-fsdp"
    assert losses(fast) == pytest.approx(losses(plain)[:8], rel=1e-5) and len(losses(fast)) == 8
    assert losses(fast, key="grad_norm") == pytest.approx(losses(plain, key="grad_norm")[:8], rel=1e-4)
    assert losses(folder / "bfloat16-fast") == pytest.approx(losses(folder / "bfloat16-fsdp"), rel=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "autocast"])
def test_fsdp_units_compute_in_the_machine_dtype(folder, dtype):
    ddp, fsdp = (losses(folder / f"{dtype}-{mode}") for mode in ("ddp", "fsdp"))
    assert ddp[0] == fsdp[0] and ddp == pytest.approx(fsdp, rel=1e-3)
    assert len(ddp) == 4 and ddp[-1] < ddp[0]


def test_recomputed_units_regather_their_weights(folder):
    assert losses(folder / "bfloat16-recompute") == losses(folder / "bfloat16-fsdp")


def test_eval_only_under_fsdp(folder):
    lines = [
        [line for line in processes.said(folder, name).splitlines() if line.startswith("step 20:")]
        for name in ("eval-1", "eval-4")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 1


@pytest.mark.parametrize("name", ["tasks-2", "tasks-4", "tasks-fsdp"])
def test_tasks_during_training_have_the_scores_of_one_process(folder, name):
    """Bit for bit before the first update; afterwards the weights differ by rounding."""
    found, expected = (
        [r for r in metrics.read(folder / n) if r["event"] == "tasks"] for n in (name, "tasks-1")
    )
    assert [row["iter"] for row in found] == [row["iter"] for row in expected] == [0, 4]
    assert found[0] == expected[0] and len(found[0]) > 4
    assert processes.said(folder, name).count("step 0: tasks: acc") == 1
    assert len(list((folder / name / "samples").iterdir())) == 2


def test_ranks_share_the_rows_of_tasks(folder):
    """Each rank scores a part of the rows; only a sharded model is scored by rank 0 alone."""
    for name, alone in (("tasks-2", False), ("tasks-fsdp", True)):
        logs = [(folder / f"{name}.log{end}").read_text(encoding="utf-8") for end in ("", ".1")]
        rows = [sum(map(int, re.findall(r"scored (\d+) rows", log))) for log in logs]
        assert sum(rows) == 2 * 120 and (rows[1] == 0) is alone and rows[0] >= rows[1]


def test_eval_py_gives_equal_results_on_any_number_of_ranks(folder):
    def read(number, kind):
        text = (folder / f"score-{number}.{kind}").read_text(encoding="utf-8")
        return re.sub(r'"seconds": [\d.]+|score-\d', "", text)

    for number in (2, 4):
        assert read(number, "items") == read(1, "items") and len(read(1, "items")) > 1000
        assert read(number, "out") == read(1, "out")
        assert processes.said(folder, f"score-{number}").count("tasks: acc ") == 1


# ----------------------------------------------------------------------------- without processes


def choose(asked="auto", shard_size=0, size=8, on_node=8, weights=1, optimizer=2, memory=100):
    return parallelize.choose(asked, shard_size, World(0, size, on_node=on_node), weights, optimizer, memory)


def test_auto_takes_ddp_while_it_fits():
    def mode(*given, **changes):
        return choose(*given, **changes).mode, choose(*given, **changes).shard_size

    assert mode() == ("ddp", 1)
    assert mode(weights=50) == ("fsdp", 8) and "more than 80%" in choose(weights=50).why
    assert mode(size=16, weights=50) == ("hsdp", 8)
    assert mode(size=16, on_node=1, weights=50) == ("fsdp", 16)
    assert choose(size=1, on_node=1, weights=50) == parallelize.Division("ddp", 1, "")
    assert mode("fsdp") == ("fsdp", 8) and mode("ddp", weights=99) == ("ddp", 1)
    assert mode("hsdp", 4) == ("hsdp", 4) and "2 replicas of 4 ranks" in choose("hsdp", 4).why
    # only the local shard of the optimizer state counts
    assert mode(weights=30, optimizer=60) == ("ddp", 1)
    assert mode(size=2, on_node=2, weights=30, optimizer=60) == ("fsdp", 2)


@pytest.mark.parametrize(("size", "shard_size"), [(8, 3), (8, 8), (8, 1), (7, 0)])
def test_invalid_sharding_groups_are_rejected(size, shard_size):
    with pytest.raises(UserError, match="--parallel=hsdp"):
        choose("hsdp", shard_size, size, on_node=2 if size == 7 else 8)


class Deaf(World):
    """A rank that receives nothing from the other ranks."""

    def sum(self, x):
        return x


@pytest.mark.parametrize(
    ("sequences", "batch_size", "switches"),
    [(8, 2, [False, True]), (7, 2, [False, True]), (3, 1, [False, True]), (2, 2, [True])],
)
def test_gradients_sync_only_in_the_last_micro_batch(sequences, batch_size, switches):
    """Regression test for nanoGPT's loop: DDP reads the sync flag in the forward pass, so it must be set
    before. Every rank also makes as many passes as the rank with the most micro-batches."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=8))
    machine, order = Machine(torch.device("cpu"), "float32", "test", Deaf(1, 2)), []

    def function(*batch):
        order.append("forward")
        return model(*batch)

    own = machine.world.share(sequences)[1]
    mine = [(part, part) for part in torch.randint(10, (own, 4)).split(batch_size)]

    class Batches:
        """The part of data.TrainBatches that is used."""

        def __init__(self):
            self.batch_size = batch_size
            self.tokens = Tokens([], 10)

        def sequences(self, step):
            return sequences

        def step(self, step):
            return iter(mine)

    connected = parallelize.Connected(function, order.append)
    optimizer = build(OptimizerOptions(), model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    micro_batches = parallelize.micro_batches(Batches(), machine.world, connected, 0)
    step = parallelize.step_of_all(train.train_step, SimpleNamespace(machine=machine, progress=None))
    loss, _ = step(connected, optimizer, scaler, micro_batches, 0.0, 0.0)
    assert order == [thing for switch in switches for thing in (switch, "forward")]
    idx = torch.cat([part for part, _ in mine])
    assert float(loss) == pytest.approx(model(idx, idx)[1].item() * own / sequences, rel=1e-6)


def test_activation_checkpointing_keeps_gradients_and_saves_memory():
    def kept_and_gradients(activation_checkpointing):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=4, n_head=2, n_embd=32, dropout=0.2))
        if activation_checkpointing:
            compile.checkpoint_activations(model, Machine(torch.device("cpu"), "float32", "test"))
        idx, kept = torch.randint(10, (8, 16)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            _, loss = model(idx, idx)
        loss.backward()
        return sum(kept), [p.grad for p in model.parameters()]

    (plain, gradients), (less, same) = kept_and_gradients(False), kept_and_gradients(True)
    assert less < plain / 3
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_activation_checkpointing_rejects_temporary_weight_casts():
    model = GPT(GPTConfig(vocab_size=10, n_layer=1))
    with pytest.raises(UserError, match="--activation_checkpointing in bfloat16 on a CPU"):
        compile.checkpoint_activations(model, Machine(torch.device("cpu"), "bfloat16", ""))
    with pytest.raises(
        UserError, match=r"--activation_checkpointing in bfloat16 by --casting=weights .* use --casting=auto"
    ):
        compile.checkpoint_activations(
            model, Machine(torch.device("cuda"), "bfloat16", "", casting="weights")
        )


def test_auto_batch_size_rejects_sharded_models(dataset):
    config = train.Config(dataset=str(dataset), batch_size="auto", batch_tokens=480, block_size=16)
    divided, machine = choose("fsdp"), Machine(torch.device("cuda"), "bfloat16", "")
    with pytest.raises(UserError, match=r"--batch_size=auto .* sharded \(fsdp: as asked\); give a number"):
        auto_batch_size.choose(config, machine, divided.why, lambda rows: None)


def test_owners_have_balanced_costs():
    layout = Replicated(World(0, 4))
    costs = [9.0, 1, 1, 5, 4, 4, 3, 9, 2]
    assign_ranks = layout.assign_ranks(costs)
    loads = [
        sum(c for c, owner in zip(costs, assign_ranks, strict=True) if owner == rank) for rank in range(4)
    ]
    assert max(loads) <= 10 and sum(loads) == sum(costs)
    assert layout.assign_ranks(costs) == assign_ranks


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_optimizer_state_is_sharded_over_ranks(rule):
    """ZeRO-1: every element of the state is on exactly one rank, in about equal parts."""
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=4, n_head=2, n_embd=32))
    whole = build(OptimizerOptions(rule), model.named_parameters(), model.part_heights()).state()
    for size in (2, 4):
        held = []
        for rank in range(size):
            layout = Replicated(World(rank, size))
            optimizer = build(
                OptimizerOptions(rule), model.named_parameters(), model.part_heights(), layout=layout
            )
            pieces = {n: piece for n, piece in optimizer.state_shards().items() if not n.endswith("steps")}
            held.append(sum(piece.tensor.numel() for piece in pieces.values()))
            for name, piece in pieces.items():
                assert piece.shape == whole[name].shape
                ends = [span for span in piece.spans if span[0] < span[1]]
                assert ends[0][0] == 0 and ends[-1][1] == piece.shape.numel()
                assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
                assert piece.tensor.numel() == piece.spans[rank][1] - piece.spans[rank][0]
        assert sum(held) == sum(t.numel() for n, t in whole.items() if not n.endswith("steps"))
        assert max(held) < 1.1 * sum(held) / size


def test_unsharded_state_is_not_copied():
    """Without sharding, a checkpoint writes the optimizer's own tensors, without a copy."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=8))
    optimizer = build(OptimizerOptions("muon"), model.named_parameters(), model.part_heights())
    state, pieces = optimizer.state(), optimizer.state_shards()
    assert state.keys() == pieces.keys()
    for name, piece in pieces.items():
        assert state[name].data_ptr() == piece.tensor.data_ptr() and state[name].shape == piece.shape
        piece.copy_(torch.full(piece.shape, 2.0))
        assert bool((state[name] == 2).all())
