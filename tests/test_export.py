"""Exported folders give equal logits and text in transformers; unsupported models are rejected."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import export
import train
from nanogpt import ROOT, runtime
from nanogpt.checkpoint import reader
from nanogpt.config import pick_fields, read
from nanogpt.convert import ckpt, hf, hf_export, hf_tokenizer
from nanogpt.errors import UserError
from nanogpt.evaluation import evals, tasks
from nanogpt.evaluation.log_likelihood import Subject
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
    theirs = exported(tmp_path, model := lively(config))
    assert type(theirs).__name__ == "VaultGemmaForCausalLM"
    the_same(model, theirs)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The folder to which transformers copies custom model code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


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
def test_unsupported_models_are_rejected_or_ship_custom_code(config, reason, tmp_path, modules):
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


PROMPTS = ["def f", "import os, sys and more than that", "x"]


@pytest.fixture(params=[True, False], ids=["custom code", "GPT-2"])
def folder_and_model(request, tmp_path, modules, trained_bpe):
    """An exported model with a trained BPE, and the model itself."""
    config = replace(FAST, smear=True, qk_norm=True) if request.param else GPT2
    model = lively(replace(config, vocab_size=1000, block_size=64, vocab_multiple=1))
    (tmp_path / "model").mkdir()
    hf_export.write_folder(tmp_path / "model", model, trained_bpe, "float32", request.param)
    return tmp_path / "model", model, {"trust_remote_code": request.param}


def continuations(model: GPT, tokens, count: int) -> list[list[int]]:
    return [greedy(model, tokens(prompt)["input_ids"], count) for prompt in PROMPTS]


def test_usual_calls_give_the_text_of_our_engine(folder_and_model):
    folder, model, trust = folder_and_model
    theirs = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    tokens = AutoTokenizer.from_pretrained(folder, **trust)
    expected = continuations(model, tokens, 20)
    for prompt, new in zip(PROMPTS, expected, strict=True):
        inputs = tokens(prompt, return_tensors="pt")
        assert set(inputs) == {
            "input_ids",
            "attention_mask",
        }  # GPT-2 embeds token_type_ids
        written = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert written[0, inputs["input_ids"].shape[1] :].tolist() == new
    batch = tokens(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    written = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert written.tolist() == expected
    told = pipeline("text-generation", model=str(folder), **trust)
    found = told(PROMPTS, batch_size=3, max_new_tokens=20, do_sample=False, return_full_text=False)
    assert [one[0]["generated_text"] for one in found] == [tokens.decode(new) for new in expected]
    several = theirs.generate(**inputs, max_new_tokens=5, num_beams=2, num_return_sequences=2)
    assert len(several) == 2


def test_half_precision_generates_and_is_close(folder_and_model):
    folder, model, trust = folder_and_model
    idx = torch.arange(60)[None]
    for dtype in (torch.bfloat16, torch.float16):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **trust).eval()
        assert theirs.dtype == dtype
        assert theirs.generate(idx[:, :9], max_new_tokens=5, do_sample=False).shape == (1, 14)
        with torch.no_grad():
            exact = model(idx)[0]
            assert (theirs(idx).logits.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("padding", ["left", "right", "between"])
def test_masked_tokens_have_no_influence(padding, tmp_path, modules):
    model = lively(replace(FAST, smear=True, vocab_multiple=1))
    theirs = exported(tmp_path / "model", model, custom_code=True)
    idx = torch.randint(0, 256, (2, 20))
    kept = {"left": torch.arange(20) > 6, "right": torch.arange(20) < 13, "between": torch.arange(20) % 3 > 0}
    mask = kept[padding].expand(2, 20).long()
    ids = torch.where(mask.bool(), idx, 999)  # an id beyond the vocabulary, as of a pad token added later
    labels = torch.where(mask.bool(), idx, -100)
    with torch.no_grad():
        expected, _ = model(idx[:, kept[padding]])
        found = theirs(ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(found.logits[:, kept[padding]], expected, rtol=0, atol=1e-5)
        if padding != "between":
            alone = theirs(idx[:, kept[padding]], labels=idx[:, kept[padding]])
            torch.testing.assert_close(found.loss, alone.loss)
        assert torch.equal(theirs(ids, mask, return_dict=False)[0], found.logits)


def test_generation_beyond_the_context_sees_the_last_tokens(tmp_path, modules):
    model = lively(replace(FAST, smear=True, vocab_multiple=1))
    theirs = exported(tmp_path / "model", model, custom_code=True)
    ids = torch.randint(0, 256, (1, 90))
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(110) >= 20).long()[None]
    written = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[0, 110:]
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids[:, -96:])[0][:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids[0, 90:].tolist()


def test_scores_of_lm_evals_hf_model_equal_ours(folder_and_model, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, model, trust = folder_and_model
    rows = [{"q": words(20, seed=i), "c": [words(5, seed=i), words(9, seed=9 * i)]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    about |= {"test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": 0, "doc_to_choice": "{{c}}"}
    about |= {"output_type": "multiple_choice", "task": "own", "metric_list": [{"metric": "acc"}]}
    task = tmp_path / "own.yaml"
    task.write_text(json.dumps(about), encoding="utf-8")
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "batch_size": 4, **trust},
        tasks=[str(task)],
        task_manager=TaskManager(include_defaults=False),
    )
    theirs = [[one[0] for one in row["filtered_resps"]] for row in found["samples"]["own"]]
    own = tokenizer.from_file(folder / hf_export.OWN_TOKENIZER)
    subject = Subject(model, own, runtime.setup("cpu", "float32", 32))
    items = [tasks.Item(row["q"], tuple(row["c"])) for row in rows]
    ours = evals.run_task(tasks.Task("own", "choice", items), subject).rows
    assert len(theirs) == 12
    for one, other in zip(theirs, ours, strict=True):
        assert one == pytest.approx(other["loglikelihoods"], abs=1e-3)


def test_export_drops_padding_and_writes_half_precision(tmp_path):
    model = lively(GPT2)
    assert model.wte.weight.shape[0] == 300
    theirs = exported(tmp_path, model, dtype="bfloat16")
    assert theirs.config.vocab_size == 256 and theirs.lm_head.weight.shape[0] == 256
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_weights_beyond_float16_are_rejected(tmp_path):
    model = lively(GPT2)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 3] = 1e5
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight has values beyond the range of float16"):
        hf_export.write_folder(tmp_path, model, BYTES, "float16", False)
    assert not any(tmp_path.iterdir())
    hf_export.write_folder(tmp_path, model, BYTES, "bfloat16", False)


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
    about = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert name != "plain" or about["n_ctx"] == about["n_positions"] == 80  # read by llama.cpp's converter


@pytest.mark.parametrize("custom_code", [True, False])
def test_model_card_has_the_numbers_of_the_run(custom_code, run, tmp_path, modules, monkeypatch, capsys):
    target = tmp_path / "exported"
    export.main(export.Config(to=str(target), out_dir=str(run / "plain"), custom_code=custom_code))
    found, _ = reader.find(run / "plain", "best")
    card = (target / "README.md").read_text(encoding="utf-8")
    loss, tokens = found.progress.val_loss, found.iter_num * 12 * 80
    for line in (
        f"| parameters | {found.load_model().n_params():,} |",
        "| layers, heads, channels | 2, 2, 32 |",
        "| context | 80 tokens |",
        "| trained on | `mine` |",
        f"| iterations | {found.iter_num} |",
        f"| tokens read | {tokens:,} |",
        f"| validation loss | {loss:.4f} nats/token, perplexity {math.exp(loss):.2f} |",
    ):
        assert line in card
    assert ("trust_remote_code=True" in card) == custom_code == ("NanoGPTForCausalLM" in card)
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert len(capsys.readouterr().out) > 50


def examples() -> list[str]:
    guide = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    return re.findall(r"python export\.py (--out_dir\S+ .*?)(?: +#.*)?\n", export.__doc__ + guide)


@pytest.mark.parametrize("example", examples())
def test_examples_fit_the_presets_that_write_these_folders(example):
    given = export.Config(**read(export.Config, example.split()).values)
    shapes = []
    for path in sorted((ROOT / "config").glob("*.py")):
        options = train.Config(**read(train.Config, [str(path)]).values)
        if options.out_dir == given.out_dir and not path.name.startswith("eval"):
            shapes.append(pick_fields(GPTConfig, options, vocab_size=65))
    assert shapes
    for shape in shapes:
        if given.format == "hf":
            hf_export.choose(shape, given.custom_code)
        else:
            ckpt.require(shape, tokenizer.to_text(tokenizer.CharTokenizer("ab")))


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
