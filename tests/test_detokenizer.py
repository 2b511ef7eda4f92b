"""Streamed text equals the full text: no partial characters or stop strings at any token boundaries."""

import itertools
import random

import pytest

from nanogpt.errors import UserError
from nanogpt.inference.detokenizer import TextStream
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


def test_vocabulary_whose_text_depends_on_neighbors():
    """WordPiece joins "##" pieces and inserts spaces between words."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"hel": 0, "##lo": 1, "world": 2, "!": 3}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="!"))
    inner.decoder = decoders.WordPiece()
    tokenizer = HuggingFaceTokenizer(inner.to_str())
    ids = [0, 1, 2, 3, 0, 1]
    pieces, _ = written(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
