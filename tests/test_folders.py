"""Tokenizers of other programs: their files are read as by those programs, or named for what they are."""

import json
import re
from pathlib import Path

import pytest

import export
from nanogpt import files
from nanogpt.convert import hf, hf_tokenizer
from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.prepare import corpus
from nanogpt.tokenizer import bpe, tokenizer, vocabulary
from nanogpt.tokenizer.gpt2 import GPT2Tokenizer
from tests import hf_folders
from tests.conftest import words
from tests.texts import chinese_novel

tokenizers = pytest.importorskip("tokenizers")
TEXT = words(400)


@pytest.fixture
def gpt2_style(tmp_path, trained_bpe) -> Path:
    """A folder with vocab.json and merges.txt, as transformers' slow tokenizers are saved."""
    model = json.loads(trained_bpe)["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("given", ["", "vocab.json", "merges.txt"])
def test_vocab_and_merges_give_the_ids_of_the_tokenizer_json(given, gpt2_style, trained_bpe):
    own, expected = tokenizer.from_file(gpt2_style / given), tokenizer.from_text(trained_bpe)
    for text in (TEXT, chinese_novel(300), "a<|endoftext|>b"):
        assert own.encode(text).tolist() == expected.encode(text).tolist()
        assert tokenizer.decode(own, own.encode(text)) == text
    assert own.end_of_text == expected.end_of_text and own.vocab_size == expected.vocab_size


def test_openais_names_and_gpt2s_own_merges_are_recognized(real, tmp_path):
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / names[0]
        folder.mkdir()
        (folder / names[0]).write_bytes(real("gpt2/encoder.json").read_bytes())
        (folder / names[1]).write_bytes(real("gpt2/vocab.bpe").read_bytes())
        assert tokenizer.from_file(folder).kind == "gpt2"
    (folder / "added_tokens.json").write_text('{"<|user|>": 50257}', encoding="utf-8")
    own = tokenizer.from_file(folder)
    assert (own.kind, own.vocab_size) == ("hf", 50258) and own.encode_prompt("<|user|>") == [50257]


@pytest.mark.parametrize(
    "end", ["<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]", "<EOS_TOKEN>", "<|end-of-document|>"]
)
def test_other_names_of_the_end_of_a_text_are_known(end, trained_bpe):
    own = tokenizer.from_text(trained_bpe.replace("<|endoftext|>", json.dumps(end)[1:-1]))
    assert own.end_of_text == tokenizer.from_text(trained_bpe).end_of_text is not None
    assert tokenizer.from_text(trained_bpe.replace("endoftext", "end_of_turn")).end_of_text is None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_of_a_text_is_the_one_that_transformers_names(name, trained_bpe, tmp_path):
    """Whatever other tokens are called, and whether or not it is marked as special."""
    size = vocabulary.identify(trained_bpe).vocab_size
    value = json.loads(trained_bpe)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    value["added_tokens"].append({"id": size, "content": "<|im_end|>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer.from_file(path).end_of_text == size
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n' * 9, encoding="utf-8")
    summary = corpus.prepare([tmp_path / "rows.jsonl"], tmp_path / "out", kind=str(tmp_path))
    assert "each document ends with <|im_end|>" in summary.lines()
    ids = loader.load(tmp_path / "out").train.read(0, 6).tolist()
    assert ids[1::2] == [size] * 3
    # the file that is kept beside the data is one that the tokenizers library reads
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert kept.encode("a<|im_end|>").ids == ids[:2]


def test_the_end_token_of_a_chat_model_is_exported_and_its_template_mentioned(tmp_path, trained_bpe, capsys):
    transformers = pytest.importorskip("transformers")
    value = json.loads(trained_bpe)
    size = vocabulary.identify(trained_bpe).vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    value["added_tokens"].append({"id": size, "content": "<|im_end|>", "special": True, **flags})
    folder = hf_folders.write(tmp_path / "chat", vocab_size=size + 1)
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    about = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    export.main(export.Config(init_from=str(folder), to=str(tmp_path / "out")))
    assert f"note: the chat template of {folder} is neither used nor exported" in capsys.readouterr().err
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == size == theirs("<|im_end|>")["input_ids"][0]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))["eos_token_id"] == size


def test_an_id_that_the_library_would_change_is_an_error(trained_bpe, tmp_path):
    size = vocabulary.identify(trained_bpe).vocab_size
    (tmp_path / "tokenizer.json").write_text(trained_bpe, encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size + 3}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"gives '<|user|>' the id {size + 3}, which .* takes for {size}"):
        tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("merges", ["own merges"], indirect=True)
@pytest.mark.parametrize("what", ["normalizer", "prefix", "digits", "setting", "added", "ids of vocab.json"])
def test_what_differs_from_gpt2s_tokenizer_is_not_taken_for_it(what, tmp_path, merges):
    """Each with GPT-2's own merges, in merges.txt and in tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    size = vocabulary.GPT2_VOCAB_SIZE
    folder = hf_folders.write(tmp_path / "a", merges=merges, vocab_size=-(-(size + 1) // 64) * 64)
    value, settings = hf_folders.tokenizer_json(merges), {"tokenizer_class": "PreTrainedTokenizerFast"}
    level, vocab = value["pre_tokenizer"], value["model"]["vocab"]
    if what == "normalizer":
        value["normalizer"] = {"type": "Lowercase"}
    elif what == "prefix":
        value["pre_tokenizer"] = {**level, "add_prefix_space": True}
    elif what == "digits":
        digits = {"type": "Digits", "individual_digits": True}
        value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    elif what == "setting":
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    elif what == "added":
        settings["added_tokens_decoder"] = {str(size): {"content": "<|im_end|>", "special": True}}
        settings["eos_token"] = "<|im_end|>"
    if what == "ids of vocab.json":
        shifted = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
        (folder / "vocab.json").write_text(json.dumps(shifted), encoding="utf-8")
        settings["tokenizer_class"] = "GPT2Tokenizer"
    else:
        (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Hello World 1234 <|im_end|><|endoftext|>."
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    own = tokenizer.from_text(hf.open_folder(folder).tokenizer)
    usual = GPT2Tokenizer(merges.read_text(encoding="utf-8"))
    assert own.encode_prompt(text) == expected != usual.encode_prompt(text)
    assert tokenizer.fingerprint(tokenizer.from_file(folder)) == tokenizer.fingerprint(own)
    assert own.end_of_text == theirs.convert_tokens_to_ids(settings.get("eos_token", "<|endoftext|>"))


def test_added_tokens_are_read_from_both_files(gpt2_style, trained_bpe):
    size = vocabulary.identify(trained_bpe).vocab_size
    (gpt2_style / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}), encoding="utf-8")
    added = {str(size + 1): {"content": "<|im_end|>", "special": True}}
    (gpt2_style / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added}), encoding="utf-8"
    )
    own = tokenizer.from_file(gpt2_style)
    assert own.vocab_size == size + 2
    assert own.encode_prompt("<|im_start|><|im_end|>") == [size, size + 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("added_tokens.json", {"<pad>": "x"}, "<pad> is 'x', not a whole number"),
        ("added_tokens.json", ["<pad>"], "not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": "a"}}, "added_tokens_decoder: 7 is 'a'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "id of 'a' is not"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}, "id of 'a'"),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}, "is of a Qwen2Tokenizer"),
        ("vocab.json", {**dict.fromkeys(bpe.BYTE_OF, 1), "!</w>": 2}, "not a BPE such as GPT-2's"),
    ],
)
def test_odd_files_beside_a_vocabulary_are_errors_of_one_line(gpt2_style, name, content, said):
    (gpt2_style / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        tokenizer.from_file(gpt2_style)
    assert "\n" not in str(caught.value)


@pytest.fixture
def chinese(tmp_path) -> Path:
    """A folder with the vocabulary of a Chinese GPT-2, one token per line."""
    characters = sorted(set(chinese_novel()) - set("\n\u3000"))
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return tmp_path


def test_vocabulary_of_chinese_gpt2_equals_transformers(chinese):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(str(chinese / "vocab.txt"))
    text = chinese_novel(2000) + "ABC"
    own = tokenizer.from_file(chinese)
    assert own.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_what_a_word_piece_tokenizer_loses_is_refused_or_reported(chinese, tmp_path):
    (tmp_path / "novel.txt").write_text(chinese_novel(4000), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"novel\.txt: the tokenizer loses or adds [\d,]+ of 4,000 .*'\\n'.* or pass --lossy"
    ):
        corpus.prepare([tmp_path / "novel.txt"], tmp_path / "out", kind=str(chinese))
    summary = corpus.prepare([tmp_path / "novel.txt"], tmp_path / "out", kind=str(chinese), lossy=True)
    assert any(line.startswith("the tokenizer loses ") for line in summary.lines())
    assert loader.load(tmp_path / "out").vocab_size == summary.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"tokenizer.model": "\n\x0e"},
            "tokenizer.model is a SentencePiece or tiktoken file, which is not read",
        ),
        ({"spiece.model": "\n\x0e"}, "spiece.model is a SentencePiece"),
        ({"qwen.tiktoken": "IQ== 0\n"}, "qwen.tiktoken is a SentencePiece or tiktoken file"),
        ({"vocab.json": '{"a</w>": 0}', "merges.txt": "#version\n"}, "lacks 256 of the 256 bytes"),
        ({"vocab.json": '{"a": "1"}', "merges.txt": ""}, "vocab.json: a is '1', not a whole number"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "not an object"),
        ({"vocab.json": '{"a": 1,', "merges.txt": ""}, "vocab.json is not valid JSON"),
        ({"vocab.txt": "a\nb\n"}, "vocab.txt is not BERT's vocabulary"),
        ({"vocab.txt": "[UNK]\na\na\n"}, "must hold distinct tokens, with .UNK."),
        ({"vocab.json": "{}"}, "no tokenizer at "),
        ({}, "no tokenizer at "),
    ],
)
def test_other_files_are_named_in_one_line(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for path in [tmp_path, *[tmp_path / name for name in files if name.endswith((".model", ".tiktoken"))]]:
        with pytest.raises(UserError, match=said) as caught:
            tokenizer.from_file(path)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- settings of a tokenizer.json


def plain() -> "tokenizers.Tokenizer":
    return tokenizers.Tokenizer.from_str(bpe.train([TEXT * 3], 300))


def lower(inner: "tokenizers.Tokenizer") -> None:
    inner.normalizer = tokenizers.normalizers.Lowercase()


def accents(inner: "tokenizers.Tokenizer") -> None:
    steps = [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    inner.normalizer = tokenizers.normalizers.Sequence(steps)


def compatibility(inner: "tokenizers.Tokenizer") -> None:
    inner.normalizer = tokenizers.normalizers.NFKC()


def no_lines(inner: "tokenizers.Tokenizer") -> None:
    inner.normalizer = tokenizers.normalizers.Replace("\n", " ")


def one_blank(inner: "tokenizers.Tokenizer") -> None:
    inner.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" +"), " ")


def stripping(inner: "tokenizers.Tokenizer") -> None:
    inner.add_tokens([tokenizers.AddedToken("(", lstrip=True, normalized=False)])


def spacing(inner: "tokenizers.Tokenizer") -> None:
    """Add a space for each one that is lost."""
    inner.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Replace(tokenizers.Regex(" +"), " "),
            tokenizers.normalizers.Replace("-", "- "),
        ]
    )


LATE = words(6000) + "x"  # the loss is far from the beginning of a file


def composed(inner: "tokenizers.Tokenizer") -> None:
    inner.normalizer = tokenizers.normalizers.NFC()


def a_byte(inner: "tokenizers.Tokenizer") -> None:
    vocab = {token: number for token, number in inner.get_vocab().items() if "Q" not in token}
    inner.model = tokenizers.models.BPE(vocab, [])


def words_only(inner: "tokenizers.Tokenizer") -> None:
    vocab = {word: number for number, word in enumerate(sorted({*re.findall(r"\w+|\W", LATE), "?"}))}
    vocab = {"<|endoftext|>": 0, **{word: number + 1 for word, number in vocab.items()}}
    inner.model = tokenizers.models.WordLevel(vocab, unk_token="?")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\W"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()


def repeated_id(inner: "tokenizers.Tokenizer") -> None:
    vocab = inner.get_vocab()
    inner.model = tokenizers.models.BPE(vocab | {"Q": vocab["e"]}, [])


@pytest.mark.parametrize(
    ("change", "lost", "name"),
    [
        (composed, "e\u0301", "x.txt"),
        (a_byte, "Q", "x.txt"),
        (words_only, "zyzzyva", "x.csv"),
        (repeated_id, "Q", "x.json"),
        (lower, "ABC", "x.txt"),
        (accents, "é", "x.csv"),
        (compatibility, "ﬁ①", "x.json"),
        (no_lines, "\n", "x.txt"),
        (one_blank, "  ", "x.csv"),
        (stripping, " (", "x.txt"),
        (spacing, "  -", "x.json"),
    ],
)
def test_every_kind_of_loss_is_found_in_rows_and_texts(change, lost, name, tmp_path):
    inner = plain()
    change(inner)
    inner.save(str(tmp_path / "tokenizer.json"))
    text = LATE.replace("\n", " ") + lost + "y"
    content = {
        "x.txt": text,
        "x.csv": f'text\nabc\n"{text}"\n',
        "x.json": json.dumps([{"q": "abc", "a": text}]),
    }
    (tmp_path / name).write_text(content[name], encoding="utf-8")
    given = {"kind": str(tmp_path), "text_key": "q+a" if name == "x.json" else "text"}
    with pytest.raises(UserError, match=rf"{name}: the tokenizer loses or adds [\d,]+ of .* characters"):
        corpus.prepare([tmp_path / name], tmp_path / "out", **given)


def of_normalizer(folder: Path, normalizer, text: str = TEXT) -> tokenizer.Tokenizer:
    """A byte-level BPE that changes its text first, saved as tokenizer.json."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder, inner.normalizer = tokenizers.decoders.ByteLevel(), normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    inner.train_from_iterator([text], trainer)
    inner.save(str(folder / "tokenizer.json"))
    return tokenizer.from_file(folder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_spaces_removed_from_an_end_of_a_text_are_losses(side, tmp_path):
    strip = tokenizers.normalizers.Strip(left=side == "left", right=side == "right")
    own = of_normalizer(tmp_path, strip)
    for text in (" a b", "a b ", " a b "):
        lost = own.lost(text, own.encode(text))
        expected = text.startswith(" ") if side == "left" else text.endswith(" ")
        assert lost == ({" ": 1} if expected else {})
    row = {"prompt": "Q: what?", "response": " this "}
    (tmp_path / "x.jsonl").write_text((json.dumps(row) + "\n") * 60, encoding="utf-8")
    given = {"kind": str(tmp_path), "text_key": "prompt+response", "val_fraction": 0.5}
    with pytest.raises(UserError, match=r"the tokenizer loses or adds (60|120) of 900 characters \(' '"):
        corpus.prepare([tmp_path / "x.jsonl"], tmp_path / "out", **given)


def test_a_line_break_without_a_token_is_refused_in_prompts(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.0)], 0))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    own = tokenizer.from_file(tmp_path)
    assert tokenizer.decode(own, own.encode_prompt("a a")) == "a a"
    for prompt, named in (("a\na", r"'\\n'"), ("a\ta", r"'\\t'"), ("a €", "'€'"), ("a\n", r"'\\n'")):
        with pytest.raises(UserError, match=f"{named} is not in the vocabulary"):
            own.encode_prompt(prompt)


def test_documents_without_a_separator_are_said_to_have_none(tmp_path):
    words = tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "king": 2}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    rows = "".join(json.dumps({"text": f"the king {'the ' * n}"}) + "\n" for n in range(40))
    (tmp_path / "x.jsonl").write_text(rows, encoding="utf-8")
    given = {"kind": str(tmp_path), "lossy": True, "val_fraction": 0.5}
    summary = corpus.prepare([tmp_path / "x.jsonl"], tmp_path / "out", **given)
    assert any(line.startswith("nothing separates documents: ") for line in summary.lines())


def test_bytes_without_a_token_are_losses_and_refused_in_prompts(tmp_path):
    """As of a byte-level BPE that was trained without `initial_alphabet`."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    inner.train_from_iterator([TEXT, "café Grüße ¿Qué?"], trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    own = tokenizer.from_file(tmp_path)
    for prompt, named in ((f"{TEXT[:9]}7 or 8", "'7'"), ("8", "'8'"), (f"👍 {TEXT[:9]}", "'👍'")):
        with pytest.raises(UserError, match=f"{named} is not in the vocabulary"):
            own.encode_prompt(prompt)
    assert tokenizer.decode(own, own.encode_prompt(TEXT[:50])) == TEXT[:50]
    (tmp_path / "x.txt").write_text(TEXT + "👍 7 ¿Qué?", encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer loses or adds"):
        corpus.prepare([tmp_path / "x.txt"], tmp_path / "out", kind=str(tmp_path))


HOSTILE = {
    "a regular expression without end": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$|([^x]+)+x{50}y"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "exhausted memory": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 12}] * 12,
        }
    },
    "an aborting library": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "a panic": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no model": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    "ids beyond reason": {"added_tokens": [{"id": 1 << 40, "content": "x", "special": True}]},
    "other merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
    "a token without text": {"added_tokens": [{"id": 1}]},
    "other types": {"added_tokens": [7], "decoder": "ByteLevel", "pre_tokenizer": []},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tokenizers_are_errors_of_one_line(what, tmp_path):
    value = json.loads(plain().to_str()) | HOSTILE[what]
    with pytest.raises(UserError, match=r"^some/tokenizer\.json") as caught:
        tokenizer.from_text(json.dumps(value), "some/tokenizer.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer.from_file(tmp_path)


def test_a_prefix_of_subwords_that_panics_is_tried_in_another_process():
    value = json.loads(plain().to_str())
    value["model"]["continuing_subword_prefix"] = "x" * 100
    with pytest.raises(UserError, match="the library that reads it fails"):
        tokenizer.from_text(json.dumps(value), "t.json")


def test_settings_that_change_the_ids_are_not_exported(tmp_path):
    value = json.loads(plain().to_str())
    value["model"]["dropout"] = 0.5
    theirs = tokenizers.Tokenizer.from_str(json.dumps(value))
    theirs.enable_truncation(4)
    theirs.enable_padding(length=99)
    pieces = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", 0)]}
    theirs.post_processor = tokenizers.processors.TemplateProcessing(**pieces)
    own = tokenizer.from_text(theirs.to_str())
    hf_tokenizer.write(tmp_path, own)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert exported.encode(TEXT).ids == own.encode(TEXT).tolist()


def test_files_beyond_the_limit_are_refused_and_not_cut(gpt2_style, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", len((gpt2_style / "vocab.json").read_text(encoding="utf-8")) - 1)
    with pytest.raises(UserError, match=r"vocab.json is too large: at most [\d,]+ characters are read"):
        tokenizer.from_file(gpt2_style)
