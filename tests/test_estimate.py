"""The estimated memory of a micro-batch equals what torch allocates."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from nanogpt import ROOT, compile
from nanogpt.config import load, pick_fields
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate, scaling
from nanogpt.runtime import Machine

MODERN = {"position": "rope", "norm": "rms", "activation": "relu2", "qk_norm": True, "tied": False}
SWITCHES = [
    {},
    {"bias": True},
    MODERN,
    {"activation": "swiglu"},
    {"vocab_size": 5000, "softcap": 15.0},
    {"vocab_size": 65},
    {"n_kv_head": 2, "position": "rope"},
    {"position": "alibi"},  # CPU kernels store attention scores with an ALiBi bias
    {"position": "alibi", "n_kv_head": 2, "qk_norm": True},
    {"dropout": 0.1},
    {"dropout": 0.1, **MODERN},
    {"dropout": 0.1, "position": "alibi", "activation": "swiglu"},
]
AGAIN = [SWITCHES[i] for i in (0, 2, 3, 4, 5, 7, 9, 10)]
CASES = [(switches, False, 0) for switches in SWITCHES] + [(switches, True, 0) for switches in AGAIN]
CASES += [
    ({"vocab_size": 5000}, False, 256),
    ({"vocab_size": 5000, "softcap": 15.0, "tied": False}, True, 256),
    ({"vocab_size": 20000, **MODERN}, False, 64),
    ({"vocab_size": 20000}, True, 10**6),
]


@pytest.mark.parametrize(("switches", "recompute", "loss_chunk_size"), CASES, ids=str)
def test_estimated_activations_match_torch_allocations(switches, recompute, loss_chunk_size):
    """Peak float32 memory of a second micro-batch, including weights and gradients, within 5%."""
    options = {"vocab_size": 500, "bias": False, **switches}
    shape = GPTConfig(n_layer=4, n_embd=128, n_head=4, block_size=256, **options)
    model, idx = GPT(shape), torch.randint(0, shape.vocab_size, (4, 256))
    model.loss_chunk_size = loss_chunk_size
    if recompute:
        compile.checkpoint_activations(model, Machine(torch.device("cpu"), "float32", ""))
    model(idx, idx)[1].backward()  # gradients exist before the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = model(idx, idx)[1]  # the logits are freed, as in train_step
        loss.backward()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    how = {
        "recompute": recompute,
        "on_cpu": True,
        "loss_chunk_size": loss_chunk_size,
    }
    need = estimate.memory(shape, OptimizerOptions(), 4, number_bytes=4, **how)
    held = need.weights + need.gradients
    assert held + peak == pytest.approx(held + need.activations, rel=0.05)
    assert peak == pytest.approx(need.activations, rel=0.1)


# Peak GB of a step of two micro-batches on one GPU, or of each of two, of torch's own allocator with the null
# GPU (docs/gpu.md, 2026-11-30)
ALLOCATED = [
    ("train_gpt2", 2, 4, True, 1, 1.7382),
    ("train_gpt2", 4, 8, True, 1, 3.1077),
    ("train_gpt2", 4, 8, False, 1, 7.1459),
    ("train_gpt2", 12, 12, True, 1, 7.7354),
    ("train_gpt2", 12, 32, True, 1, 16.7027),
    ("train_gpt2_medium", 24, 8, True, 1, 14.6549),
    ("train_gpt2_medium", 2, 4, True, 1, 2.2757),
    ("train_gpt2_medium", 2, 8, True, 1, 3.0135),
    ("train_gpt2_fast", 2, 8, True, 1, 4.6189),
    ("train_gpt2_fast", 4, 8, True, 1, 5.3535),
    ("train_shakespeare_char", 6, 16, True, 1, 0.6257),
    ("train_gpt3_medium", 24, 8, True, 1, 22.8116),
    ("train_gpt2", 12, 12, True, 2, 7.7413),
    ("train_gpt2_medium", 24, 8, True, 2, 14.6555),
    ("train_gpt2_fast", 12, 16, True, 1, 13.9900),
    ("train_gpt2_fast", 12, 16, True, 2, 13.8626),
]


@pytest.mark.parametrize(("preset", "layers", "rows", "compiled", "gpus", "gigabytes"), ALLOCATED)
def test_estimated_memory_of_gpus_matches_the_allocator(preset, layers, rows, compiled, gpus, gigabytes):
    then = ["--activation=relu2", "--dropout=0.1"] if preset == "train_shakespeare_char" else []
    config, _ = load(train.Config, [str(ROOT / "config" / f"{preset}.py"), f"--n_layer={layers}", *then])
    shape = pick_fields(GPTConfig, config, vocab_size=65 if "char" in preset else 50257)
    options = pick_fields(scaling.ClusterOptions, config)
    need = scaling.memory(shape, options, "ddp", gpus, [rows, rows], compiled=compiled)
    assert need.total / 1e9 == pytest.approx(gigabytes, rel=0.05)
