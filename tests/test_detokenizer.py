"""Text as it comes is the text as a whole: no half characters, no stop strings, wherever tokens end."""

import itertools
import random

import pytest

from nanogpt.errors import UserError
from nanogpt.inference.detokenizer import TextStream
from nanogpt.tokenizer.hugging_face import HuggingFaceTokenizer
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer, decode

TEXT = "Grüße, 世界 🦊! naïve ﷽ 👩‍👩‍👧\n"


class Chunks(ByteTokenizer):
    """Tokens of several bytes, as byte pairs have, cut anywhere."""

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
def test_characters_are_whole_and_nothing_is_lost(seed):
    tokenizer = Chunks(TEXT.encode() * 3, seed)
    ids = range(len(tokenizer.pieces))
    pieces, _ = written(tokenizer, ids)
    assert "".join(pieces) == TEXT * 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_as_in_the_whole():
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(256) for _ in range(draw.randrange(30))]
        pieces, _ = written(ByteTokenizer(), ids)
        assert "".join(pieces) == decode(ByteTokenizer(), ids)


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_across_tokens(seed):
    tokenizer = Chunks(TEXT.encode() * 3, seed)
    ids = range(len(tokenizer.pieces))
    for stop in ("世界", "🦊!", "e ﷽", "\nGrü", "naïve ﷽ 👩"):
        pieces, stream = written(tokenizer, ids, [stop, "never"])
        assert stream.stopped and "".join(pieces) == (TEXT * 3)[: (TEXT * 3).index(stop)]


def test_what_may_become_a_stop_string_is_held_back_and_given_if_it_does_not():
    letters = CharTokenizer("abc")
    pieces, stream = written(letters, letters.encode_prompt("aabaac"), ["aab"])
    assert pieces == ["", "", "", "", "", "", ""] and stream.stopped
    pieces, stream = written(letters, letters.encode_prompt("acaabb"), ["aabc"])
    assert pieces == ["", "ac", "", "", "", "aabb", ""] and not stream.stopped
    pieces, stream = written(letters, letters.encode_prompt("caa"), ["aab"])
    assert pieces == ["c", "", "", "aa"] and not stream.stopped


def test_of_several_the_one_that_is_complete_first():
    for tokens in (["xabcd"], list("xabcd"), ["xab", "cd"]):
        tokenizer = CharTokenizer("x")
        tokenizer.characters = tokens
        pieces, _ = written(tokenizer, range(len(tokens)), ["abcd", "bc"])
        assert "".join(pieces) == "xa"


def test_an_empty_stop_string():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(ByteTokenizer(), ["a", ""])


def test_a_vocabulary_whose_text_depends_on_neighbours():
    """WordPiece joins "##" pieces and puts blanks between words."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"hel": 0, "##lo": 1, "world": 2, "!": 3}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="!"))
    inner.decoder = decoders.WordPiece()
    tokenizer = HuggingFaceTokenizer(inner.to_str())
    ids = [0, 1, 2, 3, 0, 1]
    pieces, _ = written(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
