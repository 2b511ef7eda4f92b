"""plan.py's estimates match real models and optimizers; presets have the sizes in their names."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plan
import plot
import train
from nanogpt import metrics, optim
from nanogpt.checkpoint import reader
from nanogpt.config import pick_fields, read
from nanogpt.errors import UserError
from nanogpt.gpu import chips
from nanogpt.model import GPT, GPT2_SIZES, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate
from tests.conftest import words, write_dataset

OPTIONS = frozenset(train.Config.__dataclass_fields__)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [
    *GPT2_SIZES.values(),
    GPTConfig(vocab_multiple=64, tied=False, bias=False, position="rope", norm="rms", activation="relu2"),
    GPTConfig(n_layer=3, n_embd=96, n_head=6, n_kv_head=2, head_dim=8, activation="swiglu", smear=True),
    GPTConfig(n_layer=1, n_embd=64, n_head=4, ngram_orders="2,3,5", ngram_rows=70_000),
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
    assert need.weights == need.gradients == sum(p.numel() * p.element_size() for p in real)
    state = optim.build(rules, model.named_parameters(), model.part_heights()).state()
    held = sum(t.numel() * t.element_size() for name, t in state.items() if not name.endswith("steps"))
    assert need.optimizer == held
    assert need.activations == 2 * estimate.memory(shape, rules, batch_size=2).activations


@pytest.mark.parametrize(
    "given",
    [
        {"max_iters": 7},
        {"max_tokens": 1500},  # 5.9 iterations
        {"max_tokens": 1500, "batch_tokens": 512},
        {"max_iters": 7, "batch_ramp_tokens": 700},
    ],
    ids=str,
)
def test_plan_log_state_and_plot_agree_on_iterations_and_tokens(given, tmp_path, capsys):
    write_dataset(tmp_path / "data", words(900))
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8}
    shape |= {"dataset": str(tmp_path / "data"), **given}
    if "batch_tokens" not in given:
        shape |= {"gradient_accumulation_steps": 2}
    rest = {"device": "cpu", "log_interval": 1, "eval_iters": 1, "warmup_iters": 0}
    options = {"out_dir": str(tmp_path / "out"), **shape, **rest}
    train.main(train.Config(**options), dict.fromkeys(options, "given"))
    printed = capsys.readouterr().out
    rows = metrics.read(tmp_path / "out")
    state = reader.find(tmp_path / "out", "last")[0].state
    done, read = state["iter_num"], rows[-1]["tokens"]
    assert len(re.findall(r"(?m)^iter \d+:", printed)) == done == rows[-1]["iter"] == rows[-2]["iter"] + 1
    assert rows[-2]["tokens"] == read  # of the last step, and of the evaluation after it
    assert f"; {done} iterations, " in printed
    drawn = [plot.load_run(tmp_path / "out", "x", x).evals["x"][-1] for x in ("iter", "tokens")]
    assert drawn == [done, read]
    if "batch_ramp_tokens" not in given:
        plan.main(plan.Config(gpu="H100", **shape), dict.fromkeys(shape, "given"))
        assert f"tokens: {read:,} in {done} iterations of {read // done:,};" in capsys.readouterr().out


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
    options = read(plan.Config, ["config/train_gpt2.py", "--gpu=A100"], other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    said = capsys.readouterr().out
    assert "parameters: 124,337,664 " in said and "294,912,000,000 in 600,000 iterations of 491,520" in said
    assert "cost" not in said and "fits in 80 GB: yes, and with --batch_size=60, the largest" in said
    assert "activations of 12 x 1,024 tokens" in said
    per_token = 6 * (124_337_664 - 1024 * 768) + 12 * 12 * 768 * 1024
    hours = 294_912_000_000 * per_token / (8 * 312e12 * 0.4) / 3600
    assert f"time: {hours:,.1f} hours" in said


def test_max_iters_flag_is_respected(capsys):
    words = [
        "config/train_gpt2_xl.py",
        "--gpu=A100",
        "--max_iters=10",
        "--dollars_per_gpu_hour=2",
        "--gpu_memory=20",
    ]
    options = read(plan.Config, words, other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    said = capsys.readouterr().out
    assert "5,242,880 in 10 iterations of 524,288" in said and "cost: $" in said
    assert "fits in 20 GB: no, not even with --batch_size=1" in said
    plan.main(plan.Config(gpu="A100", gpu_memory=6))
    assert "fits in 6 GB: with --batch_size=8, not 12" in capsys.readouterr().out
    plan.main(plan.Config(gpu="A100", gpu_memory=9))
    assert "fits in 9 GB: yes, and with --batch_size=15, the largest" in capsys.readouterr().out


def test_chunked_logits_are_estimated_per_chunk(capsys):
    config = plan.Config(gpu="A100", loss_chunk_size=2048, bias=True, batch_size=64, scaling=True)
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
    shape, rules, found = replace(GPT2_SIZES["gpt2"], vocab_multiple=64), OptimizerOptions(), {}
    for activation_checkpointing in (False, True):
        found[activation_checkpointing] = estimate.memory(
            shape, rules, batch_size=12, recompute=activation_checkpointing, compiled=True
        )
        plan.main(plan.Config(gpu="A100", activation_checkpointing=activation_checkpointing, bias=True))
        said = capsys.readouterr().out
        assert f"about {found[activation_checkpointing].activations / 1e9:.2f}" in said
        assert ("activation checkpointing costs" in said) == activation_checkpointing
    kept, least = found[False].activations, 12 * 1024 * (4 * 12 * 768 + 2 * 50257)
    assert least < found[True].activations < 1.15 * least < kept / 1.3
    assert found[True].copies == 2 * 768 * 50257 < found[False].copies / 3


def test_invalid_plans_are_rejected():
    with pytest.raises(UserError, match="--gpu=Z80 is not known; expected one of B200, H200"):
        plan.main(plan.Config(gpu="Z80"))
    with pytest.raises(UserError, match="n_embd=100 is not divisible by n_head=12"):
        plan.main(plan.Config(gpu="A100", n_embd=100))


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


# ----------------------------------------------------------------------------- the preset as it is


def said(capsys, *words: str) -> str:
    options = read(plan.Config, list(words), other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    return capsys.readouterr().out


def test_pretrained_weights_give_the_shape(capsys):
    words = [str(ROOT / "config" / "finetune_shakespeare.py"), "--gpu=RTX4090", "--gpus=1"]
    out = said(capsys, *words)
    assert "parameters: 1,557,611,200 " in out and "fits in 24 GB: no" in out
    with torch.device("meta"):
        model = GPT(GPT2_SIZES["gpt2-xl"])
    linear = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ("c_attn", "c_proj")]
    adapters = sum(8 * sum(module.weight.shape) for module in linear)
    out = said(capsys, *words, "--lora_rank=8")
    assert f"; {adapters:,} trained" in out and "fits in 24 GB: yes" in out
    assert float(re.search(r"gradients ([\d.]+)", out)[1]) == pytest.approx(4 * adapters / 1e9, abs=0.01)


def test_vocabulary_of_the_dataset_counts(capsys, dataset, tmp_path):
    preset = str(ROOT / "config" / "train_shakespeare_char.py")
    out = said(capsys, preset, f"--dataset={dataset}", "--gpu=A100")
    assert "parameters: 10,6" in out and "note" not in out
    out = said(capsys, preset, f"--dataset={tmp_path / 'none'}", "--gpu=A100")
    assert out.startswith("note: GPT-2's vocabulary of 50,257 assumed, because no dataset at")


def test_a_text_is_prepared_for_its_vocabulary(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("abcdefgh" * 100, encoding="utf-8")
    out = said(capsys, str(ROOT / "config" / "quickstart.py"), "--dataset=novel.txt", "--gpu=A100")
    assert "GPT-2's vocabulary" not in out and re.search(r"parameters: 7\d\d,", out)


@pytest.mark.parametrize("name", ["RTX4090", "NVIDIA GeForce RTX 4090", "rtx 4090", "RTX-4090"])
def test_chips_are_found_by_their_usual_names(name):
    assert chips.find(name) == "RTX 4090" and chips.peak_flops(name) == 165e12


def test_similar_chip_names_are_told_apart():
    names = ["A100-SXM4-40GB", "A100-SXM4-80GB", "NVIDIA A10", "A10G", "L4", "L40S", "RTX 4070 Ti", "RTX4060"]
    expected = ["A100 40GB", "A100", "A10", "A10G", "L4", "L40S", "RTX 4070 Ti", "RTX 4060"]
    assert [chips.find(name) for name in names] == expected
    assert chips.find("Radeon") is None and len(chips.CHIPS) >= 20


def test_plan_of_this_machine_predicts_peak_memory_and_tokens(dataset, tmp_path):
    """Both programs run on their own, because their peak memory is that of a whole process."""
    shape = (
        "--n_layer=4 --n_head=4 --n_embd=256 --block_size=128 --batch_size=16 --gradient_accumulation_steps=1"
    )
    given = [*shape.split(), f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--max_iters=6"]

    def output(program, *words):
        command = [sys.executable, str(ROOT / program), *given, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    planned = output("plan.py")
    assert "here (" in planned and "fits in" in planned and "run folder: " in planned
    output("train.py", "--eval_interval=2", "--eval_iters=1", "--device=cpu")
    used = max(row.get("peak_memory_bytes", 0) for row in metrics.read(tmp_path / "out"))
    assert float(re.search(r"memory: ([\d.]+) GB", planned)[1]) == pytest.approx(used / 1e9, rel=0.1)


def test_minutes_give_the_tokens(capsys, dataset):
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2"]
    out = said(capsys, *shape, f"--dataset={dataset}", "--minutes=2")
    tokens = int(re.search(r"tokens: ([\d,]+)", out)[1].replace(",", ""))
    rate = int(re.search(r"([\d,]+) tokens/s", out)[1].replace(",", ""))
    assert tokens == pytest.approx(120 * rate, rel=0.01) and "(2.0 minutes) here" in out


def test_too_little_disk_space_is_noted(capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = said(capsys, "--gpu=A100")
    assert "note: checkpoints in out take up to 5.97GB, but 1.00GB is free there" in out
