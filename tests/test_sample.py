"""Tests of sample.py."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import nanogpt
import sample
import train
from nanogpt.config import load
from nanogpt.errors import UserError
from nanogpt.prepare import corpus
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer
from tests.conftest import train_until_it_knows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = train_until_it_knows(tmp_path_factory.mktemp("trained"), max_iters=400)
    shutil.rmtree(config.dataset)  # a run folder is self-contained
    return Path(config.out_dir)


@pytest.fixture
def config(trained, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    return sample.Config(out_dir=str(moved), num_samples=3, max_new_tokens=60, device="cpu")


def texts(config, capsys) -> list[str]:
    sample.main(config)
    out = capsys.readouterr().out
    assert out.endswith("\n" + "-" * 15 + "\n")
    return out.split("\n" + "-" * 15 + "\n")[:-1]


def test_samples_are_separated_by_15_dashes_and_start_with_the_prompt(config, capsys):
    found = texts(replace(config, start="abc"), capsys)
    assert len(found) == 3 and len(set(found)) == 3
    assert all(text.startswith("abc") and len(text) == 63 for text in found)
    assert set("".join(found)) <= set("abcdefgh \n")
    assert texts(replace(config, start="abc"), capsys) == found
    assert texts(replace(config, start="abc", seed=99), capsys) != found


def test_samples_are_words_of_the_training_language(config, capsys):
    from tests.conftest import words

    known = set(words(1800).split())
    spoken = [word for text in texts(replace(config, num_samples=5), capsys) for word in text.split()[1:-1]]
    assert sum(word in known for word in spoken) > 0.5 * len(spoken)


def test_greedy_decoding_is_deterministic(config, capsys):
    found = texts(replace(config, temperature=0.0, start="a"), capsys)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("given", "shown"), [([], 1), (["--num_samples=2"], 2), (["--interactive"], 1)])
def test_equal_samples_are_printed_once_unless_asked_for(config, capsys, monkeypatch, given, shown):
    lines = iter(["a"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    flags = [f"--out_dir={config.out_dir}", "--temperature=0", "--max_new_tokens=9", "--device=cpu", *given]
    sample.main(*load(sample.Config, flags))
    said = capsys.readouterr()
    assert said.err.count("--temperature=0: one sample per prompt") == (not given)
    assert said.out.count("-" * 15) == (0 if "--interactive" in given else shown)


def test_prompt_from_a_file(config, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("abc\nd", encoding="utf-8")
    found = texts(replace(config, start=f"FILE:{tmp_path / 'prompt.txt'}"), capsys)
    assert all(text.startswith("abc\nd") for text in found)
    with pytest.raises(UserError, match="give a UTF-8 text file"):
        sample.main(replace(config, start="FILE:nowhere.txt"))


def rows(config, capsys) -> list[dict]:
    sample.main(config)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_output_has_token_probabilities(config, capsys):
    found = rows(replace(config, json=True, logprobs=3, start="abc"), capsys)
    plain = texts(replace(config, start="abc"), capsys)
    assert ["abc" + row["text"] for row in found] == plain
    assert [(row["prompt"], row["prompt_number"], row["sample"]) for row in found] == [
        ("abc", 0, i) for i in range(3)
    ]
    for row in found:
        assert row["finish_reason"] == "length"
        assert "".join(token["text"] for token in row["tokens"]) == row["text"]
        for token in row["tokens"]:
            assert token["logprob"] <= token["top"][0]["logprob"] <= 0 and len(token["top"]) == 3
    assert "top" not in rows(replace(config, json=True), capsys)[0]["tokens"][0]


def test_prompts_from_a_file(config, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc", "id": 7}\n\n"d"\n', encoding="utf-8")
    together = replace(config, prompts=str(file), num_samples=2)
    found = texts(together, capsys)
    alone = [texts(replace(config, start=start, num_samples=2), capsys) for start in ("abc", "d")]
    assert found == alone[0] + alone[1]
    assert texts(replace(together, batch_size=1), capsys) == found
    for wrong, message in [
        ("{", "line 1 is not valid JSON"),
        ('{"text": "a"}', 'line 1: expected {"prompt"'),
        ("3", "line 1: expected"),
        ("\n", "contains no prompts"),
    ]:
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(message)):
            sample.main(together)


def test_streamed_text_equals_the_full_text(config, capsys):
    assert texts(replace(config, stream=True, start="ab"), capsys) == texts(
        replace(config, start="ab"), capsys
    )


def test_interactive_mode(config, capsys, monkeypatch):
    lines = ["d", "Z", "abc"]

    def typed(prompt: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop()

    monkeypatch.setattr("builtins.input", typed)
    sample.main(replace(config, interactive=True, temperature=0.0, max_new_tokens=20, stop=" "))
    captured = capsys.readouterr()
    expected = [
        texts(replace(config, start=s, temperature=0.0, max_new_tokens=20, num_samples=1), capsys)[0][
            len(s) :
        ]
        for s in ("abc", "d")
    ]
    assert captured.out == "".join(text.split(" ")[0] + "\n" for text in expected) + "\n"
    assert "'Z'" in captured.err  # and the session continued


def test_stop_strings(config, capsys):
    whole = texts(replace(config, start="a"), capsys)
    for stop, cut in (("b", ["b"]), ('["b", " "]', ["b", " "])):
        found = texts(replace(config, start="a", stop=stop), capsys)
        for text, full in zip(found, whole, strict=True):
            assert text == "a" + re.split("|".join(cut), full[1:])[0]
    for wrong in ("[1]", '[""]', "[a"):
        with pytest.raises(UserError, match=re.escape(f"--stop={wrong}")):
            sample.main(replace(config, stop=wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0 given"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 given"),
        ({"stream": True, "json": True}, "--stream and --json are mutually exclusive"),
        ({"prompts": "nowhere.jsonl"}, "--prompts=nowhere.jsonl"),
        ({"start": "FILE:nowhere.txt"}, "--start=FILE:nowhere.txt"),
        ({"start": "FILE:."}, "--start=FILE:."),
        ({"seed": 1 << 63}, "a seed has at most 63 bits"),
    ],
)
def test_invalid_options_are_rejected(config, wrong, message):
    with pytest.raises(UserError, match=message):
        sample.main(replace(config, **wrong))


def test_an_option_without_effect_is_mentioned(config, capsys, tmp_path):
    sample.main(replace(config, logprobs=3, num_samples=1))
    assert "note: --logprobs=3 has no effect without --json" in capsys.readouterr().err
    file = tmp_path / "prompts.jsonl"
    file.write_text('"abc\\r\\nd"\n', encoding="utf-8")
    given = replace(config, prompts=str(file), start="b", num_samples=1, json=True)
    sample.main(given, {"prompts": "", "start": "--start=b"})
    said = capsys.readouterr()
    assert said.err.count("note: ") == 1 and "note: --start has no effect with --prompts" in said.err
    assert json.loads(said.out)["prompt"] == "abc\nd"
    last = max(Path(config.out_dir).glob("step-*"))
    for name in (last, config.out_dir):
        sample.main(replace(config, init_from=str(name), which="last", num_samples=1))
        assert (f"note: --which=last has no effect on {name}" in capsys.readouterr().err) == (name == last)
    sample.main(replace(config, stop="\n", num_samples=1))
    assert "two characters" not in capsys.readouterr().err
    sample.main(replace(config, stop="\\n", num_samples=1))
    assert r"note: \n is two characters here; type $'\n' for a line break" in capsys.readouterr().err


def test_command_line_rejects_out_of_range_values():
    for wrong in ("--temperature=-1", "--top_p=2", "--top_k=-3", "--num_samples=0", "--dtype=int4"):
        with pytest.raises(UserError, match=re.escape(wrong)):
            load(sample.Config, [wrong])


def test_zero_tokens_can_be_requested(config, capsys):
    assert texts(replace(config, max_new_tokens=0, start="ab"), capsys) == ["ab"] * 3


def test_empty_prompt_starts_a_line(config, capsys):
    assert all(text.startswith("\n") for text in texts(replace(config, start=""), capsys))


def test_prompt_may_be_longer_than_the_context(config, capsys):
    assert texts(replace(config, start="abc d" * 20, max_new_tokens=3), capsys)[0].startswith("abc d" * 20)


def test_unknown_characters_are_reported(config):
    with pytest.raises(UserError, match="'é' 'Z'"):
        sample.main(replace(config, start="abéZ"))


def test_prompt_bytes_that_are_not_utf8_are_reported(config, tmp_path):
    """Lone surrogates from the command line or JSON; a byte tokenizer has no unknown characters."""
    for tokens in (CharTokenizer("a\n"), ByteTokenizer()):
        model = replace(nanogpt.load(config.out_dir, device="cpu"), open_tokenizer=lambda made=tokens: made)
        with pytest.raises(UserError, match="udcff"):
            model.generate("a\udcff")


def test_checkpoint_selection(config, capsys):
    for which in ("best", "last", "400"):
        assert len(texts(replace(config, which=which), capsys)) == 3
    with pytest.raises(UserError, match=r"no checkpoint '7'; use last, best or one of .*400"):
        sample.main(replace(config, which="7"))


def test_invalid_run_folders_are_rejected(config, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*nowhere"):
        sample.main(replace(config, out_dir=str(tmp_path / "nowhere")))
    tokenizer = Path(config.out_dir) / "tokenizer.json"
    tokenizer.write_text('{"format": "nanogpt-tokenizer-1", "type": "byte"}', encoding="utf-8")
    with pytest.raises(UserError, match="is not the tokenizer"):
        sample.main(config)
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        sample.main(config)


@pytest.mark.parametrize("kind", ["bpe:300", "gpt2"])
def test_run_folder_includes_every_kind_of_tokenizer(kind, tmp_path, capsys, of_kind):
    text = tmp_path / "x.txt"
    text.write_text("Grüße an 世界 🦊, und noch einmal: Grüße!\n" * 200, encoding="utf-8")
    corpus.prepare([text], tmp_path / "dataset", **of_kind(kind))
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "batch_size": 2}
    train.main(
        train.Config(
            out_dir=str(tmp_path / "out"),
            dataset=str(tmp_path / "dataset"),
            device="cpu",
            gradient_accumulation_steps=1,
            max_iters=2,
            warmup_iters=0,
            eval_iters=1,
            **sizes,
        )
    )
    shutil.rmtree(tmp_path / "dataset")
    capsys.readouterr()
    config = sample.Config(out_dir=str(tmp_path / "out"), num_samples=2, max_new_tokens=30, device="cpu")
    found = texts(replace(config, start="Grüße, 🦊<|endoftext|>"), capsys)
    assert len(found) == 2 and all(text.startswith("Grüße, 🦊<|endoftext|>") for text in found)
    assert len(texts(replace(config, start=""), capsys)) == 2
