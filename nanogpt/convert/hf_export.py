"""Export a model as a Hugging Face folder for transformers, if one of its classes computes the same function.

Models of GPT-2's architecture become GPT2LMHeadModel. Bias-free models with rotary positions and a relu2
or swiglu MLP (the fast recipe without smear) become VaultGemmaForCausalLM, which has
rotary positions and a logit softcap. The conversion is exact up to rounding:

- relu(x)² is relu(x) * x, a gated unit whose gate and up projections are the same matrix;
- LayerNorm is RMSNorm of a zero-mean residual stream, so the mean is subtracted from every weight that
  writes into the stream (Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers");
- VaultGemma multiplies embeddings by sqrt(C), and stores norm gains minus 1.

Any other model can be exported with its own code, a copy of model.py, beside the weights.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanogpt import files, metrics
from nanogpt.convert import hf_tokenizer
from nanogpt.convert.layout import OWN_TOKENIZER, theirs, unlike
from nanogpt.convert.pretrained import Pretrained
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.runtime import DTYPES
from nanogpt.tokenizer import tokenizer, vocabulary

LIBRARY = Path(__file__).resolve().parent.parent
CODE = ("convert/modeling_nanogpt.py", "model.py", "loss.py", "chunked_loss.py", "ngrams/embedding.py")
RMS_EPS = torch.finfo(torch.float32).eps  # eps of F.rms_norm; LayerNorm uses 1e-5
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A transformers class: which models it cannot represent, and how to convert the others."""

    architecture: str
    refusals: Callable[[GPTConfig], list[str]]
    settings: Callable[[GPTConfig], dict[str, Any]]
    weights: Callable[[GPTConfig, Weights], Weights]


# ----------------------------------------------------------------------------- GPT-2


def _gpt2_refusals(config: GPTConfig) -> list[str]:
    known: dict[str, Any] = {"activation": tuple(ACTIVATIONS), "bias": None, "tied": None}
    known |= {"n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd // config.n_head)}
    return unlike(config, known)


ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}


def _gpt2_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # as in OpenAI's files; llama.cpp's converter reads it
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": 1e-5,
        **{name: config.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        "tie_word_embeddings": config.tied,
        "nanogpt": {"bias": config.bias},  # False: all biases in the file are zero
    }


def _gpt2_weights(config: GPTConfig, weights: Weights) -> Weights:
    gpt2 = {}
    for name, tensor in weights.items():
        is_matrix = name.startswith("h.") and tensor.dim() == 2
        gpt2[theirs(name)] = tensor.t() if is_matrix else tensor
        if not config.bias and name.endswith("weight") and name.startswith(("h.", "ln_f")):
            gpt2[theirs(name).removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    return gpt2


# ----------------------------------------------------------------------------- VaultGemma

GATES = {"relu2": "relu", "swiglu": "silu"}


def _vault_refusals(config: GPTConfig) -> list[str]:
    known: dict[str, Any] = dict.fromkeys(("norm", "tied", "softcap", "n_kv_head", "head_dim"))
    wrong = unlike(config, known | {"position": ("rope",), "activation": tuple(GATES), "bias": (False,)})
    if config.n_embd % config.n_head:
        wrong.append(f"n_embd={config.n_embd} with n_head={config.n_head}")
    return wrong


def _vault_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "vaultgemma",
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.head_size,
        "query_pre_attn_scalar": config.head_size,
        "hidden_size": config.n_embd,
        "intermediate_size": _hidden(config),
        "hidden_activation": GATES[config.activation],
        "max_position_embeddings": config.block_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5 if config.norm == "layer" else RMS_EPS,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "layer_types": ["full_attention"] * config.n_layer,
        "final_logit_softcapping": config.softcap or None,
        "attn_logit_softcapping": None,
        "tie_word_embeddings": False,
    }


def _hidden(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(replace(config, n_layer=1)).h[0].mlp.c_proj.in_features  # type: ignore[union-attr, return-value]


def _vault_weights(config: GPTConfig, weights: Weights) -> Weights:
    centred = config.norm == "layer"

    def into_stream(tensor: Tensor, dim: int) -> Tensor:
        tensor = tensor.double()
        return (tensor - tensor.mean(dim, keepdim=True) if centred else tensor).float()

    def gain(name: str) -> Tensor:
        return weights[name] - 1 if centred else torch.zeros(config.n_embd)

    wte = weights["wte.weight"]
    vault = {
        "model.embed_tokens.weight": into_stream(wte.double() / config.n_embd**0.5, 1),
        "model.norm.weight": gain("ln_f.weight"),
        "lm_head.weight": weights.get("lm_head.weight", wte),
    }
    kv = (config.n_kv_head or config.n_head) * config.head_size
    for i in range(config.n_layer):
        old, new = f"h.{i}.", f"model.layers.{i}."
        parts = weights[f"{old}attn.c_attn.weight"].split([config.n_head * config.head_size, kv, kv])
        vault |= {f"{new}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        vault[f"{new}self_attn.o_proj.weight"] = into_stream(weights[f"{old}attn.c_proj.weight"], 0)
        fc = weights[f"{old}mlp.c_fc.weight"]
        gate, up = (fc, fc) if config.activation == "relu2" else fc.chunk(2)
        vault[f"{new}mlp.gate_proj.weight"], vault[f"{new}mlp.up_proj.weight"] = gate, up
        vault[f"{new}mlp.down_proj.weight"] = into_stream(weights[f"{old}mlp.c_proj.weight"], 0)
        vault[f"{new}input_layernorm.weight"] = gain(f"{old}ln_1.weight")
        vault[f"{new}pre_feedforward_layernorm.weight"] = gain(f"{old}ln_2.weight")
    return vault


# ----------------------------------------------------------------------------- own code


def _own_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "nanogpt",
        "gpt": asdict(replace(config, vocab_multiple=1)),
        "auto_map": {
            "AutoConfig": "modeling_nanogpt.NanoGPTConfig",
            "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
        },
        "tie_word_embeddings": False,  # for transformers: a tied LM head has no tensor of its own here
    }


TARGETS = (
    Target("GPT2LMHeadModel", _gpt2_refusals, _gpt2_settings, _gpt2_weights),
    Target("VaultGemmaForCausalLM", _vault_refusals, _vault_settings, _vault_weights),
)
OWN_CODE = Target(
    "NanoGPTForCausalLM",
    lambda config: [],
    _own_settings,
    lambda config, weights: {f"gpt.{name}": tensor for name, tensor in weights.items()},
)


def choose(config: GPTConfig, custom_code: bool) -> Target:
    """Return the class that computes `config`; raise UserError with a reason per class if none does."""
    if custom_code:
        return OWN_CODE
    reasons = []
    for target in TARGETS:
        if not (wrong := target.refusals(config)):
            return target
        reasons.append(f"{target.architecture} does not support {', '.join(wrong)}")
    raise UserError(
        f"no transformers class computes this model: {'; '.join(reasons)}. --custom_code=True writes the "
        f"model's own code beside the weights; loading then needs trust_remote_code=True"
    )


# ----------------------------------------------------------------------------- writing


def write_folder(folder: Path, model: GPT, text: str, dtype: str, custom_code: bool) -> list[str]:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer `text` (contents of
    tokenizer.json; empty: none) into the existing `folder`.

    Vocabulary padding is dropped. Return notes to print. Raise UserError as `choose` does.
    """
    config = model.config
    target = choose(config, custom_code)
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    for table in ("wte.weight", "lm_head.weight"):
        if table in weights:
            weights[table] = weights[table][: config.vocab_size]
    tensors = target.weights(config, weights)
    # Clone: safetensors rejects tensors that share storage.
    ready = {name: tensor.to(DTYPES[dtype]).contiguous().clone() for name, tensor in tensors.items()}
    if big := [name for name, tensor in ready.items() if tensor.isinf().any()]:
        raise UserError(f"{big[0]} has values beyond the range of {dtype}; use --dtype=bfloat16")
    save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    notes = [f"{target.architecture}, {sum(t.numel() for t in ready.values()):,} weights in {dtype}"]
    tokens = None
    try:
        tokens = tokenizer.from_text(text) if text else None
        if not tokens:
            notes.append("no tokenizer written: the tokenizer of the model is unknown")
    except UserError as error:  # GPT-2's, known by name only, and its merges are not available
        notes.append(f"no tokenizer written: {error}")
    end = tokens.end_of_text if tokens else vocabulary.GPT2_VOCAB_SIZE - 1 if text else None
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    fields = {"architectures": [target.architecture], "vocab_size": config.vocab_size, "dtype": dtype, **ends}
    files.write_json(folder / "config.json", fields | target.settings(config))
    # pad_token_id not in config.json: some classes exclude that id from learning
    files.write_json(folder / "generation_config.json", ends | {"pad_token_id": end})
    if custom_code:
        _write_code(folder)
        notes.append("it includes code (modeling_nanogpt.py): load with trust_remote_code=True")
    if tokens:
        files.write_text(folder / OWN_TOKENIZER, tokenizer.to_text(tokens))
        try:
            hf_tokenizer.write(folder, tokens)
        except UserError as error:
            notes.append(f"no Hugging Face tokenizer written: {error}")
    return notes


def write_card(folder: Path, name: str, source: Pretrained, architecture: str, custom_code: bool) -> None:
    """Write README.md, the model card: shape, and from the run in `source` what it was trained on and how
    well it does."""
    config, run = source.config, Path(source.origin).parent
    with torch.device("meta"):
        parameters = GPT(config).n_params()
    rows = metrics.read(run) if (run / metrics.NAME).is_file() else []
    known = {row["iter"]: row for row in rows if row.get("event") == "eval"}.get(source.iter_num, {})
    facts = {
        "class": f"`{architecture}`" + (", with its code in this folder" if custom_code else ""),
        "parameters": f"{parameters:,}",
        "layers, heads, channels": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "trained on": source.dataset and f"`{Path(source.dataset).name}`",
        "iterations": source.iter_num and f"{source.iter_num:,}",
        "tokens read": known and f"{known['tokens']:,}",
    }
    for split, loss in (("training", known.get("train_loss")), ("validation", source.val_loss)):
        if loss is not None:
            facts[f"{split} loss"] = f"{loss:.4f} nats/token, perplexity {math.exp(min(loss, 700)):.2f}"
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items() if value)
    trust = ", trust_remote_code=True" if custom_code else ""
    card = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    files.write_text(folder / "README.md", card.format(name=name, table=table, trust=trust))


def _write_code(folder: Path) -> None:
    """Write the model's own code with relative imports, as transformers copies these files elsewhere."""
    for name in CODE:
        source = LIBRARY / name
        text = re.sub(
            r"^( *)from nanogpt\.(\w+\.)*",
            r"\1from .",
            source.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        files.write_text(folder / source.name, text)
