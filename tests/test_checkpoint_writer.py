"""Background checkpoints equal blocking ones, and their errors are reported."""

import threading
from types import SimpleNamespace

import pytest
import torch

from nanogpt import checkpoint, files
from nanogpt.checkpoint import reader
from nanogpt.checkpoint import writer as writer_module
from nanogpt.checkpoint.writer import AsyncCheckpointer, Snapshot
from nanogpt.errors import Diverged
from nanogpt.gpu import host_copies
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import build
from nanogpt.options import OptimizerOptions

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG)


@pytest.fixture
def optimizer(model):
    state = build(OptimizerOptions(), model.named_parameters()).state()
    for tensor in state.values():
        tensor.normal_()
    return state


def state(step):
    return {"iter_num": step, "val_loss": None}


@pytest.fixture
def gate(monkeypatch):
    """Event that blocks every write until set; `gate.begun` is set when a write reaches it."""
    gate, sync = threading.Event(), files.sync
    gate.begun = threading.Event()

    def held(path):
        gate.begun.set()
        assert gate.wait(10)
        sync(path)

    monkeypatch.setattr(files, "sync", held)
    yield gate
    gate.set()


def test_training_during_a_write_does_not_change_the_files(tmp_path, model, optimizer, gate):
    writer = AsyncCheckpointer()
    gate.set()
    Snapshot.of(model, optimizer, state(3)).write(tmp_path / "blocking")
    gate.clear()
    writer.save(tmp_path / "background", model, optimizer, state(3))
    with torch.no_grad():  # the next update, while the write is pending
        for tensor in [*model.parameters(), *optimizer.values()]:
            tensor.add_(1.0)
    assert (
        gate.begun.wait(10)
        and writer.pop_completed() == []
        and checkpoint.step_folders(tmp_path / "background") == []
    )
    gate.set()
    writer.wait()
    assert (
        writer.pop_completed() == [tmp_path / "background" / "step-000003"] and writer.pop_completed() == []
    )
    for path in (tmp_path / "blocking" / "step-000003").iterdir():
        assert path.read_bytes() == (tmp_path / "background" / "step-000003" / path.name).read_bytes()


def test_one_write_at_a_time_and_the_old_checkpoint_is_kept(tmp_path, model, optimizer, gate):
    writer = AsyncCheckpointer()
    gate.set()
    writer.save(tmp_path, model, optimizer, state(1))
    writer.wait()
    gate.clear()
    writer.save(tmp_path, model, optimizer, state(2))
    assert gate.begun.wait(10)
    assert reader.find(tmp_path)[0].iter_num == 1  # what a kill at this moment would leave
    third = threading.Thread(target=writer.save, args=(tmp_path, model, optimizer, state(3)))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # it waits for the second
    gate.set()
    third.join(10)
    writer.wait()
    assert [path.name for path in writer.pop_completed()] == ["step-000001", "step-000002", "step-000003"]
    assert reader.find(tmp_path)[0].iter_num == 3


def test_thread_error_is_raised_once_on_wait(tmp_path, model, optimizer, monkeypatch):
    writer = AsyncCheckpointer()
    writer.save(tmp_path, model, optimizer, state(1))
    writer.wait()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        for wait in (writer.wait, lambda: writer.save(tmp_path, model, optimizer, state(3))):
            writer.save(tmp_path, model, optimizer, state(2))
            writer.close()
            assert writer.failed
            with pytest.raises(OSError, match="No space left"):
                wait()
            assert not writer.failed
    assert reader.find(tmp_path)[0].iter_num == 1
    writer.save(tmp_path, model, optimizer, state(3))
    writer.wait()
    assert reader.find(tmp_path)[0].iter_num == 3


def test_non_finite_weights_are_rejected_before_writing(tmp_path, model, optimizer):
    with torch.no_grad():
        model.wte.weight[0, 0] = torch.nan
    with pytest.raises(Diverged, match="non-finite weights at iteration 5"):
        AsyncCheckpointer().save(tmp_path, model, optimizer, state(5))
    assert not list(tmp_path.iterdir())


def test_writes_synchronously_if_memory_is_short(tmp_path, model, optimizer, monkeypatch):
    monkeypatch.setattr(writer_module, "free_memory", lambda: 1 << 20)
    writer = AsyncCheckpointer()
    writer.save(tmp_path, model, optimizer, state(1))
    assert writer.pop_completed() == [tmp_path / "step-000001"]


def test_free_memory_is_at_most_that_of_the_machine():
    free = writer_module.free_memory()
    assert free is None or 1 << 20 < free < 1 << 46


@pytest.mark.parametrize("fails", [False, True])
def test_pinned_memory_is_as_large_as_the_checkpoint(model, optimizer, fails, monkeypatch):
    """torch's pinned allocator would round each tensor up to a power of two."""
    calls = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *given: calls.append(given) or (2 if fails else 0),
        cudaHostUnregister=lambda *given: calls.append(given) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def zeros(*size, device):
        calls.append(device)
        raise RuntimeError("an error of the call before, which torch reports with the next kernel")

    monkeypatch.setattr(torch, "zeros", zeros)
    tensors = [*model.parameters(), *optimizer.values(), torch.randn(3, 5).bfloat16().T]
    copies, size = host_copies.HostCopies(), sum(tensor.nbytes for tensor in tensors)
    for _ in range(2):
        for copied, tensor in zip(copies.copy(tensors), tensors, strict=True):
            assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr()
            tensor.data.add_(1)  # as training continues
    (start, pinned, _), *cleared = calls
    assert cleared == ["cuda"] * fails
    assert size <= pinned <= size + host_copies.ALIGNED * len(tensors) and start == copies.buffer.data_ptr()
    del copies
    assert calls[1:] == (["cuda"] if fails else [(start,)])
