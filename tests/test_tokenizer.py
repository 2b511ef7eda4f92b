"""Tokenizers: lossless round trips, and ids equal to those of nanoGPT and OpenAI."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, tokenizer, vocabulary
from nanogpt.tokenizer import gpt2 as gpt2_files
from nanogpt.tokenizer.gpt2 import GPT2Tokenizer, load_gpt2
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer
from tests import texts
from tests.conftest import found

ROOT = Path(__file__).resolve().parent.parent


KINDS = ["char", "byte", "trained", "own merges", "gpt2"]


@pytest.fixture(scope="session")
def make(
    trained_bpe: str, own_merges: str, real: Callable[[str], Path]
) -> Callable[..., tokenizer.Tokenizer]:
    """Return a factory of tokenizers by kind ("char": for a text; "own merges": GPT-2 with other merges)."""

    def made(kind: str, text: str = "") -> tokenizer.Tokenizer:
        if kind == "own merges":
            return GPT2Tokenizer(own_merges)
        if kind == "gpt2":
            return load_gpt2(str(real("gpt2/vocab.bpe")))
        if kind == "trained":
            return tokenizer.from_text(trained_bpe)
        return CharTokenizer(sorted(set(text))) if kind == "char" else ByteTokenizer()

    return made


@pytest.fixture(scope="session", params=["own merges", "gpt2"])
def gpt2(request, make) -> GPT2Tokenizer:
    return make(request.param)


def raw_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # without newline translation


def random_text(seed: int, length: int = 200) -> str:
    """Return random characters of every plane, without surrogates, which are not characters."""
    draw = random.Random(seed)
    points = [draw.randrange(draw.choice([0x80, 0x800, 0xD800, 0x110000])) for _ in range(length)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# ----------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_any_text(kind, make):
    tokens = make(kind, "".join(random_text(seed) for seed in range(20)))
    for text in (random_text(seed) for seed in range(20)):
        assert tokenizer.decode(tokens, tokens.encode(text)) == text
        assert tokens.decode_bytes(tokens.encode(text)) == text.encode("utf-8")
        assert tokens.encode_prompt(text) == tokens.encode(text).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_below_the_vocabulary_size(kind, make):
    text = random_text(1)
    tokens = make(kind, text)
    ids = tokens.encode(text)
    assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < tokens.vocab_size
    assert tokens.encode("").tolist() == []


def test_character_ids_equal_nanogpts():
    text = "the quick brown 狐狸 jumps\n🦊"
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    assert CharTokenizer(sorted(set(text))).encode(text).tolist() == [number[c] for c in text]


def test_unknown_characters_error_lists_known_ones():
    tokens = CharTokenizer("abc")
    for prompt in ("abXcé🦊", "🦊éXa"):  # below, between and above the code points of the vocabulary
        with pytest.raises(UserError, match=r"vocabulary of 3 characters: .*it begins with 'abc'") as error:
            tokens.encode(prompt)
        assert all(repr(character) in str(error.value) for character in "Xé🦊")


def test_truncated_utf8_is_replaced():
    assert tokenizer.decode(ByteTokenizer(), "é".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


# ----------------------------------------------------------------------------- GPT-2


def test_gpt2_gives_the_published_ids(make, real):
    tokens = make("gpt2")
    published = json.loads(real("gpt2/expected_tokens.json").read_text(encoding="utf-8"))
    entries = [(name, entry) for name, entry in published.items() if " " not in name]
    assert len(entries) == 25
    for name, entry in entries:
        path, _, part = name.partition("[")
        text = raw_text(real(path))
        cut = int(len(text) * 0.9)
        text = {"": text, ":90%]": text[:cut], "90%:]": text[cut:]}[part]
        ids = tokens.encode(text)
        assert ids[:16].tolist() == entry["first16"], name
        assert hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest() == entry["sha256_uint16le"], name


def test_gpt2_vocabulary_equals_openais(make, real):
    tokens = make("gpt2")
    encoder = json.loads(real("gpt2/encoder.json").read_text(encoding="utf-8"))
    assert (tokens.vocab_size, tokens.end_of_text) == (len(encoder), encoder["<|endoftext|>"])
    assert tokens.encode("Hello").tolist() == [encoder["Hello"]]


def test_special_tokens_are_parsed_in_prompts_only(gpt2):
    assert gpt2.end_of_text not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode_prompt("a<|endoftext|>b") == [64, gpt2.end_of_text, 65]


def test_whitespace_run_that_crashes_tiktoken_is_rejected(gpt2):
    text = "a" + " " * 1_200_000 + "b"
    for encode in (gpt2.encode, gpt2.encode_prompt):
        with pytest.raises(UserError, match="whitespace characters in a row"):
            encode(text)
    assert tokenizer.decode(gpt2, gpt2.encode("a" + " \n" * 50_000 + "b")) == "a" + " \n" * 50_000 + "b"


def test_merges_are_validated_and_their_absence_is_explained(own_merges, tmp_path, monkeypatch):
    wrong = tmp_path / "vocab.bpe"
    wrong.write_text(own_merges, encoding="utf-8")
    with pytest.raises(UserError, match="is not GPT-2's"):
        load_gpt2(str(wrong))
    with pytest.raises(UserError, match="no GPT-2 merges at"):
        load_gpt2(str(tmp_path / "nowhere"))
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpt2_files, "GPT2_URL", "http://127.0.0.1:9/vocab.bpe")  # no server on port 9
    with pytest.raises(UserError, match=r"could not be downloaded.*put that file at .*vocab\.bpe"):
        load_gpt2()


def test_encoder_json_is_validated_if_given(own_merges, tmp_path, monkeypatch):
    for name, home, constant, content in (
        ("vocab.bpe", vocabulary, "GPT2_SHA256", own_merges),
        ("encoder.json", gpt2_files, "GPT2_ENCODER_SHA256", '{"a": 0}'),
    ):
        (tmp_path / name).write_bytes(content.encode())
        monkeypatch.setattr(home, constant, hashlib.sha256(content.encode()).hexdigest())
    assert load_gpt2(str(tmp_path)).merges == own_merges
    (tmp_path / "encoder.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"encoder\.json is not GPT-2's encoder\.json"):
        load_gpt2(str(tmp_path))


# ----------------------------------------------------------------------------- Hugging Face tokenizers


def test_training_is_independent_of_thread_count(trained_bpe, tmp_path):
    path = tmp_path / "text.py"
    path.write_bytes(texts.python_sources(300_000).encode())
    code = (
        "import sys; from nanogpt.tokenizer import bpe\n"
        "text = open(sys.argv[1], encoding='utf-8', newline='').read()\n"
        "sys.stdout.write(bpe.train((text[i : i + 2000] for i in range(0, len(text), 2000)), 1000))"
    )
    for threads in ("1", "2", "3"):
        run = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert run.stdout == trained_bpe


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_with_a_trained_vocabulary(seed, trained_bpe):
    tokens = tokenizer.from_text(trained_bpe)
    assert (tokens.kind, tokens.vocab_size, tokens.end_of_text) == ("hf", 1000, 0)
    text = random_text(seed) + "<|endoftext|>"
    assert tokens.decode_bytes(tokens.encode(text)) == text.encode("utf-8")
    assert tokenizer.decode(tokens, tokens.encode(text)[:-1]).startswith(text[:50])
    assert 0 not in tokens.encode(text) and tokens.encode_prompt(text)[-1] == 0
    copy = tokenizer.from_text(tokenizer.to_text(tokens))
    assert np.array_equal(copy.encode(text), tokens.encode(text))
    assert tokenizer.fingerprint(copy) == tokenizer.fingerprint(tokens)


def awkward_texts() -> dict[str, str]:
    """Return the built-in awkward texts, and those of the test data folder odd/ if it exists."""
    odd = found("odd")
    files = texts.awkward() | {path.name: path.read_bytes() for path in (odd.glob("*.txt") if odd else [])}
    return {name: content.decode("utf-8", "replace") for name, content in files.items()}


def test_gpt2_as_a_tokenizer_json_gives_the_same_ids(gpt2):
    value = json.loads(bpe.as_hugging_face(gpt2.merges))
    special = {"id": gpt2.end_of_text, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    special |= {"rstrip": False, "normalized": False, "special": True}
    tokens = tokenizer.from_text(json.dumps({**value, "added_tokens": [special]}))
    assert (tokens.vocab_size, tokens.end_of_text) == (gpt2.vocab_size, gpt2.end_of_text)
    for name, text in awkward_texts().items():
        assert np.array_equal(tokens.encode(text), gpt2.encode(text)), name
        assert tokenizer.decode(tokens, tokens.encode(text)) == text
    assert tokens.encode_prompt("a<|endoftext|>b") == gpt2.encode_prompt("a<|endoftext|>b")


def test_non_byte_level_vocabulary_works():
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens = tokenizer.from_text(made.to_str())
    assert tokens.encode("the cat ran").tolist() == [1, 2, 0] and tokens.end_of_text is None
    assert tokenizer.decode(tokens, [1, 2]) == "the cat"
    tokens.accelerate()
    assert tokens.encode("the cat").tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram"])
def test_unknown_words_of_a_prompt_are_refused_unless_written_as_unknown(kind):
    import tokenizers

    words = ["<unk>", "the", "cat", " "]
    if kind == "Unigram":
        model = tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=0)
    else:
        model = getattr(tokenizers.models, kind)({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["<unk>"])
    if kind != "Unigram":
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    loaded = tokenizer.from_text(made.to_str())
    assert [i for i in loaded.encode_prompt("the <unk> cat") if words[i] != " "] == [1, 0, 2]
    with pytest.raises(UserError, match=r"'(dog|d)' is not in the vocabulary; remove it"):
        loaded.encode_prompt("the dog")


def test_invalid_tokenizer_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content, reason in [
        (b"{}", "is not a tokenizer"),
        (b'{"model": {}}', "is not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "by the tokenizers library"),
        (b"\xff", "not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as error:
            tokenizer.from_file(tmp_path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizer.from_file(tmp_path / "nowhere")


# ----------------------------------------------------------------------------- the fast encoder


# Unicode planes with text, and the tags plane; surrogates are not characters.
CHARACTERS = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200))]


def class_of(character: str, parts: list[str]) -> str:
    """Return the class of a character, inferred from how `x.1x.!` with it is split into words."""
    if parts[0] == f"x{character}":
        return "letter"
    if parts[1] == f"{character}1":
        return "number"
    return "blank" if parts[-1] == "!" else "other"


def test_fast_encoder_splits_equally_except_for_excluded_characters():
    import gigatoken
    import tiktoken
    import tokenizers

    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = {bytes([i]): i for i in range(256)}
    of_tiktoken = {}
    for name, pattern in (("letter", r"\p{L}"), ("number", r"\p{N}"), ("blank", r"\s")):
        only = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=single, special_tokens={})
        matching = only.decode(only.encode_ordinary("".join(CHARACTERS)))  # drops non-matching ones
        of_tiktoken |= dict.fromkeys(matching, name)
    for character in CHARACTERS:
        if character == " " or bpe.has_new_characters(f"a{character}é"):
            continue
        text = f"x{character}1x{character}!"
        fast = [part.decode() for part in gigatoken.pretokenizer(text.encode())]
        slow = [text[a:b] for _, (a, b) in level.pre_tokenize_str(text)]
        expected = of_tiktoken.get(character, "other")
        assert class_of(character, fast) == class_of(character, slow) == expected, hex(ord(character))
    assert not bpe.has_new_characters("plain, é, 中文, 🦊")


@pytest.mark.parametrize("kind", ["trained", "own merges", "gpt2"])
def test_fast_encoder_gives_the_same_ids(kind, make, monkeypatch):
    slow, fast = make(kind), make(kind)
    monkeypatch.setattr(bpe, "TRIAL", 0)  # otherwise the slow encoder would be compared with itself
    fast.accelerate()
    assert "accelerated" in fast._ordinary.__qualname__
    bodies = [random_text(seed, 100) for seed in range(400)]
    bodies += ["\U00032848\u8830", "a\u088fb", "x<|endoftext|>y", "", " " * 5000 + "x", "a" * 5000]
    awkward = "  \n\t\x0b\x1c\x85\xa0\u2003''sdmtlvre.,1½²éß中の，。🦊\u0301"
    bodies += ["".join(random.Random(i).choices(awkward, k=40)) for i in range(2000)]
    bodies += [text[:20_000] for text in awkward_texts().values()]
    for text in bodies:
        assert np.array_equal(fast.encode(text), slow.encode(text)), text[:80]


def test_differing_fast_encoder_is_not_used(monkeypatch):
    class Wrong:
        def encode(self, text: str) -> list[int]:
            return [1]

    import gigatoken

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda text: Wrong())
    encode = bpe.accelerated("{}", lambda text: [len(text)])
    assert [encode("a"), encode("ab"), encode("abc")] == [[1], [2], [3]]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert bpe.accelerated("{}", len) is len  # as if tokenizers were not installed


# ----------------------------------------------------------------------------- tokenizer files


@pytest.mark.parametrize("kind", ["char", "byte", "trained", "gpt2"])
def test_tokenizer_file_round_trip(kind, make):
    text = "Grüße, 世界!\n🦊"
    tokens = make(kind, text)
    copy = tokenizer.from_text(tokenizer.to_text(tokens))
    for name in ("kind", "vocab_size", "end_of_text"):
        assert getattr(copy, name) == getattr(tokens, name)
    assert np.array_equal(copy.encode(text), tokens.encode(text))
    assert tokenizer.fingerprint(copy) == tokenizer.fingerprint(tokens)


def test_fingerprints_distinguish_vocabularies():
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
def test_invalid_tokenizer_is_rejected_by_name(content):
    with pytest.raises(UserError, match=r"run/tokenizer\.json is not a tokenizer"):
        tokenizer.from_text(content, "run/tokenizer.json")
