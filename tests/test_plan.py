"""plan.py's estimates match real models and optimizers; presets have the sizes in their names."""

import re
from pathlib import Path

import pytest
import torch

import plan
import train
from nanogpt import optim
from nanogpt.config import pick_fields, read
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPT2_SIZES, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate

OPTIONS = frozenset(train.Config.__dataclass_fields__)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [
    *GPT2_SIZES.values(),
    GPTConfig(vocab_multiple=64, tied=False, bias=False, position="rope", norm="rms", activation="relu2"),
    GPTConfig(n_layer=3, n_embd=96, n_head=6, n_kv_head=2, head_dim=8, activation="swiglu", smear=True),
    GPTConfig(n_layer=2, n_embd=64, n_head=4, position="alibi", norm="rms", tied=False, vocab_multiple=128),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_estimated_parameters_and_optimizer_state_match_real_models(shape, optimizer):
    with torch.device("meta"):
        model = GPT(shape)
    found, rules = estimate.parameters(shape), OptimizerOptions(optimizer)
    real = list(model.parameters())
    assert found.total == sum(p.numel() for p in real)
    assert found.total - found.padding == model.n_params()
    assert estimate.flops_per_token(shape) == model.flops_per_token()
    need = estimate.memory(shape, rules, batch_size=4)
    assert need.weights == sum(p.numel() * p.element_size() for p in real)
    state = optim.build(rules, model.named_parameters(), model.fused_rows()).state()
    held = sum(t.numel() * t.element_size() for name, t in state.items() if not name.endswith("steps"))
    assert need.optimizer == held
    assert need.activations == 2 * estimate.memory(shape, rules, batch_size=2).activations


PUBLISHED = {  # millions of parameters: OpenAI's release, and Brown et al. 2020, table 2.1
    "train_gpt2": 124,
    "train_gpt2_medium": 355,
    "train_gpt2_large": 774,
    "train_gpt2_xl": 1558,
    "train_gpt3_small": 125,
    "train_gpt3_medium": 356,
    "train_gpt3_large": 760,
    "train_gpt3_xl": 1316,
    "train_gpt3_2_7b": 2650,
    "train_fineweb_edu_10b": 124,
    "train_fineweb_edu_40b": 124,
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_presets_have_the_named_size_batch_and_length(name, millions):
    path = ROOT / "config" / f"{name}.py"
    options = read(train.Config, [str(path)])
    config = train.Config(**options.values).in_iterations(dict(options.origins))
    with torch.device("meta"):
        model = GPT(pick_fields(GPTConfig, config, vocab_size=50257))
    assert model.n_params() == pytest.approx(millions * 1e6, rel=0.005)
    if name == "train_gpt2":
        return
    batch = config.batch_size * config.gradient_accumulation_steps * config.block_size
    assert batch == config.batch_tokens in (524288, 1048576)
    assert config.gradient_accumulation_steps % 8 == 0  # for 8 GPUs
    assert 0 <= config.max_iters * batch - config.max_tokens < batch
    assert config.block_size == (2048 if "gpt3" in name else 1024)
    assert 0 < config.warmup_iters < config.max_iters / 10
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert "not measured" in head and "GPUs with" in head and f"train.py config/{name}.py" in head


def test_plan_matches_train_py(capsys):
    options = read(plan.Config, ["config/train_gpt2.py"], other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    said = capsys.readouterr().out
    assert "parameters: 124,337,664 " in said and "294,912,000,000 in 600,000 iterations of 491,520" in said
    assert "cost" not in said and "does not fit" not in said
    per_token = 6 * (124_337_664 - 1024 * 768) + 12 * 12 * 768 * 1024
    hours = 294_912_000_000 * per_token / (8 * 312e12 * 0.4) / 3600
    assert f"time: {hours:,.1f} hours" in said


def test_max_iters_flag_is_respected(capsys):
    words = ["config/train_gpt2_xl.py", "--max_iters=10", "--dollars_per_gpu_hour=2", "--gpu_memory=24"]
    options = read(plan.Config, words, other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    said = capsys.readouterr().out
    assert "5,242,880 in 10 iterations of 524,288" in said and "cost: $" in said
    assert "does not fit in 24 GB: even with a smaller --batch_size" in said
    plan.main(plan.Config(gpu_memory=11))
    assert "try a smaller --batch_size" in capsys.readouterr().out


def test_chunked_logits_are_estimated_per_chunk(capsys):
    config = plan.Config(loss_chunk_size=2048, bias=True, batch_size=64, scaling=True)
    plan.main(config)
    said = capsys.readouterr().out
    need = estimate.memory(GPT2_SIZES["gpt2"], OptimizerOptions(), batch_size=64, loss_chunk_size=2048)
    plain = estimate.memory(GPT2_SIZES["gpt2"], OptimizerOptions(), batch_size=64)
    assert (
        f"about {need.activations / 1e9:.2f}" in said and f" {need.total / 1e9:.1f}" in said.partition("|")[2]
    )
    assert need.activations < plain.activations / 1.5


def test_activation_checkpointing_estimate_counts_block_inputs(capsys):
    """Then a micro-batch is mostly logits, and blocks keep no bfloat16 weight copies."""
    shape, rules, found = GPT2_SIZES["gpt2"], OptimizerOptions(), {}
    for activation_checkpointing in (False, True):
        found[activation_checkpointing] = estimate.memory(
            shape, rules, batch_size=12, recompute=activation_checkpointing
        )
        plan.main(plan.Config(activation_checkpointing=activation_checkpointing, bias=True))
        said = capsys.readouterr().out
        assert f"about {found[activation_checkpointing].activations / 1e9:.2f}" in said
        assert ("activation checkpointing costs" in said) == activation_checkpointing
    kept, least = found[False].activations, 12 * 1024 * 4 * (12 * 768 + 3 * 50257)
    assert least < found[True].activations < 1.01 * least < kept / 1.3
    assert found[True].copies == 2 * 768 * 50257 < found[False].copies / 3


def test_invalid_plans_are_rejected():
    with pytest.raises(UserError, match="--gpu=Z80 is not known; expected one of A100, H100"):
        plan.main(plan.Config(gpu="Z80"))
    with pytest.raises(UserError, match="n_embd=100 is not divisible by n_head=12"):
        plan.main(plan.Config(n_embd=100))


def test_documented_figures_match_plan_py(capsys):
    """Hours and dollars in docs/reproduce.md equal those that plan.py computes."""
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(config/\S+)` \| (\S+) \| ([\d,.]+) \| ([\d,.]+) \| \$([\d,]+) \|$", page, re.M)
    assert len(rows) >= 6
    for preset, gpu, gigabytes, hours, dollars in rows:
        words = [str(ROOT / preset), f"--gpu={gpu}", "--dollars_per_gpu_hour=2"]
        options = read(plan.Config, words, other_keys=OPTIONS)
        plan.main(plan.Config(**options.values), options.origins)
        said = capsys.readouterr().out
        assert f"memory per GPU: {gigabytes} GB" in said, preset
        assert f"time: {hours} hours" in said and f"cost: ${dollars} " in said, preset
