"""Tests of network health: planted illnesses are named early, healthy runs are not, and nothing changes."""

import pytest
import torch
from torch.nn import functional as F

import train
from nanogpt import metrics
from nanogpt import model as architecture
from nanogpt.data import loader
from nanogpt.diagnostics import health
from nanogpt.optim import AdamW
from nanogpt.runtime import Machine
from tests.conftest import small_run

FAST = {"optimizer": "muon", "learning_rate": 0.02, "muon_lr": 0.03, "min_lr": 0.0, "warmup_iters": 0}
FAST |= {
    "position": "rope",
    "activation": "relu2",
    "tied": False,
    "softcap": 15.0,
    "init": "zero",
    "smear": True,
}
FAST |= {"grad_clip": 0.0}


def rows_of(dataset, out, **options) -> list[dict]:
    """Train 100 iterations, of which the first 10 are run; return the rows of event "health"."""
    given = {"max_iters": 100, "eval_interval": 100, "eval_iters": 1, "health_interval": 2, "batch_size": 32}
    train.main(small_run(dataset, out, **given | options))
    return [row for row in metrics.read(out) if row["event"] == "health"]


def named(rows: list[dict], before: int = 10) -> set[str]:
    return {kind for row in rows if row["iter"] < before for kind in row["warnings"]}


def unshifted(monkeypatch):
    real = loader.gather

    def gather(*args):
        idx, _, *others = real(*args)
        return idx, idx.clone(), *others

    monkeypatch.setattr(loader, "gather", gather)


def sees_the_future(monkeypatch):
    monkeypatch.setattr(
        architecture, "attention", lambda q, k, v, bias, dropout: F.scaled_dot_product_attention(q, k, v)
    )


def dead_block(monkeypatch):
    def init(self, config, real=architecture.GPT.__init__):
        real(self, config)
        forward = self.h[1].forward
        self.h[1].forward = lambda x, *others: x + 0 * forward(x, *others)

    monkeypatch.setattr(architecture.GPT, "__init__", init)


def decayed_gains(monkeypatch):
    real = AdamW.step

    def step(self, lr):
        real(self, lr)
        for param in self.partitioned:
            if param.parameter.dim() == 1:
                param.parameter.data.mul_(1 - lr * 0.1)

    monkeypatch.setattr(AdamW, "step", step)


def untied_init(monkeypatch):
    real = architecture.INITS["zero"]

    def init(model):
        real(model)
        torch.nn.init.normal_(model.wte.weight, std=1.0)

    monkeypatch.setitem(architecture.INITS, "zero", init)


@pytest.mark.parametrize("recipe", [{}, FAST], ids=["gpt2", "fast"])
@pytest.mark.parametrize(
    ("plant", "kind"),
    [(unshifted, "targets"), (sees_the_future, "mask"), (dead_block, "dead 1"), (decayed_gains, "decay")],
)
def test_planted_illness_is_named_in_the_first_tenth(
    plant, kind, recipe, dataset, tmp_path, monkeypatch, capsys
):
    plant(monkeypatch)
    assert named(rows_of(dataset, tmp_path / "out", **recipe)) >= {kind}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health: ")]
    assert len(said) >= 1 and all("iteration" in line for line in said)


def test_tied_head_with_the_untied_initialization_is_named(dataset, tmp_path, monkeypatch, capsys):
    untied_init(monkeypatch)
    rows = rows_of(dataset, tmp_path / "out", init="zero", tied=True)
    assert named(rows, 1) == {"start"}
    assert "a tied LM head needs small embeddings (--init=gpt2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "kind", "before"),
    [
        ({"learning_rate": 0.02, "n_embd": 64}, "growth", 100),
        (FAST | {"learning_rate": 0.2, "muon_lr": 0.3}, "rise", 10),
    ],
    ids=["gpt2", "fast"],
)
def test_rate_ten_times_too_high_is_named(recipe, kind, before, dataset, tmp_path, capsys):
    """The first 100 iterations of 1,000 for AdamW, the first 10 of 100 for Muon."""
    assert kind in named(rows_of(dataset, tmp_path / "out", **recipe), before)
    assert "lower --learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe",
    [
        {"learning_rate": 5e-3},
        {"norm": "rms", "activation": "swiglu", "position": "alibi", "dropout": 0.1, "n_layer": 3},
        FAST,
        FAST | {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "qk_norm": True, "dtype": "auto"},
    ],
    ids=["gpt2", "alibi", "fast", "wide"],
)
def test_healthy_run_gets_no_warning(recipe, dataset, tmp_path, capsys):
    rows = rows_of(dataset, tmp_path / "out", **recipe)
    assert [row["iter"] for row in rows] == [0, 1, *range(2, 100, 2)]
    assert named(rows, 100) == set(), [row for row in rows if row["warnings"]]
    layers = recipe.get("n_layer", 2)
    for key in ("grad_norm", "update", "activation", "dead", "entropy"):
        assert all(len(row[key]) == layers for row in rows)
    assert "health: " not in capsys.readouterr().out


def test_checks_change_no_weight(dataset, tmp_path):
    found = []
    for interval in (0, 1):
        out = tmp_path / str(interval)
        options = {"max_iters": 12, "eval_iters": 1, "dropout": 0.2, "health_interval": interval}
        train.main(small_run(dataset, out, **options))
        found.append([row["loss"] for row in metrics.read(out) if row["event"] == "step"])
    assert found[0] == found[1]


def test_clipping_is_reported_once_the_run_has_settled(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(health, "SETTLED", 110)
    options = {"max_iters": 130, "health_interval": 20}
    rows = rows_of(dataset, tmp_path / "slightly", grad_clip=0.5, **options)  # changes little with Adam
    assert rows[-1]["iter"] == 120 and rows[-1]["clipped"] > 95 and named(rows, 130) == set()
    rows = rows_of(dataset, tmp_path / "out", grad_clip=0.01, **options)
    assert [row["iter"] for row in rows if row["warnings"]] == [120]
    assert "clipped in 100 of the last 100 steps: lower --learning_rate or raise --grad_clip=0.01" in (
        capsys.readouterr().out
    )


CPU = Machine(torch.device("cpu"), "float32", "for a test")


def test_values_are_those_of_the_definitions():
    torch.manual_seed(0)
    model = architecture.GPT(architecture.GPTConfig(50, 16, 2, 2, 32, init="gpt2"))
    idx = torch.randint(50, (3, 17))
    row = health.examine(model, idx[:, :-1], idx[:, 1:], CPU)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5) and row["leak"] == 0.0
    for block, norm in enumerate(row["grad_norm"]):
        grads = torch.cat([p.grad.flatten() for p in model.h[block].parameters()])
        assert norm == pytest.approx(float(grads.norm()), rel=1e-4)
    assert all(0.99 < value <= 1.0 for value in row["entropy"])  # nearly uniform at the start
    model.h[1].mlp.c_fc.bias.data[:96] = -100.0  # GELU is off
    assert health.examine(model, idx[:, :-1], idx[:, 1:], CPU)["dead"] == [
        0.0,
        pytest.approx(0.75),
    ]


def test_text_that_repeats_a_token_is_not_taken_for_unshifted():
    model = architecture.GPT(architecture.GPTConfig(50, 16, 2, 2, 32))
    idx = torch.full((2, 17), 3)
    idx[0, 9] = 4
    assert health.examine(model, idx[:, :-1], idx[:, 1:], CPU)["copied"] == 0.0
    assert health.examine(model, idx[:, :-1], idx[:, :-1], CPU)["copied"] == 0.0  # nothing tells them apart
    other = torch.arange(34).view(2, 17)
    assert health.examine(model, other[:, :-1], other[:, :-1], CPU)["copied"] == 1.0
