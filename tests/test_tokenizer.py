"""Tokenizers: nothing is lost on the way to ids and back, and the ids are those of nanoGPT and OpenAI."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from nanogpt import tokenizer
from nanogpt.errors import UserError
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer


@pytest.fixture(scope="session")
def gpt2(data_folder: Path) -> GPT2Tokenizer:
    return tokenizer.gpt2(str(data_folder / "gpt2"))


def expected(data_folder: Path) -> dict[str, dict]:
    return json.loads((data_folder / "gpt2" / "expected_tokens.json").read_text(encoding="utf-8"))


def raw_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # no newline is touched


def random_text(seed: int, length: int = 200) -> str:
    """Characters of every plane, without the surrogates, which are no characters."""
    draw = random.Random(seed)
    points = [draw.randrange(draw.choice([0x80, 0x800, 0xD800, 0x110000])) for _ in range(length)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# ----------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("seed", range(20))
def test_any_text_comes_back(seed, gpt2):
    text = random_text(seed)
    for tokens in (CharTokenizer(sorted(set(text))), ByteTokenizer(), gpt2):
        assert tokenizer.decode(tokens, tokens.encode(text)) == text
        assert tokens.decode_bytes(tokens.encode(text)) == text.encode("utf-8")
        assert tokens.encode_prompt(text) == tokens.encode(text).tolist()


def test_ids_are_below_the_vocabulary_size(gpt2):
    text = random_text(1)
    for tokens in (CharTokenizer(sorted(set(text))), ByteTokenizer(), gpt2):
        ids = tokens.encode(text)
        assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < tokens.vocab_size
        assert tokens.encode("").tolist() == []


def test_characters_are_numbered_as_nanogpt_numbers_them():
    text = "the quick brown 狐狸 jumps\n🦊"
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    assert CharTokenizer(sorted(set(text))).encode(text).tolist() == [number[c] for c in text]


def test_unknown_characters_are_shown_with_what_is_known():
    tokens = CharTokenizer("abc")
    for prompt in ("abXcé🦊", "🦊éXa"):  # below, between and above the known code points
        with pytest.raises(UserError, match=r"vocabulary of 3 characters: .*it has 'abc'") as error:
            tokens.encode(prompt)
        assert all(repr(character) in str(error.value) for character in "Xé🦊")


def test_a_character_cut_in_its_bytes_is_replaced_not_fatal():
    assert tokenizer.decode(ByteTokenizer(), "é".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


# ----------------------------------------------------------------------------- GPT-2


def test_gpt2_gives_the_published_ids(data_folder, gpt2):
    entries = [(name, entry) for name, entry in expected(data_folder).items() if " " not in name]
    assert len(entries) == 25
    for name, entry in entries:
        path, _, part = name.partition("[")
        text = raw_text(data_folder / path)
        cut = int(len(text) * 0.9)
        text = {"": text, ":90%]": text[:cut], "90%:]": text[cut:]}[part]
        ids = gpt2.encode(text)
        assert ids[:16].tolist() == entry["first16"], name
        assert hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest() == entry["sha256_uint16le"], name


def test_gpt2_has_openais_vocabulary(data_folder, gpt2):
    encoder = json.loads((data_folder / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    assert (gpt2.vocab_size, gpt2.end_of_text) == (len(encoder), encoder["<|endoftext|>"])
    assert gpt2.encode("Hello").tolist() == [encoder["Hello"]]


def test_markers_in_a_text_are_text_and_in_a_prompt_the_token(gpt2):
    assert gpt2.end_of_text not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode_prompt("a<|endoftext|>b") == [64, gpt2.end_of_text, 65]


def test_a_run_of_blanks_that_would_crash_tiktoken_is_refused(gpt2):
    text = "a" + " " * 1_200_000 + "b"
    for encode in (gpt2.encode, gpt2.encode_prompt):
        with pytest.raises(UserError, match="blanks on end"):
            encode(text)
    assert tokenizer.decode(gpt2, gpt2.encode("a" + " \n" * 50_000 + "b")) == "a" + " \n" * 50_000 + "b"


def test_merges_are_checked_and_their_absence_is_explained(data_folder, tmp_path, monkeypatch):
    wrong = tmp_path / "vocab.bpe"
    wrong.write_bytes((data_folder / "gpt2" / "vocab.bpe").read_bytes()[:-10])
    with pytest.raises(UserError, match="is not GPT-2's"):
        tokenizer.gpt2(str(wrong))
    with pytest.raises(UserError, match="no GPT-2 merges at"):
        tokenizer.gpt2(str(tmp_path / "nowhere"))
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "GPT2_URL", "http://127.0.0.1:9/vocab.bpe")  # nothing listens there
    with pytest.raises(UserError, match=r"could not be downloaded.*put that file at .*vocab\.bpe"):
        tokenizer.gpt2()


# ----------------------------------------------------------------------------- its file


def test_a_tokenizer_comes_back_from_its_file(gpt2):
    text = "Grüße, 世界!\n🦊"
    for tokens in (CharTokenizer(sorted(set(text))), ByteTokenizer(), gpt2):
        copy = tokenizer.from_text(tokenizer.to_text(tokens))
        assert (copy.kind, copy.vocab_size, copy.end_of_text) == (
            tokens.kind,
            tokens.vocab_size,
            tokens.end_of_text,
        )
        assert np.array_equal(copy.encode(text), tokens.encode(text))
        assert tokenizer.fingerprint(copy) == tokenizer.fingerprint(tokens)


def test_fingerprints_tell_vocabularies_apart():
    kinds = [CharTokenizer("ab"), CharTokenizer("abc"), CharTokenizer("ba"), ByteTokenizer()]
    assert len({tokenizer.fingerprint(tokens) for tokens in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "3",
        "{}",
        '{"format": "other", "type": "byte"}',
        '{"format": "nanogpt-tokenizer-1"}',
        '{"format": "nanogpt-tokenizer-1", "type": "morse"}',
        '{"format": "nanogpt-tokenizer-1", "type": ["char"]}',
        '{"format": "nanogpt-tokenizer-1", "type": "char"}',
        '{"format": "nanogpt-tokenizer-1", "type": "char", "characters": 3}',
        '{"format": "nanogpt-tokenizer-1", "type": "char", "characters": ["a", "a"]}',
        '{"format": "nanogpt-tokenizer-1", "type": "char", "characters": ["ab"]}',
        '{"format": "nanogpt-tokenizer-1", "type": "char", "characters": [["a"]]}',
        '{"format": "nanogpt-tokenizer-1", "type": "gpt2", "merges": "#version\\na b"}',
        '{"format": "nanogpt-tokenizer-1", "type": "gpt2", "merges": 3}',
        "[" * 100_000,
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(content):
    with pytest.raises(UserError, match=r"run/tokenizer\.json is not a tokenizer"):
        tokenizer.from_text(content, "run/tokenizer.json")
