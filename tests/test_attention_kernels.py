"""Kernel selection, prefetched batches, deferred garbage collection, and no device synchronization."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import train
from nanogpt import compile, optim, runtime
from nanogpt.errors import UserError
from nanogpt.evaluation import log_likelihood
from nanogpt.gpu import attention_kernels
from nanogpt.inference import engine, graph_decode
from nanogpt.model import GPT, GPTConfig, attention
from nanogpt.options import OptimizerOptions
from tests.conftest import update

SHAPE = GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=32, vocab_multiple=64)
CPU = runtime.Machine(torch.device("cpu"), "float32", "test")


@pytest.mark.cpu
def test_attention_kernel_is_pinned_and_reported():
    name = partial(attention_kernels.attention_name, SHAPE, CPU, 32)
    with attention_kernels.chosen("math"):
        assert name() == "math"
    with attention_kernels.chosen("flash"):
        assert name() == "flash"
    assert attention_kernels.require_attention("math", SHAPE, CPU) == "math"
    with pytest.raises(
        UserError, match=r"--attention=cudnn: torch .* does not support heads of 16 .*float32"
    ):
        attention_kernels.require_attention("cudnn", SHAPE, CPU)
    grouped = replace(SHAPE, n_kv_head=1)
    assert attention_kernels.require_attention("auto", grouped, CPU, "masked") in attention_kernels.ATTENTION


@pytest.mark.cpu
def test_attention_kernels_agree():
    q, k, v = torch.randn(3, 2, 2, 32, 16, dtype=torch.float64)
    found = []
    for name in ("auto", "math", "flash"):
        with attention_kernels.chosen(name):
            found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.cpu
def test_kernel_choice_is_reset_after_the_run():
    with pytest.raises(KeyboardInterrupt), attention_kernels.chosen("math", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled()
    assert attention_kernels.attention_name(SHAPE, CPU, 32) != "math"


@pytest.mark.parametrize(
    "changes", [{}, {"documents": "masked"}, {"position": "alibi"}, {"n_kv_head": 1}], ids=str
)
def test_training_leaves_cudnn_out_where_it_is_wrong(changes):
    config = train.Config(n_head=2, **changes)
    torch.backends.cuda.enable_cudnn_sdp(True)  # off after an Engine was built in this process
    with attention_kernels.of_a_run(config):
        assert torch.backends.cuda.cudnn_sdp_enabled() is not bool(changes)
    assert torch.backends.cuda.cudnn_sdp_enabled()


SWITCHES = [{}, {"position": "rope", "n_kv_head": 1}, {"position": "alibi"}]


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["engine", "graph", "score", "task"])
@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_inference_never_plans_attention_with_cudnn(changes, kind, monkeypatch):
    """cuDNN takes 0.4 s to plan for each new key length, and each token adds one."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), k.shape[2]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, block_size=256, **changes)).eval()
    ids = [i % 50 for i in range(200)]
    with attention_kernels.chosen():  # restores the switch
        torch.backends.cuda.enable_cudnn_sdp(True)
        if kind == "score":
            engine.score(model, ids)
        elif kind == "task":
            subject = log_likelihood.Subject(model, None, CPU)
            list(log_likelihood.score(subject, log_likelihood.Requests([(ids[:9], ids[9:])], 256)))
        else:
            record = lambda work: (work(), work)  # noqa: E731
            of_kind = {"engine": engine.Engine, "graph": partial(graph_decode.GraphEngine, record=record)}
            decoder = of_kind[kind](model, 2)
            decoder.flat = None  # the path of GPUs
            decoder.add([engine.Text(ids[:40]), engine.Text(ids[:39] + [7] * 9)])  # the second one in chunks
            for _ in range(200):
                decoder.step()
            assert len({length for _, length in seen}) > (1 if kind == "graph" else 100)
    assert seen and not any(enabled for enabled, _ in seen)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("dtype", "biased", "repeated"),
    [(torch.bfloat16, False, False), (torch.bfloat16, True, True), (torch.float16, False, True)],
)
def test_gpus_repeat_grouped_keys_unless_the_flash_kernel_takes_them(dtype, biased, repeated, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **how: seen.append((qkv, how)))
    with FakeTensorMode():
        q, k, bias = (
            torch.empty(s, dtype=dtype, device="cuda") for s in ((1, 4, 8, 16), (1, 2, 8, 16), (8, 8))
        )
        attention(q, k, k, bias if biased else None, 0.0)
    (((_, keys, _), how),) = seen
    assert (keys.shape[1] == 4) is repeated and how["enable_gqa"] is not repeated


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_keys_give_the_same_attention(dtype, monkeypatch):
    q, k, v = torch.randn(2, 4, 8, 16, dtype=dtype), *torch.randn(2, 2, 2, 8, 16, dtype=dtype)
    bias = torch.randn(8, 8, dtype=dtype)
    grouped = attention(q, k, v, bias, 0.0)
    monkeypatch.setattr("nanogpt.model.repeats_kv", lambda *unused: True)
    torch.testing.assert_close(attention(q, k, v, bias, 0.0), grouped)


@pytest.mark.parametrize("casting", ["autocast", "weights"])
def test_both_casting_modes_agree(casting, device):
    torch.manual_seed(0)
    model, idx = GPT(SHAPE), torch.randint(50, (2, 32))
    machine = runtime.Machine(device, "bfloat16", "test", casting=casting)
    residual = []
    model.ln_f.register_forward_hook(lambda module, given, result: residual.append(given[0].dtype))
    logits, loss = machine.in_dtype(model)(idx, idx)
    loss.backward()
    assert residual == [torch.bfloat16 if casting == "weights" else torch.float32]
    torch.testing.assert_close(logits, model(idx)[0], rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("broken", [False, True])
def test_head_and_loss_are_compiled_separately_from_blocks(broken, monkeypatch):
    """With a stand-in compiler that counts calls; a failing one leaves the model unchanged."""
    pieces = []
    monkeypatch.setattr(torch, "compile", lambda piece, dynamic: pieces.append(piece) or piece)
    model, idx = GPT(SHAPE), torch.randint(50, (2, 32))
    logits, expected = model(idx, idx)

    def trial(function):
        function(idx, idx)
        if broken:
            raise RuntimeError("no compiler")

    function, _ = compile.wrap(model, compile="blocks", trial=trial, blocks=model.h, head=model, rows=2)
    found = function(idx, idx)
    assert len(pieces) == 2 * 3 and torch.equal(found[1], expected)
    assert (found[0] is None) is not broken and (model.compiled_loss is None) is broken
    assert torch.equal(model(idx)[0], logits)


# ----------------------------------------------------------------------------- on the device


@pytest.mark.cpu
@pytest.mark.parametrize("rules", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("dtype", "rows", "tables"),
    [("float32", 0, ""), ("bfloat16", 0, ""), ("bfloat16", 20, ""), ("bfloat16", 0, "2,3")],
)
def test_step_never_synchronizes_or_leaves_its_device(rules, dtype, rows, tables, monkeypatch):
    """Tensors on the device "meta" have no values: reading one, or mixing it with a CPU tensor, fails.
    A step that passes therefore never synchronizes a GPU."""
    meta = torch.device("meta")

    def fused(*lists, lr, **unused):  # torch's fused kernel does not support this device
        assert {tensor.device for tensors in lists for tensor in tensors} == {meta}

    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    machine = runtime.Machine(meta, dtype, "test", casting="weights")
    with torch.device("meta"):
        changes = {"position": "rope", "smear": True, "tied": False, "softcap": 15.0, "dropout": 0.1}
        model = GPT(replace(SHAPE, ngram_orders=tables, ngram_rows=99, **changes)).to(meta)
    model.loss_chunk_size = rows
    config = OptimizerOptions(rules, muon_weight_decay=0.1)
    optimizer = optim.build(config, model.named_parameters(), model.part_heights(), torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    idx = torch.zeros(4, 32, dtype=torch.int64, device=meta)
    for lr in (1e-3, torch.zeros((), device=meta)):
        loss, norm = update(model, optimizer, machine, scaler, [(idx, idx)] * 2, lr=lr)
        assert loss.device == norm.device == meta
    with pytest.raises(RuntimeError):
        float(loss)


@pytest.mark.parametrize("rules", ["adamw", "muon"])
def test_learning_rate_may_be_a_device_tensor(rules):
    updated = []
    for lr in (1e-2, torch.tensor(1e-2)):
        torch.manual_seed(0)
        named = [
            ("h.0.a", torch.nn.Parameter(torch.randn(8, 4))),
            ("wte", torch.nn.Parameter(torch.randn(5, 4))),
        ]
        optimizer = optim.build(OptimizerOptions(rules, muon_weight_decay=0.1), named)
        for _ in range(3):
            for _, p in named:
                p.grad = torch.randn(p.shape)
            optimizer.lr = lr
            optimizer.step()
        updated.append([p.detach() for _, p in named])
    for a, b in zip(*updated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------- runs


SPEED = {
    "deterministic": {"deterministic": True},
    "attention": {"attention": "math"},
    "rows": {"loss_chunk_size": 24},
}


@pytest.fixture
def config(dataset, tmp_path, device):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 6}
    sizes |= {"gradient_accumulation_steps": 2, "eval_interval": 3, "eval_iters": 2, "warmup_iters": 2}
    return train.Config(
        out_dir=str(tmp_path / "out"), dataset=str(dataset), device=str(device), dtype="float32", **sizes
    )


@pytest.mark.parametrize("changes", SPEED.values(), ids=SPEED)
def test_performance_options_do_not_change_the_loss(config, changes, capsys):
    runs = []
    for given in ({}, changes):
        train.main(replace(config, overwrite=True, **given))
        out = capsys.readouterr().out
        runs.append(
            [float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines() if "iter " in line[:5]]
        )
    assert len(runs[0]) == 6 and runs[0] == pytest.approx(runs[1], abs=2e-4)
    named = "attention: math" in out
    assert named if "attention" in changes else config.device != "cpu" or not named


@pytest.mark.cpu
def test_cuda_graph_without_gpu_is_a_one_line_error(config):
    with pytest.raises(UserError, match=r"--cuda_graph=True needs a CUDA GPU, and this is cpu; leave"):
        train.main(replace(config, cuda_graph=True))
    with pytest.raises(UserError, match=r"--batch_size=auto splits .* give --batch_tokens, .* such as 7680"):
        train.main(replace(config, batch_size="auto"))
    with pytest.raises(UserError, match="--batch_size=auto needs a CUDA GPU, and this is cpu"):
        train.main(replace(config, batch_size="auto", batch_tokens=160))
