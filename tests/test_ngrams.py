"""n-gram embeddings: rows, documents, the sparse update and training runs with them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import train
from nanogpt import files, metrics
from nanogpt import load as load_run
from nanogpt.checkpoint import reader
from nanogpt.config import load, pick_fields, read
from nanogpt.errors import UserError
from nanogpt.model import GPT, NGRAM_TABLES, GPTConfig
from nanogpt.ngrams.embedding import NGramEmbedding
from nanogpt.ngrams.training import RATE, require_possible
from nanogpt.optim import build, clip_gradients
from nanogpt.options import OptimizerOptions
from tests.conftest import small_run
from train import Config

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 11, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


def model_of(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, "ngram_orders": "2,3", "ngram_rows": 200, **changes}))


def filled(**changes) -> GPT:
    model = model_of(**changes)
    with torch.no_grad():
        model.ngrams.weight[1:].normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def row_numbers(tables: NGramEmbedding, idx: torch.Tensor, documents=None) -> torch.Tensor:
    return tables.row_numbers(F.pad(idx, (tables.context, 0), value=-1), documents)


def test_small_tables_have_a_row_for_each_ngram():
    tables = model_of(ngram_rows=11**3).ngrams
    assert tables.rows == [11**2, 11**3] and len(tables.weight) == 1 + 11**2 + 11**3
    every = torch.cartesian_prod(*[torch.arange(11)] * 3)
    found = row_numbers(tables, every)[:, -1]
    assert sorted(found[:, 1].tolist()) == list(range(1 + 11**2, len(tables.weight)))
    pairs = {(b, c): row for (_, b, c), row in zip(every.tolist(), found[:, 0].tolist(), strict=True)}
    assert sorted(pairs.values()) == list(range(1, 1 + 11**2))
    assert len(set(found[:, 0].tolist())) == 11**2  # a function of the last two tokens


@pytest.mark.parametrize("vocab_size", [65, 256, 50257, 65536])
def test_hashed_rows_are_used_evenly_and_depend_on_every_token(vocab_size):
    tables = NGramEmbedding(GPTConfig(vocab_size, n_embd=4, ngram_orders="5", ngram_rows=1024))
    draw = torch.Generator().manual_seed(2)
    idx = torch.randint(vocab_size, (20_000, 5), generator=draw)
    found = row_numbers(tables, idx)[:, -1, 0]
    counts = found.bincount(minlength=1025)
    assert counts[0] == 0 and len(counts) == 1025
    assert counts[1:].float().var() < 2 * 20_000 / 1024  # of a uniform hash: 20,000 / 1,024
    for place in range(5):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % vocab_size
        assert (row_numbers(tables, changed)[:, -1, 0] != found).float().mean() > 0.99


def test_incomplete_ngrams_add_nothing():
    tables = filled().ngrams
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    assert (row_numbers(tables, idx) == 0).tolist() == [[[True, True], [False, True], *[[False] * 2] * 3]]
    x = torch.zeros(1, 5, 16)
    added = tables(x, F.pad(idx, (2, 0), value=-1))
    assert not added[0, 0].any() and not added[0, 1, 8:].any() and added[0, 1, :8].all()


@pytest.mark.parametrize("smear", [False, True])
def test_no_ngram_crosses_a_document(smear):
    model = filled(smear=smear)
    idx = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = model.ngrams(torch.zeros(1, 12, 16), F.pad(idx, (2, 0), value=-1), documents)
    for part in (idx[:, :5], idx[:, 5:]):
        alone = model.ngrams(torch.zeros(*part.shape, 16), F.pad(part, (2, 0), value=-1))
        torch.testing.assert_close(together[:, : part.shape[1]], alone)
        together = together[:, part.shape[1] :]


def test_tables_start_at_zero_and_change_no_other_weight():
    model, plain = model_of(smear=True), model_of(smear=True, ngram_orders="")
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx)[0], plain(idx)[0])


def test_predictions_depend_on_earlier_tokens_only():
    model = filled()
    idx = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(4))
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 11
    assert torch.equal(model(idx)[0][:, :9], model(changed)[0][:, :9])


def test_tables_are_parameters_but_no_flops():
    model, plain = model_of(), model_of(ngram_orders="")
    assert model.n_params() - plain.n_params() == model.ngrams.weight.numel() == (1 + 121 + 200) * 8
    assert model.flops_per_token() == plain.flops_per_token()


def trained(tokens: list[torch.Tensor], sparse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables and their optimizer state after a step on each of `tokens`; not `sparse`: with a
    dense gradient, whose every row is updated."""
    model = filled()
    optimizer = build(OptimizerOptions(), model.named_parameters())
    for idx in tokens:
        for part in idx.split(1):  # micro-batches
            model(part, part.roll(-1, 1))[1].backward()
        if not sparse:
            model.ngrams.weight.grad = every_row(model.ngrams.weight.grad)
        clip_gradients(optimizer.parameters, 0.0)
        optimizer.lr = 0.01
        optimizer.step()
        optimizer.zero_grad()
    return model.ngrams.weight.detach(), optimizer.state()[f"{NGRAM_TABLES}.sums"]


def every_row(gradient: torch.Tensor) -> torch.Tensor:
    dense = gradient.coalesce().to_dense()
    every = torch.arange(len(dense))[None]
    return torch.sparse_coo_tensor(every, dense, dense.shape, check_invariants=True)


def test_updating_the_rows_read_equals_the_dense_update():
    draw = torch.Generator().manual_seed(5)
    tokens = [torch.randint(11, (3, 16), generator=draw) for _ in range(4)]
    (sparse, sums), (dense, expected) = trained(tokens, True), trained(tokens, False)
    assert torch.equal(sparse, dense) and torch.equal(sums, expected)
    untouched = sums == 0
    assert untouched[0] and 0 < untouched.sum() < len(sums)
    assert torch.equal(sparse[untouched], filled().ngrams.weight[untouched])


def test_dense_gradients_of_gpus_give_the_same_update(monkeypatch):
    draw = torch.Generator().manual_seed(5)
    tokens = [torch.randint(11, (3, 16), generator=draw) for _ in range(4)]
    sparse = trained(tokens, True)
    monkeypatch.setattr(NGramEmbedding, "sparse", False)
    torch.testing.assert_close(trained(tokens, True), sparse)
    assert not sparse[0][0].any()


def test_update_equals_the_formula_in_float64():
    model = filled()
    optimizer = build(OptimizerOptions(), model.named_parameters())
    expected, sums = model.ngrams.weight.detach().double(), torch.zeros(len(model.ngrams.weight)).double()
    draw = torch.Generator().manual_seed(6)
    for step in range(5):
        idx = torch.randint(11, (4, 16), generator=draw)
        model(idx, idx.roll(-1, 1))[1].backward()
        gradient = model.ngrams.weight.grad.to_dense().double()
        clip_gradients(optimizer.parameters, 0.0)
        optimizer.lr = 0.01 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        sums += gradient.square().mean(dim=1)
        expected -= RATE * optimizer.lr * gradient / (sums.sqrt()[:, None] + 1e-10)
    torch.testing.assert_close(model.ngrams.weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_clipping_uses_the_norm_of_all_gradients():
    model = filled()
    idx = torch.randint(11, (4, 16), generator=torch.Generator().manual_seed(7))
    model(idx, idx.roll(-1, 1))[1].backward()
    dense = [p.grad.to_dense() for p in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in dense]).norm()
    torch.testing.assert_close(clip_gradients(model.parameters(), 0.1), norm)
    clipped = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ngram_orders=0", "different lengths from 2 to 8"),
        ("--ngram_orders=1", "different lengths from 2 to 8"),
        ("--ngram_orders=40", "different lengths from 2 to 8"),
        ("--ngram_orders=2,3,3", "different lengths from 2 to 8"),
        ("--ngram_orders=2,x", "different lengths from 2 to 8"),
        ("--ngram_orders=2,", "different lengths from 2 to 8"),
        ("--ngram_rows=0", "ngram_rows is '0', not"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(flag, message):
    with pytest.raises(UserError, match=message) as error:
        load(Config, [flag])
    assert "\n" not in str(error.value)


def test_tables_larger_than_memory_are_rejected():
    shape = GPTConfig(**SHAPE | {"vocab_size": 50257}, ngram_orders="2,3", ngram_rows=10**12)
    with pytest.raises(UserError, match=r"take 64,161.6 GB, but 8.0 GB are free; lower --ngram_rows"):
        require_possible(shape, 8 * 10**9, sharded=False)


def test_tables_are_not_sharded():
    with pytest.raises(UserError, match="do not work with --parallel=fsdp"):
        require_possible(GPTConfig(**SHAPE, ngram_orders="2"), None, sharded=True)


def test_orders_beyond_the_context_are_rejected(dataset, tmp_path):
    with pytest.raises(UserError, match="no 5-gram fits into --block_size=4"):
        train.main(small_run(dataset, tmp_path / "out", block_size=4, ngram_orders="2,5"))


def test_checkpoint_of_the_cpu_preset_with_tables_takes_at_most_40_mb():
    options = read(Config, [str(ROOT / "config" / "train_shakespeare_char_cpu.py")]).values
    config = Config(**options)
    assert config.ngram_orders
    with torch.device("meta"):
        model = GPT(pick_fields(GPTConfig, config, vocab_size=65))
        optimizer = build(config, model.named_parameters(), model.part_heights())
    saved = [*model.parameters(), *optimizer.state().values()]
    assert sum(tensor.nbytes for tensor in saved) < 40e6


TABLES_RUN = {"ngram_orders": "2,3", "ngram_rows": 300, "documents": "stream", "dropout": 0.1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_is_bit_identical(dataset, tmp_path, dtype):
    how = TABLES_RUN | {"dtype": dtype, "gradient_accumulation_steps": 2, "save_interval": 4}
    train.main(small_run(dataset, tmp_path / "whole", max_iters=8, **how))
    train.main(small_run(dataset, tmp_path / "parts", max_iters=4, lr_decay_iters=8, **how))
    train.main(small_run(dataset, tmp_path / "parts", max_iters=8, init_from="resume", **how))
    whole, parts = (reader.find(tmp_path / name)[0] for name in ("whole", "parts"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(found.path / file) for found in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_tables_are_not_added_to_a_run_saved_before_they_existed(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(small_run(dataset, out, max_iters=2))
    found = reader.find(out)[0]
    for kind in ("options", "model"):
        del found.state[kind]["ngram_orders"], found.state[kind]["ngram_rows"]
    files.write_json(found.path / "state.json", found.state)
    manifest = files.read_json(found.path / "manifest.json")
    state = {"bytes": (found.path / "state.json").stat().st_size}
    state["sha256"] = files.sha256(found.path / "state.json")
    manifest["files"]["state.json"] = state
    files.write_json(found.path / "manifest.json", manifest)
    train.main(small_run(dataset, out, max_iters=3, init_from="resume"))
    train.main(small_run(dataset, out, max_iters=4, init_from="resume", ngram_orders="2"))
    assert "note: ngram_orders = '' as in the checkpoint" in capsys.readouterr().out


def test_tables_are_saved_named_sampled_and_finetuned(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(small_run(dataset, out, max_iters=30, **TABLES_RUN))
    with_tables = capsys.readouterr().out
    train.main(small_run(dataset, tmp_path / "plain", max_iters=30, dropout=0.1))
    assert "of them in n-gram tables)" in with_tables
    assert "n-gram" not in capsys.readouterr().out
    assert val_loss(out) < val_loss(tmp_path / "plain")
    model = load_run(out)
    assert model.model.ngrams.weight.any()
    text = model.generate("a", max_new_tokens=40, temperature=0.8)
    assert len(text) == 40 and model.score(text).perplexity > 1
    weights = {}
    for name, options in {
        "lora": {"lora_rank": 2},
        "frozen": {"freeze": "ngrams*"},
        "tables": {"train_only": "ngrams*"},
    }.items():
        more = small_run(dataset, tmp_path / name, max_iters=3, init_from=str(out), **options)
        train.main(more)
        weights[name] = load_file(reader.find(tmp_path / name)[0].path / "model.safetensors")
    before = load_file(reader.find(out, "best")[0].path / "model.safetensors")
    changed = {name: {n for n in before if not torch.equal(w[n], before[n])} for name, w in weights.items()}
    assert changed["tables"] == {NGRAM_TABLES}
    assert NGRAM_TABLES not in changed["frozen"] and changed["frozen"]
    assert not changed["lora"]


def val_loss(out: Path) -> float:
    return metrics.read(out)[-1]["val_loss"]
