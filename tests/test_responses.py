"""Prompts and responses: the loss covers only response tokens and end_of_text."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from nanogpt.data import loader, responses
from nanogpt.errors import UserError
from nanogpt.model import GPT, IGNORE, GPTConfig
from nanogpt.prepare import corpus
from nanogpt.tokenizer import tokenizer
from tests.conftest import words


def rows(count: int) -> list[dict[str, str]]:
    texts = words(6 * count).split("\n")
    return [{"prompt": text[:9] + "?\r\n", "response": " " + text[9:]} for text in texts if len(text) > 12]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(300)), encoding="utf-8")
    return file


def prepare(file, out, **options):
    return corpus.prepare([file], out, kind="bpe:300", text_key="prompt+response", **options)


def test_mask_covers_responses_and_their_end_of_text(questions, tmp_path):
    summary = prepare(questions, tmp_path / "out")
    assert "loss on responses only" in "\n".join(summary.lines())
    dataset = loader.load(tmp_path / "out")
    assert dataset.bytes_per_token is None
    tokens = tokenizer.from_text(dataset.tokenizer)
    seen = []
    for split in (dataset.train, dataset.val):
        ids, scored = split.read(0, len(split)), split.scored.read(0, len(split))
        ends = np.flatnonzero(ids == tokens.end_of_text)
        assert ends[-1] == len(ids) - 1 and scored[ends].all()
        for first, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            cut = first + int((scored[first:end] == 0).sum())
            assert not scored[first:cut].any() and scored[cut:end].all()
            seen.append(tuple(tokenizer.decode(tokens, part) for part in (ids[first:cut], ids[cut:end])))
    assert sorted(seen) == sorted((row["prompt"].replace("\r\n", "\n"), row["response"]) for row in rows(300))


def test_mask_is_independent_of_processes_and_removed_with_other_data(questions, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(questions, one)
    prepare(questions, two, workers=2)
    names = sorted(path.name for path in one.iterdir())
    assert "train.mask.bin" in names and "val.mask.bin" in names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    corpus.prepare([questions], two, kind="byte", text_key="response")
    assert not list(two.glob("*mask*")) and loader.load(two).train.scored is None


def test_the_hashes_of_data_include_the_mask(questions, tmp_path):
    """A resumed run would otherwise compare losses of responses with those of all tokens, without a word."""
    rows_of = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    joined = [{"text": row["prompt"] + row["response"]} for row in rows_of]
    plain = questions.with_name("joined.jsonl")
    plain.write_text("".join(json.dumps(row) + "\n" for row in joined), encoding="utf-8")
    corpus.prepare([questions], tmp_path / "pairs", kind="byte", text_key="prompt+response")
    corpus.prepare([plain], tmp_path / "texts", kind="byte")
    pairs, texts = loader.load(tmp_path / "pairs"), loader.load(tmp_path / "texts")
    for one, other in ((pairs.train, texts.train), (pairs.val, texts.val)):
        assert np.array_equal(one.read(0, len(one)), other.read(0, len(other)))
    assert pairs.hashes["train"] != texts.hashes["train"] and pairs.hashes["val"] != texts.hashes["val"]


def test_rows_without_a_response_are_rejected(tmp_path, questions):
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "why", "response": ""}\n')
    with pytest.raises(UserError, match=r"line 3\d\d has an empty `response`; remove the row; --skip_bad"):
        prepare(questions, tmp_path / "out")
    missing = questions.with_name("missing.jsonl")
    missing.write_text('{"prompt": "why"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"has no string `prompt\+response`.*\"response\": \"...\""):
        prepare(missing, tmp_path / "out")
    assert prepare(questions, tmp_path / "out", skip_bad=True).counts.bad_rows == 1
    with pytest.raises(UserError, match=r"--text_key=prompt\+response"):
        corpus.prepare([questions], tmp_path / "other")
    mask = tmp_path / "out" / "train.mask.bin"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train.mask.bin is missing or not of \d+ bytes"):
        loader.load(tmp_path / "out")


@pytest.fixture
def config(questions, tmp_path):
    prepare(questions, tmp_path / "data")
    return train.Config(
        out_dir=str(tmp_path / "out"),
        dataset=str(tmp_path / "data"),
        device="cpu",
        n_layer=1,
        n_head=2,
        n_embd=32,
        block_size=32,
        batch_size=3,
        gradient_accumulation_steps=4,
        max_iters=4,
        warmup_iters=0,
        learning_rate=1e-3,
        eval_interval=4,
        eval_iters=4,
    )


def batches(config, batch_size: int) -> loader.TrainBatches:
    tokens = loader.load(train.Path(config.dataset)).train
    return loader.TrainBatches(tokens, 32, batch_size, 12 // batch_size, 1, torch.device("cpu"))


def test_gradient_is_independent_of_micro_batch_size(config):
    """Micro-batches of 12, 3 or 1 of 12 sequences give the gradient of the mean over all scored targets."""
    found = []
    for size in (12, 3, 1):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=32))
        plan = batches(config, size)
        total = 0.0
        for idx, targets in plan.step(0):
            share = (targets != IGNORE).sum() / responses.count_targets(plan, 0)
            loss = model(idx, targets)[1] * share
            loss.backward()
            total += float(loss.detach())
        found.append((total, model.wte.weight.grad.clone()))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=32))
    plan = batches(config, 12)
    tokens, starts = plan.tokens, plan.sampler.starts(0, 12)
    raw, mask = (torch.from_numpy(part.sequences(starts, 33)) for part in (tokens, tokens.scored))
    losses = F.cross_entropy(model(raw[:, :-1])[0].flatten(0, 1), raw[:, 1:].flatten(), reduction="none")
    expected = losses[mask[:, 1:].flatten() == 1].mean()
    expected.backward()
    for total, gradient in found:
        assert total == pytest.approx(float(expected.detach()), rel=1e-5)
        assert torch.allclose(gradient, model.wte.weight.grad, atol=1e-6)


def test_train_py_trains_on_responses_only(config, capsys, monkeypatch):
    seen = []
    real = train.train_step

    def spy(model, optimizer, scaler, micro, *rates):
        micro = list(micro)
        scored = [int((batch[1] != IGNORE).sum()) for _, batch in micro]
        seen.append(sum(scored))
        assert [float(w) for w, _ in micro] == pytest.approx([part / sum(scored) for part in scored])
        return real(model, optimizer, scaler, micro, *rates)

    monkeypatch.setattr(train, "train_step", spy)
    for mode in ("stream", "rows", "masked"):
        train.main(replace(config, documents=mode, overwrite=True))
        assert "val loss" in capsys.readouterr().out
    assert len(seen) == 12 and all(0 < found < 12 * 32 for found in seen)


def test_step_without_a_response_is_an_error(config, tmp_path):
    mask = tmp_path / "data" / "train.mask.bin"
    mask.write_bytes(bytes(mask.stat().st_size))
    with pytest.raises(UserError, match="none of the 12 sequences of iteration 0 contains a response token"):
        responses.count_targets(batches(config, 3), 0)
