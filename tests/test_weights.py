"""--init_from through the programs: pretrained weights are finetuned and sampled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from nanogpt import optim
from nanogpt.checkpoint import reader
from nanogpt.convert import weights
from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.runtime import setup
from nanogpt.tokenizer import tokenizer, vocabulary
from nanogpt.validation import evaluate_splits
from tests import hf_folders
from tests.conftest import words, write_dataset
from tests.test_ckpt import ARGS, CHARACTERS, nanogpts, nanogpts_logits, write_ckpt


@pytest.fixture
def gpt2(tmp_path) -> Path:
    return hf_folders.write(tmp_path / "gpt2-folder", n_positions=24)


@pytest.fixture
def config(bare_tokens, tmp_path):
    """A config for finetuning on GPT-2 tokens, without options for the model shape."""
    return train.Config(
        out_dir=str(tmp_path / "out"),
        dataset=str(bare_tokens),
        device="cpu",
        batch_size=2,
        gradient_accumulation_steps=1,
        max_iters=3,
        eval_interval=2,
        eval_iters=2,
        decay_lr=False,
        learning_rate=1e-3,
    )


def opened(name: Path | str, run: Path = Path("nowhere")):
    return weights.open_weights(str(name), Path("nowhere"), run)


def test_finetuning_starts_from_the_weights_and_resumes(config, gpt2, tmp_path, capsys):
    config = replace(config, init_from=str(gpt2), dropout=0.1, verbose=True)
    train.main(config)
    out = capsys.readouterr().out
    assert f"n_layer = 2  ({gpt2})" in out and "bias = True" in out
    found, _ = reader.find(Path(config.out_dir))
    shape = opened(gpt2).fitted(vocab_multiple=64, dropout=0.1)
    assert found.model_config == shape and shape.block_size == 24 and shape.padded_vocab_size == 50304

    start = opened(gpt2)
    before, after = start.load(start.fitted()), found.load_model()
    moved = (before.h[0].mlp.c_fc.weight - after.h[0].mlp.c_fc.weight).abs().max()
    assert 0 < moved < 0.01  # three steps of lr 1e-3, not a different model

    train.main(replace(config, init_from="resume", max_iters=5), {"max_iters": "given", "init_from": "given"})
    assert reader.find(Path(config.out_dir))[0].iter_num == 5
    with pytest.raises(UserError, match="no checkpoint"):
        train.main(replace(config, init_from="resume", out_dir=str(tmp_path / "other")))


def test_eval_only_on_pretrained_weights_writes_nothing(config, gpt2, capsys, monkeypatch):
    built, build = [], optim.build
    monkeypatch.setattr(optim, "build", lambda *given: built.append(build(*given)) or built[-1])
    train.main(replace(config, init_from=str(gpt2), eval_only=True))
    assert {tensor.device.type for tensor in built[0].state().values()} == {"meta"}  # allocates no memory
    start = opened(gpt2)
    dataset = loader.load(Path(config.dataset))
    machine = setup("cpu", "auto", 16)
    model = start.load(start.fitted())
    expected, _ = evaluate_splits(model, dataset, (2, 24), 2, machine, lambda: False)
    assert f"train loss {expected.loss:.4f}" in capsys.readouterr().out
    assert not Path(config.out_dir).exists()


def test_block_size_crops_the_context(config, gpt2):
    train.main(replace(config, init_from=str(gpt2), block_size=16))
    found, _ = reader.find(Path(config.out_dir))
    assert found.model_config.block_size == 16
    with pytest.raises(UserError, match=r"block_size=32 exceeds the 24 of"):
        train.main(replace(config, init_from=str(gpt2), block_size=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "n_layer=3 given, n_layer=2 in the weights"),
        ({"softcap": 15.0}, "softcap=15.0 given, softcap=0.0 in the weights"),
        ({"position": "rope", "tied": False}, "position=learned in the weights; tied=False given"),
        ({"activation": "gelu"}, "activation=gelu given, activation=gelu_tanh in the weights"),
        ({"init": "zero"}, "init=zero given"),
        ({"init_from": "no/such/place"}, "no such file or folder"),
    ],
)
def test_options_that_contradict_the_weights_are_rejected(change, message, config, gpt2):
    with pytest.raises(UserError, match=message) as caught:
        train.main(replace(config, **{"init_from": str(gpt2), **change}))
    assert "\n" not in str(caught.value)
    assert not Path(config.out_dir).exists()


def test_dataset_with_another_tokenizer_is_rejected(config, gpt2, dataset):
    with pytest.raises(UserError, match=r"was trained with another tokenizer \(50257 ids\) than "):
        train.main(replace(config, init_from=str(gpt2), dataset=str(dataset), block_size=16))


def test_model_without_tokenizer_accepts_data_of_its_vocab_size(config, dataset, tmp_path, capsys):
    """A model with 10 ids and no tokenizer is assumed to use that of the data, which has 10 ids too."""
    ids = len(set(words(1800)))
    folder = hf_folders.write(tmp_path / "ten", vocab_size=ids, n_positions=24)
    config = replace(config, init_from=str(folder), dataset=str(dataset))
    train.main(config)
    with pytest.raises(UserError, match=r"the tokenizer of .* is unknown"):
        sample.main(sample.Config(init_from=str(folder), device="cpu"))
    sample.main(sample.Config(out_dir=config.out_dir, device="cpu", num_samples=1, max_new_tokens=5))
    assert capsys.readouterr().out.endswith("-" * 15 + "\n")


def test_run_folder_includes_the_merges(config, merges, monkeypatch, tmp_path, capsys):
    """A run finetuned from a folder with merges.txt decodes text without a cache or network access."""
    ids = vocabulary.GPT2_VOCAB_SIZE
    folder = hf_folders.write(tmp_path / "hf", merges=merges, vocab_size=ids, n_positions=24)
    for split in ("train", "val"):
        path = Path(config.dataset) / f"{split}.bin"
        (np.fromfile(path, "<u2") % ids).tofile(path)
    train.main(replace(config, init_from=str(folder)))
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "empty"))
    sample.main(
        sample.Config(
            out_dir=config.out_dir, start="Hello there", device="cpu", num_samples=2, max_new_tokens=4
        )
    )
    assert capsys.readouterr().out.count("Hello there") == 2


# ----------------------------------------------------------------------------- nanoGPT and own checkpoints


def test_nanogpt_checkpoint_is_sampled(tmp_path, capsys):
    path = write_ckpt(tmp_path / "out-nano")
    for name in (path, path.parent):
        sample.main(
            sample.Config(
                init_from=str(name),
                start="abc",
                num_samples=1,
                max_new_tokens=8,
                temperature=0.0,
                device="cpu",
            )
        )
        text = capsys.readouterr().out.split("\n" + "-" * 15)[0]
        ids = [CHARACTERS.index(character) for character in "abc"]
        for _ in range(8):
            logits = nanogpts_logits(nanogpts(ARGS), ARGS, torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
        assert text == "".join(CHARACTERS[i] for i in ids)


def test_finetuning_a_nanogpt_checkpoint_and_an_own_run(tmp_path, config):
    """nanoGPT's ckpt.pt -> a run -> another run, with the same character vocabulary."""
    path = write_ckpt(tmp_path / "out-nano")
    characters = "".join(np.random.default_rng(0).choice(CHARACTERS, 3000))
    data = write_dataset(tmp_path / "mine", "".join(CHARACTERS) + characters)
    config = replace(config, dataset=str(data), learning_rate=0.0)
    first = replace(config, init_from=str(path), out_dir=str(tmp_path / "first"))
    train.main(first)
    for name in (first.out_dir, reader.find(Path(first.out_dir))[0].path):
        second = replace(config, init_from=str(name), out_dir=str(tmp_path / "second"), overwrite=True)
        train.main(second)
        model = reader.find(Path(second.out_dir))[0].load_model()
        assert model.config.activation == "gelu"
        idx = torch.randint(0, 11, (2, 16))
        torch.testing.assert_close(model(idx)[0], nanogpts_logits(nanogpts(ARGS), ARGS, idx))


def test_paths_without_weights_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        opened(tmp_path)
    folder = hf_folders.write(tmp_path / "hf", vocab_size=300)
    with pytest.raises(UserError, match="is a single file of a model; give its folder"):
        opened(folder / "model.safetensors")
    with pytest.raises(UserError, match="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder"):
        opened("gpt3")


def test_run_without_its_tokenizer_is_rejected(tmp_path, dataset):
    config = train.Config(
        out_dir=str(tmp_path / "out"), dataset=str(dataset), device="cpu", max_iters=1, eval_iters=1,
        n_layer=1, n_head=1, n_embd=8, block_size=8, gradient_accumulation_steps=1, warmup_iters=0,
    )  # fmt: skip
    train.main(config)
    path = tmp_path / "out" / "tokenizer.json"
    path.write_text(tokenizer.to_text(tokenizer.ByteTokenizer()), encoding="utf-8")
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was trained with"):
        opened("resume", tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        opened(tmp_path / "out")
