"""Streamed text equals the full text: no partial characters or stop strings at any token boundaries."""

import itertools
import random

import pytest

from nanogpt.errors import UserError
from nanogpt.inference.detokenizer import TextStream, text_of
from nanogpt.tokenizer.hugging_face import HuggingFaceTokenizer
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer, decode

TEXT = "Grüße, 世界 🦊! naïve ﷽ 👩‍👩‍👧\n"


class Chunks(ByteTokenizer):
    """A tokenizer whose tokens are several bytes, as in BPE, cut at random places."""

    def __init__(self, data: bytes, seed: int):
        draw = random.Random(seed)
        cuts = [0, *sorted(draw.sample(range(1, len(data)), len(data) // 3)), len(data)]
        self.pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def written(tokenizer, ids, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(i) for i in ids), stream.end()], stream


@pytest.mark.parametrize("seed", range(20))
def test_characters_are_complete_and_none_is_lost(seed):
    tokenizer = Chunks(TEXT.encode() * 3, seed)
    ids = range(len(tokenizer.pieces))
    pieces, _ = written(tokenizer, ids)
    assert "".join(pieces) == TEXT * 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_utf8_streams_as_in_full_decoding():
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(256) for _ in range(draw.randrange(30))]
        pieces, _ = written(ByteTokenizer(), ids)
        assert "".join(pieces) == decode(ByteTokenizer(), ids)


@pytest.mark.parametrize("seed", range(20))
def test_stop_string_across_tokens_ends_the_text(seed):
    tokenizer = Chunks(TEXT.encode() * 3, seed)
    ids = range(len(tokenizer.pieces))
    for stop in ("世界", "🦊!", "e ﷽", "\nGrü", "naïve ﷽ 👩"):
        pieces, stream = written(tokenizer, ids, [stop, "never"])
        assert stream.stopped and "".join(pieces) == (TEXT * 3)[: (TEXT * 3).index(stop)]


def test_possible_stop_string_is_held_back_until_resolved():
    letters = CharTokenizer("abc")
    pieces, stream = written(letters, letters.encode_prompt("aabaac"), ["aab"])
    assert pieces == ["", "", "", "", "", "", ""] and stream.stopped
    pieces, stream = written(letters, letters.encode_prompt("acaabb"), ["aabc"])
    assert pieces == ["", "ac", "", "", "", "aabb", ""] and not stream.stopped
    pieces, stream = written(letters, letters.encode_prompt("caa"), ["aab"])
    assert pieces == ["c", "", "", "aa"] and not stream.stopped


def test_first_completed_stop_string_wins():
    for tokens in (["xabcd"], list("xabcd"), ["xab", "cd"]):
        tokenizer = CharTokenizer("x")
        tokenizer.characters = tokens
        pieces, _ = written(tokenizer, range(len(tokens)), ["abcd", "bc"])
        assert "".join(pieces) == "xa"


def test_empty_stop_string():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(ByteTokenizer(), ["a", ""])


def word_piece():
    """WordPiece joins "##" pieces and inserts spaces between words."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"hel": 0, "##lo": 1, "world": 2, "!": 3}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="!"))
    inner.decoder = decoders.WordPiece()
    return inner


def like_llama():
    """A space is part of the next word, and dropped at the beginning; bytes outside words are tokens."""
    from tokenizers import Tokenizer, decoders, models

    words = ["\u2581the", "\u2581", "th", "e", "\u2581\u2581", "\ufffd"]
    vocabulary = {token: i for i, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return inner


@pytest.mark.parametrize("make", [word_piece, like_llama])
def test_vocabulary_whose_text_depends_on_neighbors(make):
    """After any prompt of whole characters, the pieces complete its text; and so do the texts of tokens."""
    tokenizer = HuggingFaceTokenizer(make().to_str())
    size, draw = tokenizer.vocab_size, random.Random(0)
    usual = [*range(max(0, size - 6), size), *([10, 0xE4, 0xB8, 0x96, 0x85] if size > 256 else [])]
    for _ in range(300):
        ids = draw.choices(usual, k=12)
        cut = draw.choice([0, *(i for i in range(1, 12) if ids[i - 1] not in tokenizer.byte_ids)])
        before, whole = decode(tokenizer, ids[:cut]), decode(tokenizer, ids)
        stream = TextStream(tokenizer, prompt=ids[:cut])
        pieces = [*map(stream.push, ids[cut:]), stream.end()]
        assert before + "".join(pieces) == whole
        if not tokenizer.byte_ids.intersection(ids):
            texts = [text_of(tokenizer, one, last) for last, one in itertools.pairwise([None, *ids])]
            assert "".join(texts) == whole


def test_bytes_are_held_back_until_their_run_ends():
    tokenizer = HuggingFaceTokenizer(like_llama().to_str())
    the, newline = 256, 10
    pieces, _ = written(tokenizer, [the, newline, the, newline, 0x85, the, newline])
    assert pieces == ["the", "", "\n the", "", "", "\ufffd\ufffd the", "", "\n"]
