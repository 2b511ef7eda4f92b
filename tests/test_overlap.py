"""Tests of the overlap with the training text: equal to a search of every substring, and fast."""

import re
import shutil
import time

import numpy as np
import pytest

import sample
from nanogpt.diagnostics import overlap
from nanogpt.errors import UserError
from tests.conftest import train_until_it_knows


class Text:
    """Token ids in memory, with the methods of Tokens that the search uses."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count].astype(np.int64)


def longest(text: np.ndarray, ids: np.ndarray) -> int:
    """Return the longest match of `ids` in `text`, one character per token, by trying every substring."""
    whole, part = "".join(map(chr, text)), "".join(map(chr, ids))
    best = 0
    for start in range(len(part)):
        while start + best < len(part) and part[start : start + best + 1] in whole:
            best += 1
    return best


@pytest.mark.parametrize("vocabulary", [2, 5, 50])
def test_search_equals_trying_every_substring(vocabulary, monkeypatch):
    monkeypatch.setattr(overlap, "CHUNK", 700)  # matches across chunks
    draw = np.random.default_rng(vocabulary)
    for size in (40, 699, 1500, 3000):
        text = draw.integers(0, vocabulary, size)
        samples = [draw.integers(0, vocabulary, n) for n in (1, 7, 100)]
        for at in (0, 10, max(0, size - 30), min(size - 30, 680)):
            samples.append(np.concatenate([samples[2], text[at : at + 30], samples[1]]))
        for ids, match in zip(samples, overlap.search(Text(text), samples), strict=True):
            assert match.length == longest(text, ids)
            there, own = text[match.place :], ids[match.start :]
            assert (there[: match.length] == own[: match.length]).all()


def test_ten_million_tokens_take_less_than_a_second():
    draw = np.random.default_rng(0)
    text = draw.zipf(1.3, 10_000_000) % 50_000
    samples = [np.concatenate([draw.zipf(1.3, 480) % 50_000, text[at : at + 20]]) for at in (5, 9_000_000)]
    began = time.process_time()
    found = overlap.search(Text(text), samples)
    assert time.process_time() - began < 1.0
    assert [match.length for match in found] == [20, 20]


def test_sampling_reports_the_overlap_or_that_the_text_is_gone(tmp_path, capsys):
    train_until_it_knows(tmp_path, 60)
    config = sample.Config(
        out_dir=str(tmp_path / "out"), num_samples=2, max_new_tokens=30, device="cpu", overlap=True
    )
    for stream in (False, True):
        sample.main(sample.Config(**vars(config) | {"stream": stream}))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("overlap: ")]
        assert [line.split(":")[1] for line in lines] == [
            " sample 1",
            " sample 2",
            " passages of the validation text",
        ]
        assert " of 30 tokens: '" in lines[0] and "longest passage in the training text" in lines[0]
        count, copied = re.search(r"training text: (\d+) of 30 tokens: (.*)", lines[0]).groups()
        text = overlap.open_dataset(tmp_path / "out")
        assert len(copied.encode().decode("unicode_escape")) - 2 == int(count)
        assert len(text.train) > 1000
    shutil.rmtree(tmp_path / "dataset")
    sample.main(config)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("overlap: the training text is not at hand: no dataset at ")
    with pytest.raises(UserError):
        overlap.open_dataset(tmp_path / "out")
