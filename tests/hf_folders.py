"""Random GPT-2 folders in Hugging Face layout, written independently of nanogpt and transformers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 50257}


def tensors(n_layer: int, n_head: int, n_embd: int, n_positions: int, vocab_size: int) -> dict:
    """Return the tensors of a GPT2LMHeadModel by name, matrices as (in, out), as in its files."""
    draw = torch.Generator().manual_seed(n_embd)
    shapes = {"wte.weight": (vocab_size, n_embd), "wpe.weight": (n_positions, n_embd)}
    for i in range(n_layer):
        shapes |= {
            f"h.{i}.{norm}.{kind}": (n_embd,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")
        }
        for name, (rows, columns) in {
            "attn.c_attn": (n_embd, 3 * n_embd),
            "attn.c_proj": (n_embd, n_embd),
            "mlp.c_fc": (n_embd, 4 * n_embd),
            "mlp.c_proj": (4 * n_embd, n_embd),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (columns,)}
    shapes |= {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}
    found = {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items()}
    gains = [name for name in found if "ln_" in name and name.endswith("weight")]
    found |= {name: found[name] + 1 for name in gains}
    return {f"transformer.{name}": tensor for name, tensor in found.items()}


def write(folder: Path, changes: dict | None = None, merges: Path | None = None, **shape: int) -> Path:
    """Write config.json (updated by `changes`), model.safetensors and, if `merges` is given, merges.txt."""
    shape = SMALL | shape
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, **shape}
    (folder / "config.json").write_text(json.dumps(about | (changes or {})), encoding="utf-8")
    save_file(tensors(**shape), folder / "model.safetensors", metadata={"format": "pt"})
    if merges:
        shutil.copy(merges, folder / "merges.txt")
    return folder


def write_cache(home: Path, repo: str, **given) -> Path:
    """Write a snapshot of `repo` ("owner/name") in the layout of the hub cache in HF_HOME=`home`."""
    commit = "0123456789012345678901234567890123456789"
    top = home / "hub" / f"models--{repo.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(commit, encoding="utf-8")
    return write(top / "snapshots" / commit, **given)


def tokenizer_json(merges: Path) -> dict:
    """Return GPT-2's tokenizer.json; with fewer `merges`, the other ids are of tokens that never occur."""
    from nanogpt.tokenizer import bpe, vocabulary

    value = json.loads(bpe.as_hugging_face(merges.read_text(encoding="utf-8")))
    vocab, end = value["model"]["vocab"], vocabulary.GPT2_VOCAB_SIZE - 1
    vocab |= {f"unused {i}": i for i in range(len(vocab), end)} | {vocabulary.END_OF_TEXT: end}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return value | {
        "added_tokens": [{"id": end, "content": vocabulary.END_OF_TEXT, "special": True, **flags}]
    }
