"""nanoGPT checkpoints: equal logits, conversion in both directions, and rejected files."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanogpt.convert import ckpt
from nanogpt.convert.pretrained import Pretrained
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import tokenizer, vocabulary

ARGS = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 24,
    "block_size": 16,
    "bias": True,
    "vocab_size": 11,
    "dropout": 0.1,
}
CHARACTERS = list("\n ,abcdefgh")


def nanogpts(args: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict of nanoGPT's GPT, with tied LM head and embedding."""
    draw = torch.Generator().manual_seed(seed)
    n = args["n_embd"]
    shapes = {"wte": (args["vocab_size"], n), "wpe": (args["block_size"], n)}
    norms, linears = ["ln_f"], {}
    for i in range(args["n_layer"]):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        linears |= {f"h.{i}.attn.c_attn": (3 * n, n), f"h.{i}.attn.c_proj": (n, n)}
        linears |= {f"h.{i}.mlp.c_fc": (4 * n, n), f"h.{i}.mlp.c_proj": (n, 4 * n)}
    shapes |= {name: (n,) for name in norms} | linears
    found = {f"{name}.weight": torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    if args["bias"]:
        found |= {f"{name}.bias": torch.randn(shapes[name][0], generator=draw) for name in [*norms, *linears]}
    found = {f"transformer.{name}": tensor for name, tensor in found.items()}
    return found | {"lm_head.weight": found["transformer.wte.weight"]}


def nanogpts_logits(w: dict[str, torch.Tensor], args: dict, idx: torch.Tensor) -> torch.Tensor:
    """Reimplement nanoGPT's forward pass: plain attention, exact GELU; returns logits."""
    n, nh, T = args["n_embd"], args["n_head"], idx.shape[1]

    def linear(x, name):
        return F.linear(x, w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias"))

    def norm(x, name):
        bias = w.get(f"transformer.{name}.bias")
        return F.layer_norm(x, (n,), w[f"transformer.{name}.weight"], bias, 1e-5)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        q, k, v = (
            part.view(*idx.shape, nh, n // nh).transpose(1, 2)
            for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(n, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(n // nh)
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*idx.shape, n)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        x = x + linear(nn.GELU()(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), w["lm_head.weight"])


def write_ckpt(folder: Path, args: dict = ARGS, **changes) -> Path:
    """Write ckpt.pt as nanoGPT's train.py saves it, and meta.pkl next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = nanogpts(args)
    parameters = [nn.Parameter(tensor) for tensor in weights.values()]
    saved = {
        "model": weights,
        "optimizer": torch.optim.AdamW(parameters).state_dict(),
        "model_args": dict(args),
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "out_dir": "out", "learning_rate": 1e-3},
    }
    torch.save(saved | changes, folder / "ckpt.pt")
    meta = {
        "vocab_size": 11,
        "itos": dict(enumerate(CHARACTERS)),
        "stoi": {c: i for i, c in enumerate(CHARACTERS)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "ckpt.pt"


@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_nanogpts(bias, tmp_path):
    args = ARGS | {"bias": bias}
    found = ckpt.open_file(write_ckpt(tmp_path, args), [])
    assert (found.iter_num, found.val_loss, found.dataset) == (250, 1.5, "shakespeare_char")
    idx = torch.randint(0, 11, (2, 16))
    for vocab_multiple in (1, 64):
        model = found.load(found.fitted(vocab_multiple=vocab_multiple))
        torch.testing.assert_close(model(idx)[0], nanogpts_logits(nanogpts(args), args, idx))
    assert tokenizer.from_text(found.tokenizer).encode("bad\n").tolist() == [4, 3, 6, 0]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_loads_compiled_and_old_checkpoints(tmp_path, prefix):
    """Prefixes of torch.compile and DDP, causal masks as buffers, and model_args without `bias`."""
    weights = {f"{prefix}{name}": tensor for name, tensor in nanogpts(ARGS).items()}
    weights |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    args = {name: value for name, value in ARGS.items() if name != "bias"}
    found = ckpt.open_file(write_ckpt(tmp_path, model=weights, model_args=args), [])
    idx = torch.randint(0, 11, (2, 16))
    torch.testing.assert_close(found.load(found.fitted())(idx)[0], nanogpts_logits(nanogpts(ARGS), ARGS, idx))


@pytest.mark.parametrize(
    "change",
    [lambda w: w.fill_(float("nan")), lambda w: w[0].fill_(float("inf")), lambda w: w.to(torch.int32)],
)
def test_weights_that_are_not_finite_floats_are_rejected(tmp_path, change):
    weights = nanogpts(ARGS)
    changed = change(weights["transformer.wpe.weight"])
    weights["transformer.wpe.weight"] = changed if changed.dim() == 2 else weights["transformer.wpe.weight"]
    found = ckpt.open_file(write_ckpt(tmp_path, model=weights), [])
    with pytest.raises(UserError, match=r"ckpt\.pt: position\.wpe\.weight has values that are not finite"):
        found.load(found.fitted())


def test_numbers_of_numpy_are_named_in_one_plain_line(tmp_path):
    path = write_ckpt(tmp_path, best_val_loss=np.float32(1.5))
    with pytest.raises(UserError, match=r"arbitrary code \(it names numpy.*scalar\)$"):
        ckpt.open_file(path, [])


def test_meta_pkl_is_found_by_dataset_name(tmp_path):
    path = write_ckpt(tmp_path / "out")
    (tmp_path / "data").mkdir()
    (tmp_path / "out" / "meta.pkl").rename(tmp_path / "data" / "meta.pkl")
    assert ckpt.open_file(path, [tmp_path / "data"]).tokenizer == ""
    (tmp_path / "data").rename(tmp_path / "shakespeare_char")
    assert '"a"' in ckpt.open_file(path, [tmp_path]).tokenizer


def test_padded_gpt2_vocabulary_is_recognized(tmp_path):
    args = ARGS | {"vocab_size": 50304, "n_layer": 1}
    path = write_ckpt(tmp_path, args)
    (tmp_path / "meta.pkl").unlink()
    found = ckpt.open_file(path, [])
    assert found.tokenizer == vocabulary.GPT2_BY_NAME
    assert (found.config.vocab_size, found.config.padded_vocab_size) == (50257, 50304)


class Runs:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"evil": Runs()}}, "contains more than tensors, numbers and strings"),
        ({"model": {}}, r"28 missing: wte\.weight"),
        ({"model_args": ARGS | {"n_layer": 1}}, r"unexpected: h\.1\."),
        ({"model_args": ARGS | {"block_size": 8}}, r"position\.wpe\.weight \[16, 24\], expected \[8, 24\]"),
        ({"model_args": ARGS | {"n_head": 5}}, "n_embd=24 is not divisible by n_head=5"),
        ({"model_args": {}}, "is not a nanoGPT checkpoint"),
        ({"model_args": ARGS | {"rope": True}}, "model_args that nanoGPT does not have: rope=True"),
        ({"model": nanogpts(ARGS) | {"lm_head.weight": torch.ones(11, 24)}}, "lm_head.weight differs from"),
    ],
)
def test_invalid_checkpoints_are_rejected(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ckpt.open_file(write_ckpt(tmp_path, **changes), [])


def test_files_that_are_not_checkpoints_are_rejected(tmp_path):
    path = write_ckpt(tmp_path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a nanoGPT checkpoint, or is truncated"):
            ckpt.open_file(path, [])
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="it contains a list"):
        ckpt.open_file(path, [])


# ----------------------------------------------------------------------------- export


def source(config: GPTConfig, text: str) -> Pretrained:
    return Pretrained("here", config, text, "", tuple, iter_num=7, val_loss=1.25, dataset="mine")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_round_trip_is_bit_identical(bias, activation, tmp_path):
    config = GPTConfig(11, 16, 2, 3, 24, bias=bias, activation=activation, vocab_multiple=64, dropout=0.2)
    torch.manual_seed(0)
    model = GPT(config).eval()
    text = tokenizer.to_text(tokenizer.CharTokenizer(CHARACTERS))
    said = ckpt.write_folder(tmp_path, model, source(config, text))
    assert any("meta.pkl to data/mine" in line for line in said)

    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert saved["model_args"] == {**ARGS, "bias": bias, "dropout": 0.2}  # padding removed
    assert saved["model"].keys() == nanogpts(ARGS | {"bias": bias}).keys()
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    if activation == "gelu":
        idx = torch.randint(0, 11, (2, 16))
        torch.testing.assert_close(model(idx)[0], nanogpts_logits(saved["model"], ARGS, idx))

    found = ckpt.open_file(tmp_path / "ckpt.pt", [])
    assert (found.tokenizer, found.iter_num, found.val_loss) == (text, 7, 1.25)
    again = found.load(found.fitted(vocab_multiple=64, dropout=0.2))
    assert again.config == config
    for (name, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
        used = 11 if name == "wte.weight" else len(before)
        assert torch.equal(before[:used], after[:used]), name


def test_meta_pkl_has_nanogpts_format(tmp_path):
    config = GPTConfig(11, 16, 1, 3, 24)
    ckpt.write_folder(
        tmp_path, GPT(config), source(config, tokenizer.to_text(tokenizer.CharTokenizer(CHARACTERS)))
    )
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 11 and meta["itos"][4] == "b" and meta["stoi"]["b"] == 4


def test_unsupported_models_are_rejected(tmp_path):
    config = GPTConfig(11, 16, 1, 2, 24)
    text = tokenizer.to_text(tokenizer.CharTokenizer(CHARACTERS))
    for field, value in {
        "position": "rope",
        "norm": "rms",
        "activation": "relu2",
        "qk_norm": True,
        "smear": True,
        "tied": False,
        "softcap": 15.0,
        "n_kv_head": 1,
        "head_dim": 8,
    }.items():
        with pytest.raises(UserError, match=rf"does not support {field}={value};"):
            ckpt.require(replace(config, **{field: value}), text)
    with pytest.raises(UserError, match="supports char and gpt2 tokenizers, not byte"):
        ckpt.require(config, tokenizer.to_text(tokenizer.ByteTokenizer()))
