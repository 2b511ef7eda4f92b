"""Sequences that start at documents, document masks, and batch sizes in tokens."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from nanogpt.checkpoint import reader
from nanogpt.config import require_consistent
from nanogpt.data import documents, loader
from nanogpt.data.samplers import DocumentSampler
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig

END = 50256


@pytest.fixture
def folder(bare_tokens):
    """GPT-2 tokens in documents of 1 to 60 tokens, each followed by end_of_text."""
    draw = np.random.default_rng(1)
    for split in ("train", "val"):
        ids = np.fromfile(bare_tokens / f"{split}.bin", "<u2")
        ids[ids == END] = 0
        ends = np.cumsum(draw.integers(2, 60, 400))
        ids[ends[ends < len(ids)]] = END
        ids.tofile(bare_tokens / f"{split}.bin")
    return bare_tokens


@pytest.fixture
def config(folder, tmp_path):
    return train.Config(
        out_dir=str(tmp_path / "out"),
        dataset=str(folder),
        device="cpu",
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=2,
        gradient_accumulation_steps=2,
        max_iters=6,
        warmup_iters=1,
        eval_interval=6,
        eval_iters=2,
    )


SWITCHES = [
    {},
    {"position": "rope", "qk_norm": True, "norm": "rms", "smear": True},
    {"position": "alibi", "n_kv_head": 1, "smear": True},
]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_a_document_never_changes_logits_of_others(switches, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=32, n_layer=3, n_head=2, n_embd=16, **switches))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "smear" in name:
                parameter.fill_(0.5)
    model = model.eval().to(dtype)
    idx = torch.randint(1, 40, (2, 32))
    idx[0, [0, 7, 20]] = 0
    idx[1, [3, 4, 31]] = 0
    numbers = (idx == 0).cumsum(1)
    before = model(idx, None, numbers)[0]
    for row in range(2):
        for number in numbers[row].unique():
            own = numbers[row] == number
            other = idx.clone()
            other[row, own & (idx[row] != 0)] = torch.randint(1, 40, (int((own & (idx[row] != 0)).sum()),))
            after = model(other, None, numbers)[0]
            assert torch.equal(after[row, ~own], before[row, ~own])
            assert torch.equal(after[1 - row], before[1 - row])
    assert not torch.equal(model(idx)[0], before)  # without the mask it does change


def test_single_document_equals_the_unmasked_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=32, n_layer=2, n_head=2, n_embd=16, smear=True)).eval()
    idx = torch.randint(1, 40, (2, 32))
    whole = model(idx, None, torch.zeros_like(idx))[0]
    assert (whole - model(idx)[0]).abs().max() < 1e-5


def test_rows_start_at_documents_and_never_overlap(folder, monkeypatch):
    tokens = loader.load(folder).train
    raw = np.fromfile(folder / "train.bin", "<u2")
    begins = documents.rows(tokens, END, 16)
    assert begins[0] == 0 and (raw[begins[1:]] == END).all()
    assert (np.diff(begins) >= 16).all() and begins[-1] + 17 <= len(raw)
    ends = np.concatenate([[0], np.flatnonzero(raw == END)])
    for here, after in itertools.pairwise(begins):  # no document was skipped
        assert after == ends[ends >= here + 16][0]
    monkeypatch.setattr(documents, "CHUNK", 37)
    assert (documents.rows(tokens, END, 16) == begins).all()
    order = DocumentSampler(begins, seed=3)
    epoch = order.starts(0, len(begins))
    assert sorted(epoch) == list(begins) and list(epoch) != list(begins)
    assert list(order.starts(5, 9)) == list(epoch[5:14])  # a pure function of the sample index
    assert list(order.starts(len(begins), len(begins))) != list(epoch)


@pytest.mark.parametrize("mode", ["rows", "masked"])
def test_document_training_resume_is_bit_identical(config, tmp_path, mode, capsys):
    straight = replace(config, documents=mode, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    said = capsys.readouterr().out
    assert ("--documents=rows drops" in said) == (mode == "rows")
    broken = replace(config, documents=mode)
    train.main(replace(broken, max_iters=3, lr_decay_iters=6))
    origins = {"init_from": "", "out_dir": "", "max_iters": "--max_iters=6"}
    train.main(replace(broken, init_from="resume"), origins)
    one, two = (reader.find(Path(run.out_dir))[0] for run in (straight, broken))
    both = zip(one.load_model().parameters(), two.load_model().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    stream = replace(config, out_dir=str(tmp_path / "stream"))
    train.main(stream)
    other = reader.find(Path(stream.out_dir))[0].load_model()
    assert not torch.equal(other.wte.weight, one.load_model().wte.weight)


def test_data_without_documents_is_rejected(config, dataset, folder):
    with pytest.raises(UserError, match=r"--documents=rows needs a separator token, which char"):
        train.main(replace(config, dataset=str(dataset), documents="rows"))
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[ids == END] = 1
    ids.tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"there is no <\|endoftext\|> \(id 50256\) in the training text"):
        train.main(replace(config, documents="masked"))


# ----------------------------------------------------------------------------- sizes in tokens


def counted(config, **origins):
    require_consistent(config, origins)
    return config.in_iterations(origins)


def test_batch_tokens_and_max_tokens(config):
    config = replace(config, batch_tokens=16 * 2 * 5, max_tokens=1000)
    found = counted(config)
    assert (found.gradient_accumulation_steps, found.max_iters) == (5, 7)  # 160 tokens per iteration
    ramped = counted(replace(config, batch_ramp_tokens=480, batch_ramp_start=0.2))
    sizes = [n * 16 for n in ramped.ramp()]
    assert (
        sum(sizes) + (ramped.max_iters - len(sizes)) * 160
        >= 1000
        > (ramped.max_iters - 1 - len(sizes)) * 160 + sum(sizes)
    )
    assert len(sizes) > 2


def test_indivisible_batch_tokens_error_lists_valid_values(config):
    with pytest.raises(UserError, match=r"2 \* 16 = 32 tokens; give 96 or 128"):
        counted(replace(config, batch_tokens=100))
    with pytest.raises(UserError, match=r"give 32,"):
        counted(replace(config, batch_tokens=10))


def test_flags_override_presets_and_conflicting_flags_are_rejected(config):
    both = replace(config, batch_tokens=320, max_tokens=320)
    found = counted(
        both, batch_tokens="config/x.py", gradient_accumulation_steps="--gradient_accumulation_steps=2"
    )
    assert found.gradient_accumulation_steps == 2 and found.batch_tokens == 0
    assert found.max_iters == 5
    with pytest.raises(UserError, match="set the same quantity"):
        counted(both, max_tokens="--max_tokens=320", max_iters="--max_iters=6")
