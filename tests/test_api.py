"""The Python API, and the code of its documentation page."""

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanogpt
from nanogpt import runtime
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.tokenizer import tokenizer, vocabulary
from tests import hf_folders
from tests.test_sample import trained  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return nanogpt.load(trained, device="cpu")


def test_generate_accepts_one_or_many_prompts_and_samples(model):
    one = model.generate("ab", max_new_tokens=30)
    assert isinstance(one, str) and len(one) == 30
    several = model.generate("ab", max_new_tokens=30, num_samples=3)
    assert several[0] == one and len(set(several)) == 3
    many = model.generate(["ab", "d"], max_new_tokens=30)
    assert many[0] == one and isinstance(many[1], str)
    assert model.generate(["ab", "d"], max_new_tokens=30, num_samples=3)[0] == several
    assert model.generate("ab", max_new_tokens=30, seed=1338) == several[1]
    assert "".join(model.stream("ab", max_new_tokens=30)) == one


def test_default_prompts_without_line_breaks_are_the_first_character(model):
    dna = replace(model, open_tokenizer=lambda: tokenizer.CharTokenizer("ACGT"))
    assert dna.encode("\n") == dna.encode("") == [0] and dna.encode("GA") == [2, 0]
    with pytest.raises(UserError, match="cannot be encoded: not in the vocabulary of 4 characters"):
        dna.encode("A\n")


def test_sampling_options_reach_the_sampler(model):
    greedy = model.generate("ab", max_new_tokens=40, temperature=0)
    for same in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert model.generate("ab", max_new_tokens=40, **same) == greedy
    assert model.generate("ab", max_new_tokens=40, temperature=0, repetition_penalty=1e6) != greedy
    assert model.generate("ab", max_new_tokens=40, temperature=0, stop=greedy[3:6]) in greedy[:6]


def test_score_equals_the_cross_entropy(model):
    text = "abc def gab"
    score = model.score(text)
    ids = torch.tensor([model.encode(text)])
    _, loss = model.model(ids[:, :-1], ids[:, 1:])
    assert score.tokens == list(text[1:])
    assert score.total == pytest.approx(-loss.item() * (len(text) - 1), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert math.isnan(model.score("a").perplexity)
    long = model.score(text * 9)  # beyond the context of 16
    assert len(long.logprobs) == 9 * len(text) - 1 and long.logprobs[:10] == pytest.approx(score.logprobs)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reduced_precision_changes_the_loss_by_less_than_0_01(trained, model, dtype):  # noqa: F811
    from tests.conftest import words

    text = words(1800)[-1500:]
    smaller = nanogpt.load(trained, device="cpu", dtype=dtype)
    loss, exact = (-m.score(text).total / (len(text) - 1) for m in (smaller, model))
    assert abs(loss - exact) < 0.01
    assert len(smaller.generate("ab", max_new_tokens=40)) == 40


def test_invalid_loads_and_writes_are_rejected(model, trained, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="no such file or folder"):
        nanogpt.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype=int4 given"):
        nanogpt.load(tmp_path, dtype="int4")
    monkeypatch.setattr(runtime, "find_device", lambda name: torch.device("meta"))
    with pytest.raises(UserError, match="int8 weights require a CPU, but the device is meta"):
        nanogpt.load(trained, dtype="int8")
    monkeypatch.undo()
    for wrong, message in [
        ({"temperature": -1}, "temperature=-1"),
        ({"stop": ""}, "a stop string is empty"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            model.generate("a", **wrong)
    with pytest.raises(UserError, match="'Z'"):
        model.generate("aZ")


def test_loads_a_hugging_face_folder(merges, tmp_path):
    folder = hf_folders.write(tmp_path / "gpt2", merges=merges, vocab_size=vocabulary.GPT2_VOCAB_SIZE)
    model = nanogpt.load(folder, device="cpu", dtype="float32")
    ids = model.encode("Hello")
    text = model.generate("Hello", max_new_tokens=5, temperature=0)
    for _ in range(5):
        ids.append(int(model.model(torch.tensor([ids]))[0][:, -1].argmax()))
    assert text == model.decode(ids[len(model.encode("Hello")) :])


def test_documentation_code_runs(trained, tmp_path):  # noqa: F811
    shutil.copytree(trained, tmp_path / "out-shakespeare-char")
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    script = "\n".join(blocks).replace("To be, or not to be", "abc def").replace("To be", "abc")
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_importing_the_package_is_cheap():
    code = "import sys, nanogpt; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        nanogpt.nothing_of_this_name  # noqa: B018


def test_methods_of_nanogpts_class(trained):  # noqa: F811
    model = GPT.from_pretrained(str(trained))
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.get_num_params() == model.n_params(lookup_tables=False) <= model.get_num_params(False)
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.manual_seed(3)
    one = model.generate(idx, 40, temperature=0.8, top_k=5)
    torch.manual_seed(3)
    assert torch.equal(one, model.generate(idx, 40, temperature=0.8, top_k=5)) and model.training
    assert one.shape == (2, 43) and torch.equal(one[:, :3], idx) and one.max() < model.config.vocab_size
    greedy = model.eval().generate(idx, 3, temperature=0)
    assert greedy[0, 3] == model(idx)[0][0, -1].argmax()
