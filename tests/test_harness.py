"""The lm-eval adapter: requests to the model, and error messages."""

import sys

import pytest
import torch

from benchmarks.against_lm_eval import by_lm_eval
from nanogpt.errors import UserError
from nanogpt.evaluation import harness, log_likelihood
from nanogpt.inference.engine import window_start
from tests.subjects import LETTERS, subject_of


@pytest.fixture(scope="module")
def letters():
    return subject_of(LETTERS, block_size=24)


def greedy(subject, context: str, count: int) -> str:
    """Reference greedy decoding: append the most likely character `count` times."""
    ids = LETTERS.encode_prompt(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(
                int(subject.model(torch.tensor([ids[window_start(len(ids), 24) :]]))[0][:, -1].argmax())
            )
    return "".join(LETTERS.characters[i] for i in ids[len(LETTERS.encode_prompt(context)) :])


def test_generation_stops_at_stop_strings_and_limits(letters):
    whole = greedy(letters, "abc", 40)
    options = {"until": ["Z"], "max_gen_toks": 40}
    assert harness.continuation(letters, "abc", options) == whole
    stop = whole[5:7]
    assert (
        harness.continuation(letters, "abc", options | {"until": [stop, "Z"]}) == whole[: whole.index(stop)]
    )
    assert harness.continuation(letters, "abc", options | {"until": stop}) == whole[: whole.index(stop)]
    drawn = options | {"do_sample": True, "temperature": 2.0}
    assert harness.continuation(letters, "abc", drawn) != whole
    assert len(harness.continuation(letters, "", options)) == 40  # starts from a newline


def test_lm_eval_generation_task(letters, tmp_path):
    rows = [{"q": "abc", "a": greedy(letters, "abc", 6)}, {"q": "fed ", "a": "not this"}]
    samples, scores = by_lm_eval(
        tmp_path,
        "generation",
        rows,
        harness.adapter(letters),
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["Z"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    assert scores["exact_match,none"] == 0.5
    assert samples[1]["filtered_resps"] == [greedy(letters, "fed ", 6)]


def test_rolling_likelihoods_with_an_empty_text(letters):
    class Request:
        def __init__(self, text):
            self.args = (text,)

    texts = ["abc def " * 9, "", "ab"]
    found = harness.adapter(letters).loglikelihood_rolling([Request(text) for text in texts])
    assert found[1] == 0
    for text, value in zip(texts, found, strict=True):
        if text:
            windows = log_likelihood.Windows([log_likelihood.encode_text(text, LETTERS)], 24, 24)
            assert value == pytest.approx(-sum(n.sum() for _, n, _ in log_likelihood.score(letters, windows)))


def test_unloadable_lm_eval_task_is_a_one_line_error(letters, tmp_path, monkeypatch):
    path = tmp_path / "broken.yaml"
    path.write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        'test_split: test\noutput_type: loglikelihood\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n',
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"lm-eval cannot load .*broken.yaml \(FileNotFoundError: .*HF_HOME"):
        harness.run([str(path)], letters)


def test_unknown_task_name_suggests_the_nearest(letters, monkeypatch):
    import lm_eval.tasks

    class Manager:
        all_tasks = ("arc_easy", "piqa")

        def __init__(self, include_defaults):
            assert include_defaults

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    with pytest.raises(UserError, match="unknown lm-eval task 'arc_esay'; did you mean 'arc_easy'"):
        harness.run(["piqa", "arc_esay"], letters)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'nanogpt\[lm-eval\]'"):
        harness.run(["piqa"], letters)
