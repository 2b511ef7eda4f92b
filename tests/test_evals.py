"""Scores equal those of lm-eval and of a plain reference, for any batch size."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.against_lm_eval import by_lm_eval, given_by, likelihoods, same_prediction
from nanogpt import loss
from nanogpt.errors import UserError
from nanogpt.evaluation import evals, harness, log_likelihood, tasks
from nanogpt.evaluation.log_likelihood import Ids, Requests, Subject, Windows
from nanogpt.evaluation.tasks import Item, Task
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.gpt2 import load_gpt2
from nanogpt.tokenizer.hugging_face import HuggingFaceTokenizer
from nanogpt.tokenizer.ids import IdTokenizer
from tests import texts
from tests.subjects import LETTERS, subject_of


@pytest.fixture(scope="module")
def letters() -> Subject:
    return subject_of(LETTERS, block_size=24)


@pytest.fixture(scope="module")
def trained(trained_bpe) -> Subject:
    return subject_of(tokenizer.from_text(trained_bpe), block_size=96)


@pytest.fixture(scope="module")
def gpt2(real) -> Subject:
    return subject_of(load_gpt2(str(real("gpt2/vocab.bpe"))), block_size=96)


@pytest.fixture(params=["trained", "gpt2"])
def pairs(request) -> Subject:
    """A model with a BPE tokenizer."""
    return request.getfixturevalue(request.param)


def reference(subject: Subject, ids: np.ndarray, scored: int) -> tuple[np.ndarray, bool]:
    """Return the scores of one row, computed from the logits of all positions."""
    idx = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logits = subject.model(idx[:, :-1])[0].double()
    losses = F.cross_entropy(logits[0], idx[0, 1:], reduction="none")
    return losses[-scored:].numpy(), bool((logits[0].argmax(-1) == idx[0, 1:])[-scored:].all())


def random_pairs(count: int) -> list[log_likelihood.Pair]:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 20, (count, 2))
    return [tuple(draw.integers(0, 10, size) for size in pair) for pair in sizes]


# ----------------------------------------------------------------------------- rows and batches


@pytest.mark.parametrize("options", [{}, {"position": "alibi"}, {"position": "rope", "softcap": 5.0}])
def test_scores_are_independent_of_batch_size(options):
    subject = subject_of(LETTERS, 24, **options)
    rows = Requests(random_pairs(60), 24)
    expected = [reference(subject, *rows[i]) for i in range(60)]
    for batch_size in (1, 3, 100):
        found = sorted(log_likelihood.score(replace(subject, batch_size=batch_size), rows, greedy=True))
        assert [i for i, _, _ in found] == list(range(60))
        for (_, nats, greedy), (expected_nats, expected_greedy) in zip(found, expected, strict=True):
            np.testing.assert_allclose(nats, expected_nats, atol=1e-4)
            assert greedy == expected_greedy


def test_lm_head_in_chunks_gives_equal_scores(letters, monkeypatch):
    rows = Requests(random_pairs(20), 24)
    whole = [nats for _, nats, _ in log_likelihood.score(letters, rows)]
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", 25)  # two positions with ten ids each
    for nats, expected in zip((n for _, n, _ in log_likelihood.score(letters, rows)), whole, strict=True):
        np.testing.assert_allclose(nats, expected, atol=1e-5)


def test_bfloat16_scores_equal_those_of_train_py(letters):
    """Weights and computation are in bfloat16, and the model itself is not modified."""
    before = {name: tensor.clone() for name, tensor in letters.model.state_dict().items()}
    subject = replace(letters, machine=replace(letters.machine, dtype="bfloat16"))
    rows = Requests(random_pairs(20), 24)
    compute = subject.machine.in_dtype(letters.model)
    for number, nats, _ in log_likelihood.score(subject, rows):
        ids, scored = rows[number]
        idx = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = compute(idx[:, :-1])[0][0]
        expected = F.cross_entropy(logits, idx[0, 1:], reduction="none")[-scored:]
        np.testing.assert_allclose(nats, expected.numpy(), atol=0.05)
    assert {p.dtype for p in letters.model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in letters.model.state_dict().items())


def test_long_rows_are_truncated_on_the_left(letters):
    rows = Requests([([1] * 30, [2, 3]), ([1], list(range(9)) * 4), ([4], [5])], 24)
    assert rows.cut.tolist() == [True, True, False]
    assert rows[0][0].tolist() == [1] * 23 + [2, 3] and rows[0][1] == 2
    assert len(rows[1][0]) == 25 and rows[1][1] == 24  # the continuation alone is too long: keep its end
    assert rows[2][0].tolist() == [4, 5]


def test_batches_stay_within_the_budget_and_cover_all_rows():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    batches = list(log_likelihood.batches(lengths, 200))
    padded = [len(batch) * int(lengths[batch].max()) for batch in batches]
    assert max(padded) <= 200 and sum(padded) < 1.1 * lengths.sum()
    assert sorted(np.concatenate(batches)) == list(range(300))


# ----------------------------------------------------------------------------- scoring windows


@pytest.mark.parametrize("size", [2, 9, 10, 11, 37, 40, 41])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_windows_score_every_id_once_with_full_context(size, stride):
    windows = Windows([Ids(np.arange(size)), Ids(np.arange(100, 105))], 10, stride)
    seen = []
    for i in range(len(windows)):
        ids, scored = windows[i]
        assert len(ids) == windows.lengths[i] and np.all(np.diff(ids) == 1)
        seen += ids[-scored:].tolist()
        first = 100 if ids[0] >= 100 else 0
        assert len(ids) == 11 or ids[0] == first
        assert scored <= stride or ids[0] == first
    assert seen == [*range(1, size), *range(101, 105)]


def test_windows_equal_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows

    for size in (1, 5, 10, 11, 33):
        for stride in (1, 4, 10):
            ids = list(range(1, size + 1))
            theirs = list(get_rolling_token_windows(ids, 0, max_seq_len=10, context_len=10 - stride + 1))
            windows = Windows([Ids(np.arange(size + 1))], 10, stride)
            assert len(theirs) == len(windows)
            for i, (inputs, targets) in enumerate(theirs):
                row, scored = windows[i]
                assert row[:-1].tolist() == inputs and row[-scored:].tolist() == targets


def test_window_subset_is_spread_over_the_text():
    windows = Windows([Ids(np.arange(1000))], 10, 10, limit=5)
    assert len(windows) == 5 and windows.place(0)[1] == 1 and windows.place(4)[2] == 1000


def test_text_with_fewer_than_two_ids_is_rejected():
    with pytest.raises(UserError, match="the text is empty"):
        Windows([Ids(np.arange(1))], 10, 10)


def test_text_loss_is_the_mean_over_its_tokens(letters):
    text = "abc dead\nbeef " * 40
    ids = log_likelihood.encode_text(text, LETTERS)
    report = evals.run_text("x", Windows([ids], 24, 24), letters, words=evals.count_words(text))
    nats = np.concatenate([reference(letters, *Windows([ids], 24, 24)[i])[0] for i in range(24)])
    assert len(nats) == len(text) - 1 == report.counts["tokens"] == report.counts["bytes"]
    assert report.metrics["loss"].value == pytest.approx(nats.mean(), abs=1e-4)
    assert report.metrics["perplexity"].value == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert report.metrics["bits_per_byte"].value == pytest.approx(nats.mean() / math.log(2), abs=1e-4)
    expected = math.exp(nats.sum() / 121)  # 120 words, and the empty one after the last space
    assert report.metrics["word_perplexity"].value == pytest.approx(expected, rel=1e-3)


def test_stride_1_equals_one_window_per_token(letters):
    """With stride 1 every id has a full context: its loss equals that of a separate window."""
    ids = log_likelihood.encode_text("abcdefgh deaf" * 5, LETTERS)
    report = evals.run_text("x", Windows([ids], 24, 1), letters)
    nats = [reference(letters, ids.ids[max(0, i - 24) : i + 1], 1)[0][0] for i in range(1, len(ids))]
    assert report.metrics["loss"].value == pytest.approx(np.mean(nats), abs=1e-4)


def test_byte_count_equals_that_of_the_text(pairs):
    text = "Der Käse, 三国演义, and a <|endoftext|> that is text.\n" * 90
    ids = log_likelihood.encode_text(text, pairs.tokenizer)
    report = evals.run_text("x", Windows([ids], 96, 96), pairs)
    assert report.counts["bytes"] == len(text.encode())
    sizes = [row["bytes"] for row in report.rows]
    assert sum(sizes) == len(text.encode()) and all(20 < size < 50 for size in sizes[:-1])
    assert sum(row["nats"] for row in report.rows) == pytest.approx(
        report.metrics["loss"].value * len(ids.ids[1:]), rel=1e-6
    )


# ----------------------------------------------------------------------------- tasks


def by_hand(subject: Subject, ids: list[int], start: int = 1) -> float:
    """Return the loss in bits of ids[start:], from the logits of one row."""
    with torch.no_grad():
        chances = subject.model(torch.tensor([ids[:-1]]))[0][0].double().softmax(-1)
    return -sum(math.log2(chances[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_bytes_of_ids_that_are_no_text_are_not_known():
    """Their names in a sample, and the blanks between them, are not the text."""
    subject = subject_of(IdTokenizer(["a", "b", "<eos>"]), block_size=16)
    ids = np.tile([0, 1, 2], 20)
    assert "bits_per_byte" not in evals.run_text("x", Windows([Ids(ids)], 16, 16), subject).metrics


def test_characters_that_a_tokenizer_loses_are_counted(pairs):
    """Its loss is of another text then: every unknown character is the same token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    inner = Tokenizer(models.WordLevel({"?": 0, "abc": 1, "\n": 2}, unk_token="?"))
    inner.normalizer, inner.decoder = normalizers.Lowercase(), decoders.Fuse()
    lossy = replace(pairs, tokenizer=HuggingFaceTokenizer(inner.to_str()))
    assert evals.lost("abc", lossy.tokenizer) == 0 == evals.lost("é", pairs.tokenizer)
    assert evals.lost("ABC", lossy.tokenizer) == 6 and evals.lost("x", lossy.tokenizer) == 2
    task = Task("t", "choice", [Item("abc", ("x", "abc"))])  # together, both are unknown
    assert "characters lost or added by the tokenizer" in evals.run_task(task, lossy).describe()
    assert "lost" not in evals.run_task(Task("t", "choice", [Item("a", ("b", "c"))]), pairs).describe()


def test_bits_per_byte_equals_a_count_by_hand(letters, pairs):
    """Two bytes per é, three per 世, four per emoji; a text begins with end-of-text if there is one."""
    text = "naïve café 世界 🙂\n"
    found = evals.run_text("x", Windows([log_likelihood.encode_text(text, pairs.tokenizer)], 96, 96), pairs)
    ids = [pairs.tokenizer.end_of_text, *pairs.tokenizer.encode(text).tolist()]
    assert len(text.encode()) == 25 == found.counts["bytes"]
    assert found.metrics["bits_per_byte"].value == pytest.approx(by_hand(pairs, ids) / 25, rel=1e-5)
    ids = letters.tokenizer.encode("abc d").tolist()  # no end-of-text: the first letter is not scored
    found = evals.run_text(
        "x", Windows([log_likelihood.encode_text("abc d", letters.tokenizer)], 24, 24), letters
    )
    assert found.counts["bytes"] == 4
    assert found.metrics["bits_per_byte"].value == pytest.approx(by_hand(letters, ids) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["Metaspace", "WordPiece", "ByteLevel"])
def test_bytes_of_tokens_that_lose_their_space_alone(kind):
    """`▁the` decodes to "the" alone and to " the" after another token."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    text = "the cat and the dog and the bird ran and ran"
    is_pieces = kind == "WordPiece"
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]") if is_pieces else models.BPE())
    made.pre_tokenizer = pre_tokenizers.Whitespace() if is_pieces else getattr(pre_tokenizers, kind)()
    made.decoder = getattr(decoders, kind)()
    trainer = trainers.WordPieceTrainer if is_pieces else trainers.BpeTrainer
    made.train_from_iterator([text], trainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False))
    own = tokenizer.from_text(made.to_str())
    ids = own.encode(text)
    found = evals.lengths_of(ids, len(ids) - 1, own, evals.token_bytes(own)).sum()
    assert found == len(own.decode_bytes(ids.tolist())) - len(own.decode_bytes(ids[:1].tolist()))


def byte_fallback() -> str:
    """The tokenizer.json of a BPE with a space before the text and tokens for bytes, as those of Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made.to_str()


@pytest.mark.parametrize("text", ["a é b", "a 😂 道h", "é 道a", "\n\ta\n"])
def test_tokens_of_one_byte_count_as_one_byte(text):
    pytest.importorskip("tokenizers")
    own = tokenizer.from_text(byte_fallback())
    ids = own.encode("a" + text)
    found = evals.lengths_of(ids, len(ids) - 2, own, evals.token_bytes(own))
    assert found.sum() == len(text.encode()) and (found >= 1).all()


def test_bytes_of_a_dataset_are_those_of_its_text_if_the_tokenizer_may_change_it(pairs):
    """The bits/byte that training prints."""
    pytest.importorskip("tokenizers")
    changed = replace(pairs, tokenizer=tokenizer.from_text(byte_fallback()))
    windows = Windows([log_likelihood.encode_text("a bad cab " * 20, changed.tokenizer)], 24, 24)
    found = evals.run_text("x", windows, changed, bytes_per_token=2.5)
    expected = found.metrics["loss"].value / math.log(2) / 2.5
    assert found.metrics["bits_per_byte"].value == pytest.approx(expected, rel=0.01)
    usual = evals.run_text("x", windows, pairs).counts["bytes"]
    assert evals.run_text("x", windows, pairs, bytes_per_token=2.5).counts["bytes"] == usual


def test_texts_without_blanks_have_no_perplexity_per_word(letters):
    text = log_likelihood.encode_text("abc d" * 100, letters.tokenizer)
    found = [evals.run_text("x", Windows([text], 24, 24), letters, words=words) for words in (100, 2)]
    assert ["word_perplexity" in report.metrics for report in found] == [True, False]


@pytest.mark.parametrize("count", [1, 2])
def test_a_standard_error_needs_two_items(letters, count):
    """One window of less than 32 bytes is one item; two texts of that length are two."""
    texts = [log_likelihood.encode_text(text, letters.tokenizer) for text in ["abc d"] * 8 + ["dd ca"] * 16]
    found = evals.run_text("x", Windows(texts if count == 2 else texts[:1], 24, 24), letters)
    said = found.describe()
    assert ("±" in said) == (count == 2) and "nan" not in said
    assert (found.to_json()["loss_stderr"] is None) == (count == 1)
    difference = evals.compare(found, found)["loss"]  # of one item, too
    assert difference.value == 0 and difference.p == 1
    for labels in ([0], [0, 1], [1, 1, 1]):  # all right or all wrong: a spread of 0 says nothing
        task = tasks.Task("t", "choice", [tasks.Item("ab", ("c", "d"), label) for label in labels])
        assert ("±" in evals.run_task(task, letters).describe()) == (labels == [0, 1])


def test_multiple_choice_metrics_match_their_definitions(letters, monkeypatch):
    """Compute every metric from its definition, with fixed likelihoods."""
    given = [[-4.0, -3.0], [-2.0, -9.0], [-6.0, -5.0]]
    items = [
        tasks.Item("a", ("bbbb", "c"), 0),  # acc wrong (1), acc_norm right: -1 against -3 per character
        tasks.Item("a", ("b", "cc"), 0),
        tasks.Item("a", ("bb", "c"), 1),
    ]
    flat = [value for pair in given for value in pair]

    def fake(subject, rows, **unused):
        for i, value in enumerate(flat):
            yield i, np.array([-value]), False

    monkeypatch.setattr(evals, "score", fake)
    report = evals.run_task(tasks.Task("t", "choice", items), letters)
    assert report.metrics["acc"].value == pytest.approx(2 / 3)
    assert report.metrics["acc"].stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))  # as lm-eval
    assert report.metrics["acc_norm"].value == pytest.approx(2 / 3)
    assert [row["prediction"] for row in report.rows] == [1, 0, 1]
    assert [row["prediction_norm"] for row in report.rows] == [0, 0, 0]
    assert report.to_json()["items"] == 3 and report.describe().startswith("t: acc 0.6667 ± 0.3333")


def test_item_outside_the_vocabulary_is_rejected(letters):
    items = [tasks.Item("ab", ("c",)), tasks.Item("ab", ("Käse",))]
    with pytest.raises(UserError, match=r"^t, item 2: .*'K'"):
        evals.run_task(tasks.Task("t", "cloze", items), letters)


def test_cloze_is_correct_if_greedy_decoding_yields_it(letters):
    start = LETTERS.encode_prompt("abc def")
    text = Text(start, SamplingOptions(temperature=0))
    decoder = Engine(letters.model, 1)
    decoder.add([text])
    for _ in range(4):
        decoder.step()
    written = "".join(LETTERS.characters[token] for token in text.new)
    wrong = written[:-1] + ("a" if written[-1] != "a" else "b")
    items = [tasks.Item("abc def", (target,), joint="") for target in (written, wrong, written[:2])]
    report = evals.run_task(tasks.Task("t", "cloze", items), letters)
    assert [row["correct"] for row in report.rows] == [True, False, True]
    losses = [-row["loglikelihood"] for row in report.rows]
    assert report.metrics["perplexity"].value == pytest.approx(math.exp(np.mean(losses)))


def test_item_with_empty_context(letters, pairs):
    item = tasks.Item("", ("ab",), joint="")
    [(context, continuation)] = evals.encode_item(item, LETTERS)
    assert context.tolist() == [0] and continuation.tolist() == [2, 3]  # after a newline
    assert evals.encode_item(item, pairs.tokenizer)[0][0] == [pairs.tokenizer.end_of_text]
    with pytest.raises(UserError, match="no end-of-text or newline to start with"):
        evals.encode_item(item, tokenizer.CharTokenizer("ab"))


# ----------------------------------------------------------------------------- comparison with lm-eval


def first_rows(path, count: int) -> list[dict]:
    return [row for _, (_, row) in zip(range(count), tasks.file_rows(path), strict=False)]


def own_questions(path: Path) -> Path:
    """Write rows in HellaSwag and LAMBADA format, with contexts of various lengths and WikiHow markup."""
    rows = []
    for i, page in enumerate(texts.web_pages(60)):
        first, *sentences = page.replace("\n", " ").split(".")
        about = "".join(sentences)[: 13 * i]
        context = f"[header] {first} [title] {about} [step] And then" if i % 2 else f"{first} {about}"
        endings = [f"{sentence} [substeps]  1." for sentence in ("it rained", "the sea", "old nets", first)]
        rows.append({"activity_label": "Fishing", "ctx": context, "endings": endings, "label": i % 4})
        rows[-1]["text"] = page[: 40 + 5 * i].replace("\n", " ").strip()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def subject_and(request, tmp_path) -> Callable[[str], tuple[Subject, Path]]:
    """Use the GPT-2 tokenizer for an external file, and the trained one for `own_questions`."""

    def found(name: str) -> tuple[Subject, Path]:
        if name == "own":
            return request.getfixturevalue("trained"), own_questions(tmp_path / "own.jsonl")
        return request.getfixturevalue("gpt2"), request.getfixturevalue("real")(name)

    return found


@pytest.mark.parametrize(
    ("file", "count", "are_cut"),
    [
        ("own", 40, True),
        ("hellaswag/hellaswag_val_raw500.jsonl", 40, True),
        ("hellaswag/hellaswag_val.jsonl.xz", 10, False),
    ],
)
def test_hellaswag_equals_lm_eval(subject_and, tmp_path, file, count, are_cut):
    subject, path = subject_and(file)
    fields = ("activity_label", "ctx", "endings", "label")  # without ctx_a and ctx_b, which ctx contains
    rows = [{field: row[field] for field in fields} for row in first_rows(path, count)]
    samples, scores = by_lm_eval(tmp_path, "hellaswag", rows, harness.adapter(subject))
    report = evals.run_task(tasks.load(f"hellaswag:{tmp_path / 'hellaswag.jsonl'}"), subject)
    for row, sample in zip(report.rows, samples, strict=True):
        np.testing.assert_allclose(likelihoods(row), given_by(sample), atol=1e-3)
        assert same_prediction(row, sample)
    for name in ("acc", "acc_norm"):
        assert report.metrics[name].value == pytest.approx(scores[f"{name},none"])
    assert (0 < report.counts["endings cut to fit the context"] < 4 * count) == are_cut


@pytest.mark.parametrize("file", ["own", "lambada/lambada_test_0001-1000.jsonl"])
def test_lambada_equals_lm_eval(subject_and, tmp_path, file):
    subject, path = subject_and(file)
    samples, scores = by_lm_eval(tmp_path, "lambada", first_rows(path, 50), harness.adapter(subject))
    report = evals.run_task(tasks.load(f"lambada:{path}", limit=50), subject)
    for row, sample in zip(report.rows, samples, strict=True):
        np.testing.assert_allclose(likelihoods(row), given_by(sample), atol=1e-3)
        assert same_prediction(row, sample)
    assert report.metrics["acc"].value == pytest.approx(scores["acc,none"])
    assert report.metrics["perplexity"].value == pytest.approx(scores["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("file", ["own", "wikitext-2/valid.txt"])
def test_perplexity_equals_lm_eval(subject_and, tmp_path, file):
    subject, path = subject_and(file)
    text = path.read_text(encoding="utf-8")[:6000]
    _, scores = by_lm_eval(tmp_path, "text", [{"page": text}], harness.adapter(subject))
    ids = log_likelihood.encode_text(text, subject.tokenizer)
    report = evals.run_text("x", Windows([ids], 96, 96), subject, words=evals.count_words(text))
    for name in ("word_perplexity", "bits_per_byte"):
        assert report.metrics[name].value == pytest.approx(scores[f"{name},none"], rel=1e-4)
