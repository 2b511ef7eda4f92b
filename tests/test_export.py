"""Exported folders give equal logits and text in transformers; unsupported models are rejected."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import export
import train
from nanogpt.checkpoint import reader
from nanogpt.convert import hf, hf_export, hf_tokenizer
from nanogpt.errors import UserError
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.gpt2 import load_gpt2
from tests import hf_folders, texts
from tests.conftest import found, words, write_dataset

GPT2 = GPTConfig(256, 96, 3, 4, 32, vocab_multiple=100)
FAST = replace(GPT2, bias=False, position="rope", activation="relu2", tied=False, softcap=15.0)
BYTES = tokenizer.to_text(tokenizer.ByteTokenizer())


def lively(config: GPTConfig) -> GPT:
    """Return a model in which every weight matters: all are distinct, none is 0 or 1."""
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def exported(folder: Path, model: GPT, text: str = BYTES, custom_code: bool = False, dtype: str = "float32"):
    folder.mkdir(exist_ok=True)
    hf_export.write_folder(folder, model, text, dtype, custom_code)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=custom_code).eval()


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    text = Text(prompt, SamplingOptions(temperature=0))
    decoder = Engine(model, 1)
    decoder.add([text])
    for _ in range(count):
        decoder.step()
    return text.new


@torch.no_grad()
def the_same(model: GPT, theirs) -> None:
    """Assert equal logits (to 1e-4) over the full context and equal 64 greedy tokens."""
    idx = torch.randint(0, model.config.vocab_size, (2, model.config.block_size))
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-4)
    prompt = idx[:1, :9]
    written = theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 9:].tolist()
    assert written == greedy(model, prompt[0].tolist(), 64)
    assert len(set(written)) > 3  # the output is not constant


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        replace(GPT2, bias=False),
        replace(GPT2, tied=False, activation="gelu"),
        replace(GPT2, activation="relu2"),
    ],
    ids=str,
)
def test_gpt2_shapes_export_as_gpt2(config, tmp_path):
    model = lively(config)
    theirs = exported(tmp_path, model)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    the_same(model, theirs)


@pytest.mark.parametrize(
    "config",
    [
        FAST,
        replace(FAST, softcap=0.0, tied=True),
        replace(FAST, norm="rms", activation="swiglu", n_kv_head=2, head_dim=12),
    ],
    ids=str,
)
def test_fast_recipe_exports_as_vaultgemma(config, tmp_path):
    model = lively(config)
    theirs = exported(tmp_path, model)
    assert type(theirs).__name__ == "VaultGemmaForCausalLM"
    the_same(model, theirs)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(FAST, qk_norm=True), "VaultGemmaForCausalLM does not support qk_norm=True"),
        (replace(FAST, smear=True), "VaultGemmaForCausalLM does not support smear=True"),
        (replace(FAST, ngram_orders="2,3"), "VaultGemmaForCausalLM does not support ngram_orders=2,3"),
        (replace(GPT2, position="alibi"), "GPT2LMHeadModel does not support position=alibi"),
        (replace(GPT2, softcap=30.0), "GPT2LMHeadModel does not support softcap=30.0"),
    ],
)
def test_unsupported_models_are_rejected_or_ship_custom_code(config, reason, tmp_path, monkeypatch):
    # folder to which transformers copies custom model code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(UserError, match="no transformers class computes this model") as caught:
        hf_export.choose(config, custom_code=False)
    assert reason in str(caught.value) and "--custom_code=True" in str(caught.value)
    model = lively(config)
    theirs = exported(tmp_path / "exported", model, custom_code=True)
    assert "transformers_modules" in type(theirs).__module__
    for path in (tmp_path / "exported").glob("*.py"):  # nothing that needs this project to be installed
        assert not re.search(r"(?m)^\s*(from|import) nanogpt", path.read_text(encoding="utf-8")), path.name
    the_same(model, theirs)
    idx = torch.randint(0, 256, (2, 20))
    labels = idx.clone()
    labels[:, :5] = -100
    expected = torch.nn.functional.cross_entropy(model(idx)[0][:, 4:-1].flatten(0, 1), idx[:, 5:].flatten())
    torch.testing.assert_close(theirs(idx, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="pad on the right"):
        theirs(idx, attention_mask=(torch.arange(20) > 3).expand(2, 20))


def test_export_drops_padding_and_writes_half_precision(tmp_path):
    model = lively(GPT2)
    assert model.wte.weight.shape[0] == 300
    theirs = exported(tmp_path, model, dtype="bfloat16")
    assert theirs.config.vocab_size == 256 and theirs.lm_head.weight.shape[0] == 256
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_bit_identical(bias, tmp_path):
    """nanogpt -> Hugging Face -> nanogpt, also via save_pretrained of transformers."""
    model = lively(replace(GPT2, bias=bias, vocab_multiple=1))
    theirs = exported(tmp_path / "a", model)
    theirs.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = hf.open_folder(folder)
        assert found.config == model.config
        again = found.load(found.fitted())
        for (name, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(before, after), name
    assert hf.open_folder(tmp_path / "a").tokenizer == BYTES


def test_hugging_face_round_trip_is_bit_identical(tmp_path):
    from safetensors.torch import load_file

    found = hf.open_folder(hf_folders.write(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    hf_export.write_folder(tmp_path / "b", found.load(found.fitted(vocab_multiple=64)), "", "float32", False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ----------------------------------------------------------------------------- tokenizers

ODD = "naïve café, 中文 \u2028 line\r\n\ttab  two 🙂🏽 e\u0301 \x00 'll don't 1234 <|x|>"


PLAIN = [ODD, texts.python_sources(20_000), "".join(texts.languages().values())]
REAL = map(found, ("tinyshakespeare.txt", "odd/many_scripts_udhr.txt"))
PLAIN += [path.read_text(encoding="utf-8")[:20_000] for path in REAL if path]


def the_same_ids(tokens: tokenizer.Tokenizer, folder: Path, bodies: list[str]):
    """Assert that transformers' tokenizer of an exported folder gives equal ids and text; return it."""
    exported(
        folder,
        GPT(replace(GPT2, vocab_size=tokens.vocab_size, vocab_multiple=1)),
        tokenizer.to_text(tokens),
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokens.vocab_size
    for text in bodies:
        ids = tokens.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokens.end_of_text
    assert AutoConfig.from_pretrained(folder).eos_token_id == tokens.end_of_text
    return theirs


@pytest.mark.parametrize("kind", ["byte", "char", "trained"])
def test_exported_tokenizers_give_the_same_ids(kind, tmp_path, trained_bpe):
    chars = tokenizer.CharTokenizer(sorted(set("".join(PLAIN))))
    trained = tokenizer.from_text(trained_bpe)
    the_same_ids(
        {"byte": tokenizer.ByteTokenizer(), "char": chars, "trained": trained}[kind], tmp_path, PLAIN
    )


def test_exported_gpt2_tokenizer_gives_the_same_ids(tmp_path, merges):
    tokens = load_gpt2(str(merges))
    theirs = the_same_ids(tokens, tmp_path / "exported", PLAIN)
    prompt = "a<|endoftext|>b"
    assert theirs(prompt)["input_ids"] == tokens.encode_prompt(prompt)
    assert (tmp_path / "exported" / "merges.txt").read_bytes() == merges.read_bytes()
    if (encoder := merges.parent / "encoder.json").is_file():
        vocabulary = json.loads((tmp_path / "exported" / "vocab.json").read_text(encoding="utf-8"))
        assert vocabulary == json.loads(encoder.read_text(encoding="utf-8"))


def test_hugging_face_tokenizer_is_exported_unchanged(tmp_path):
    """A custom vocabulary is a tokenizer.json of the tokenizers library, under another file name."""
    made = hf_tokenizer.build(tokenizer.ByteTokenizer())
    made.add_special_tokens(["<|end|>"])
    own = SimpleNamespace(
        kind="hf", vocab_size=257, end_of_text=256, to_json=lambda: json.loads(made.to_str())
    )
    hf_tokenizer.write(tmp_path, own)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("é<|end|>")["input_ids"] == [195, 169, 256] and theirs.eos_token_id == 256


def test_tokenizers_without_an_equivalent_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="which UTF-8 cannot encode"):
        hf_tokenizer.build(tokenizer.CharTokenizer(["a", "\ud800"]))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = hf_export.write_folder(tmp_path, GPT(GPT2), BYTES, "float32", False)
    assert "no Hugging Face tokenizer written" in said[-1] and "pip install tokenizers" in said[-1]


# ----------------------------------------------------------------------------- export.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dataset = write_dataset(folder / "mine", words(1800))
    common = {
        "dataset": str(dataset),
        "device": "cpu",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 80,
    }
    common |= {"gradient_accumulation_steps": 1, "max_iters": 30, "learning_rate": 1e-2, "warmup_iters": 5}
    train.main(train.Config(out_dir=str(folder / "plain"), activation="gelu", **common))
    fast = {"position": "rope", "activation": "relu2", "tied": False, "softcap": 15.0, "init": "zero"}
    train.main(train.Config(out_dir=str(folder / "fast"), optimizer="muon", **common, **fast))
    return folder


@pytest.mark.parametrize("name", ["plain", "fast"])
def test_exports_a_trained_run(name, run, tmp_path, capsys):
    target = tmp_path / "exported"
    export.main(export.Config(to=str(target), out_dir=str(run / name)))
    assert f"to {target}\n" in capsys.readouterr().out
    found, _ = reader.find(run / name, "best")
    model, theirs = found.load_model(), AutoModelForCausalLM.from_pretrained(target).eval()
    the_same_as_trained = torch.randint(0, model.config.vocab_size, (2, 80))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(the_same_as_trained).logits, model(the_same_as_trained)[0], rtol=0, atol=1e-4
        )
    tokens = AutoTokenizer.from_pretrained(target)
    prompt = tokens("abc d", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=64, do_sample=False)[0, 5:].tolist()
    assert written == greedy(model, prompt["input_ids"][0].tolist(), 64)
    assert (target / "generation_config.json").is_file()


def test_exports_nanogpt_format(run, tmp_path, capsys):
    export.main(export.Config(to=str(tmp_path / "a"), out_dir=str(run / "plain"), format="nanogpt"))
    assert "no optimizer state" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"ckpt.pt", "meta.pkl"}
    export.main(export.Config(to=str(tmp_path / "b"), init_from=str(tmp_path / "a")))
    found, _ = reader.find(run / "plain", "best")
    model, theirs = found.load_model(), AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    idx = torch.randint(0, model.config.vocab_size, (2, 80))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "nanogpt"},
            r"nanoGPT does not support position=rope, activation=relu2, tied=False, softcap",
        ),
        ({"format": "nanogpt", "custom_code": True}, "--dtype and --custom_code require --format=hf"),
        (
            {"init_from": "nowhere"},
            r"--init_from=nowhere: no such file or folder; give resume",
        ),
        ({"out_dir": "nowhere"}, "no checkpoint in nowhere"),
        ({"which": "7"}, "no checkpoint '7'"),
    ],
)
def test_rejected_exports_write_nothing(change, message, run, tmp_path):
    config = export.Config(to=str(tmp_path / "exported"), out_dir=str(run / "fast"))
    with pytest.raises(UserError, match=message):
        export.main(replace(config, **change))
    assert not any(tmp_path.iterdir())


def test_existing_folder_is_not_overwritten(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="give the name of a new folder"):
        export.main(export.Config(to=str(tmp_path), out_dir=str(run / "plain")))
    (tmp_path / "empty").mkdir()
    export.main(export.Config(to=str(tmp_path / "empty"), out_dir=str(run / "plain")))
    assert (tmp_path / "empty" / "config.json").is_file()
