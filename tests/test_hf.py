"""Hugging Face GPT-2 folders: logits equal to transformers', and rejection of incomplete folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from nanogpt import load
from nanogpt.convert import hf
from nanogpt.errors import UserError
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT2_SIZES
from nanogpt.tokenizer.gpt2 import load_gpt2
from tests import hf_folders

ROOT = Path(__file__).resolve().parent.parent
SHRUNK = {  # fewer layers and channels, same number of heads
    name: GPT2Config(
        n_layer=2, n_head=size.n_head, n_embd=4 * size.n_head, n_positions=48, vocab_size=300, bos_token_id=0
    )
    for name, size in GPT2_SIZES.items()
}


def reference(config: GPT2Config, folder: Path, **save) -> GPT2LMHeadModel:
    """Return a random transformers model with distinct weights, saved in `folder`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, **save)
    return model


def loaded(folder: Path, **fit):
    found = hf.open_folder(folder)
    return found.load(found.fitted(**fit))


@torch.no_grad()
def agree(model, theirs, length: int = 40) -> None:
    idx = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHRUNK)
def test_logits_equal_transformers(name, tmp_path):
    theirs = reference(SHRUNK[name], tmp_path)
    agree(loaded(tmp_path), theirs)


def test_full_size_model_loads_in_bounded_memory(tmp_path):
    """GPT-2 (124M): equal logits; loading takes at most 1.2 GB in a separate process."""
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    hf_folders.write(tmp_path, **shape)
    code = (
        "import sys, pathlib, torch; from nanogpt.convert import hf;"
        "f = hf.open_folder(pathlib.Path(sys.argv[1]));"
        "m = f.load(f.fitted(vocab_multiple=64)); assert m.n_params() == 124439808, m.n_params();"
        "print(pathlib.Path('/proc/self/status').read_text() if sys.platform == 'linux' else '');"
        "torch.save(m(torch.arange(0, 50000, 5000)[None])[0].detach(), sys.argv[1] + '/logits')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux":
        peak_kib = int(done.stdout.split("VmHWM:")[1].split()[0])
        assert peak_kib * 1024 < 1.2e9
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config()).eval()
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(weights, assign=True)
    expected = theirs(torch.arange(0, 50000, 5000)[None]).logits
    torch.testing.assert_close(
        torch.load(tmp_path / "logits", weights_only=True), expected, rtol=0, atol=1e-5
    )
    (tmp_path / "model.safetensors").unlink()  # 0.5 GB that pytest would keep


def without_prefix(folder: Path) -> GPT2LMHeadModel:
    model = reference(SHRUNK["gpt2"], folder)
    model.transformer.save_pretrained(folder)
    assert isinstance(model.transformer, GPT2Model)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    return model


def with_buffers_and_head(folder: Path) -> GPT2LMHeadModel:
    """Write a file as converted by transformers 4: with causal mask buffers and a duplicate LM head."""
    model = reference(SHRUNK["gpt2"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    for i in range(2):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")
    return model


def untied(folder: Path) -> GPT2LMHeadModel:
    config = GPT2Config(**SHRUNK["gpt2"].to_dict() | {"tie_word_embeddings": False})
    model = reference(config, folder)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    return model


def in_shards(folder: Path) -> GPT2LMHeadModel:
    model = reference(SHRUNK["gpt2"], folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return model


def exact_gelu(folder: Path) -> GPT2LMHeadModel:
    return reference(GPT2Config(**SHRUNK["gpt2"].to_dict() | {"activation_function": "gelu"}), folder)


@pytest.mark.parametrize("make", [without_prefix, with_buffers_and_head, untied, in_shards, exact_gelu])
def test_file_layouts_load_equally(make, tmp_path):
    theirs = make(tmp_path)
    agree(loaded(tmp_path), theirs)


def rewritten(folder: Path, drop: str, add: dict) -> None:
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in about.items() if key not in drop.split()}
    (folder / "config.json").write_text(json.dumps(kept | add), encoding="utf-8")


ALIASES = {"num_attention_heads": 4, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("drop", "add"),
    [
        ("n_positions", {"n_ctx": 48}),
        ("", {"n_ctx": 24}),  # as transformers, which ignores it
        ("model_type", {}),
        ("model_type architectures n_positions", {"n_ctx": 48}),  # a file of 2019
        ("n_head", {"num_attention_heads": 4}),  # 12 also divides 48
        ("n_head n_embd n_layer n_positions", ALIASES),
        ("", {"activation_function": "gelu_fast"}),
        ("", {"n_inner": 192, "reorder_and_upcast_attn": True, "dtype": "float7", "id2label": None}),
    ],
    ids=str,
)
def test_old_and_unusual_configurations_load_equally(drop, add, tmp_path):
    theirs = reference(GPT2Config(**SHRUNK["gpt2"].to_dict() | {"n_head": 4}), tmp_path)
    rewritten(tmp_path, drop, add)
    agree(loaded(tmp_path), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_load_as_float32(dtype, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(SHRUNK["gpt2"]).to(dtype).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = loaded(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    agree(model, theirs)


def test_block_size_crops_the_context(tmp_path):
    theirs = reference(SHRUNK["gpt2"], tmp_path)
    model = loaded(tmp_path, block_size=16)
    assert model.config.block_size == 16 and model.position.wpe.weight.shape == (16, 48)
    agree(model, theirs, length=16)
    with pytest.raises(UserError, match=r"block_size=64 exceeds the 48 of"):
        hf.open_folder(tmp_path).fitted(block_size=64)


def test_vocabulary_padding_changes_nothing_and_is_never_sampled(tmp_path):
    hf_folders.write(tmp_path, vocab_size=50257)
    plain, padded = loaded(tmp_path), loaded(tmp_path, vocab_multiple=64)
    assert padded.wte.weight.shape[0] == 50304 and not padded.wte.weight[50257:].any()
    idx = torch.arange(20)[None]
    assert torch.equal(plain(idx)[0], padded(idx)[0])
    with torch.no_grad():  # maximal logits if the padding were used
        padded.wte.weight[50257:] = 100 * plain.ln_f.weight
    texts = [Text([1, 2], SamplingOptions(temperature=5.0), seed=i) for i in range(8)]
    decoder = Engine(padded, 8)
    decoder.add(texts)
    for _ in range(20):
        decoder.step()
    assert max(token for text in texts for token in text.new) < 50257


def test_rows_beyond_the_tokenizer_are_padding(tmp_path):
    """An embedding of 50,304 rows, as in nanoGPT exports, of which GPT-2's tokenizer uses 50,257."""
    found = hf.open_folder(hf_folders.write(tmp_path, vocab_size=50304))
    assert (found.config.vocab_size, found.config.padded_vocab_size) == (50257, 50304)
    kept = found.load(found.fitted()).wte.weight
    assert torch.equal(
        kept, hf_folders.tensors(**hf_folders.SMALL | {"vocab_size": 50304})["transformer.wte.weight"]
    )


def test_loaded_weights_are_not_views_of_the_file(tmp_path):
    model = loaded(hf_folders.write(tmp_path))
    before = model.wte.weight.clone()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(model.wte.weight, before)


# ----------------------------------------------------------------------------- tokenizers


def test_tokenizer_is_loaded_with_the_model(tmp_path, merges):
    from nanogpt.tokenizer import tokenizer, vocabulary

    folder = hf_folders.write(tmp_path / "a", merges=merges, vocab_size=vocabulary.GPT2_VOCAB_SIZE)
    text = hf.open_folder(folder).tokenizer
    assert json.loads(text)["merges"] == merges.read_text(encoding="utf-8")
    ids = tokenizer.from_text(text).encode("Hello world!").tolist()
    assert ids == load_gpt2(str(merges)).encode("Hello world!").tolist()

    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    value = hf_folders.tokenizer_json(merges)
    for form in (lines, [line.split(" ") for line in lines]):  # formats of older and newer files
        (folder / "merges.txt").unlink(missing_ok=True)
        value["model"]["merges"] = form
        (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        assert hf.open_folder(folder).tokenizer == text


@pytest.mark.parametrize("with_merges", [True, False])
def test_tokens_of_gpt2_with_other_ids_are_read_as_they_are(with_merges, tmp_path, merges):
    from nanogpt.tokenizer import tokenizer, vocabulary

    size = vocabulary.GPT2_VOCAB_SIZE
    folder = hf_folders.write(tmp_path / "a", merges=merges if with_merges else None, vocab_size=size)
    value = hf_folders.tokenizer_json(merges)
    vocab = value["model"]["vocab"]
    usual = load_gpt2(str(merges)).encode("Hello world!").tolist()
    for first, second in ((usual[0], usual[0]), (usual[0], usual[1])):
        swap = {first: second, second: first}
        value["model"]["vocab"] = {token: swap.get(i, i) for token, i in vocab.items()}
        (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        own = tokenizer.from_text(hf.open_folder(folder).tokenizer)
        assert own.kind == ("gpt2" if first == second else "hf")
        assert own.encode("Hello world!").tolist() == [swap.get(i, i) for i in usual]


def test_weights_without_tokenizer_files_load_without_a_network(tmp_path, monkeypatch):
    """GPT-2's vocabulary is looked for when there is text to encode."""
    folder = hf_folders.write(tmp_path / "model")
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    model = load(folder, device="cpu", dtype="float32")
    assert model.model(torch.arange(5)[None])[0].shape == (1, 5, 50257)
    for needs_text in (lambda: model.generate("x"), lambda: model.score("x"), lambda: model.decode([1])):
        with pytest.raises(UserError, match=r"^https://\S*vocab\.bpe could not be downloaded"):
            needs_text()


def test_chinese_gpt2_generates_with_its_vocab_txt(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"第一章我们的，。ab"]
    folder = hf_folders.write(tmp_path, vocab_size=len(tokens))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    model = load(folder, device="cpu")
    assert model.encode("第一章") == [5, 6, 7]
    assert model.generate("第一章", max_new_tokens=3)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "vocab.json"])
def test_another_kind_of_tokenizer_is_not_taken_for_gpt2s(name, tmp_path):
    """Many GPT-2s for other languages kept GPT-2's number of ids."""
    folder = hf_folders.write(tmp_path)
    assert hf.open_folder(folder).tokenizer
    (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer of .* is unknown"):
        load(folder, device="cpu").generate("x")


@pytest.mark.parametrize("rows", [50259, 50261, 50263, 50275, 50300])
def test_rows_of_added_tokens_are_not_dropped(rows, tmp_path, real):
    """After resize_token_embeddings, without the file that names the new tokens."""
    folder = hf_folders.write(tmp_path, merges=real("gpt2/vocab.bpe"), vocab_size=rows)
    with pytest.raises(UserError, match=rf"has {rows} rows, the tokenizer 50257 ids; give the"):
        hf.open_folder(folder)


def test_different_tokenizer_is_rejected(tmp_path):
    hf_folders.write(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"merges\.txt: unsupported tokenizer"):
        hf.open_folder(tmp_path)


# ----------------------------------------------------------------------------- incomplete folders


def edited(folder: Path, edit) -> Path:
    weights = load_file(hf_folders.write(folder, vocab_size=300) / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), r"1 missing: h\.1\.mlp\.c_fc\.bias$"),
        (lambda w: [w.pop(name) for name in list(w) if ".ln_" in name], r"10 missing: h\.0\.ln_1.*, \.\.\."),
        (lambda w: w.update({"h.2.extra": torch.zeros(3)}), r"1 unexpected: h\.2\.extra$"),
        (
            lambda w: w.update({"transformer.wpe.weight": torch.zeros(31, 16)}),
            r"1 of wrong shape: wpe\.weight \[31, 16\], expected \[32, 16\]",
        ),
        (
            lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}),
            r"h\.0\.mlp\.c_fc\.weight \[64, 16\], expected \[16, 64\]",
        ),
        # quantized: integers without their scale
        (lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(16, 64).char()}), "has .* as I8"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.ones(16).byte()}), r"ln_f\.bias as U8"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.ones(16).to(torch.float8_e5m2)}), "as F8_E5M2"),
        (lambda w: w.update({"wte.weight": torch.ones(300, 16)}), r"has .*wte\.weight twice"),
        (
            lambda w: w["transformer.h.1.ln_1.bias"].fill_(torch.nan),
            r"h\.1\.ln_1\.bias has values that are not",
        ),
        (lambda w: w["transformer.wpe.weight"][:1].fill_(torch.inf), r"wpe\.weight has values that are not"),
    ],
)
def test_mismatched_tensors_are_rejected(edit, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        loaded(edited(tmp_path, edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_not_ignored(beside, tmp_path):
    """In a folder of its own, as PEFT writes it, or beside the weights it belongs to."""
    if beside:
        hf_folders.write(tmp_path, vocab_size=300)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"has a PEFT adapter, .*\.merge_and_unload\(\)\.save_pretrained"):
        hf.open_folder(tmp_path)


def test_tied_head_that_differs_from_the_embedding_is_rejected(tmp_path):
    edited(tmp_path, lambda w: w.update({"lm_head.weight": torch.ones(300, 16)}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'gpt2'"),
        ({"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon=1e-06 \(GPT-2: 1e-05\)"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "tanh"}, r"activation_function='tanh' \(known: gelu_new"),
        ({"n_inner": 99}, "n_inner=99"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
        ({"n_layer": "two"}, r"n_layer='two' \(a positive integer, here at most 28\)"),
        ({"n_layer": 10**9}, "n_layer=1000000000"),  # would build a billion layers
        ({"n_embd": 10**9}, "n_embd=1000000000"),
        ({"n_positions": 10**30}, "n_positions=1000000"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_attention_heads": 4}, "n_head=2 and num_attention_heads=4"),
        ({"activation_function": ["gelu"]}, "activation_function="),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' .true or false."),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None .true or false."),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config={'quant_method'"),
        ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "model_type is None"),
    ],
)
def test_models_other_than_gpt2_are_rejected(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        hf.open_folder(hf_folders.write(tmp_path, changes, vocab_size=300))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "about", [{}, [1], None, "gpt2", {"architectures": ["GPTNeoForCausalLM"], "n_head": 2}]
)
def test_a_configuration_that_names_no_gpt2_is_rejected(about, tmp_path):
    folder = hf_folders.write(tmp_path, vocab_size=300)
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(UserError, match=r"model_type is None; only 'gpt2'|not an object"):
        hf.open_folder(folder)


def test_missing_or_truncated_files_are_reported(tmp_path):
    folder = hf_folders.write(tmp_path / "half", vocab_size=300)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged or partially downloaded .*; download it again"):
        hf.open_folder(folder)
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid x", encoding="utf-8"
    )
    with pytest.raises(UserError, match="Git LFS pointer"):
        hf.open_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        hf.open_folder(folder)
    (folder / "model.ckpt.index").touch()
    with pytest.raises(UserError, match="TensorFlow checkpoint, which is not supported"):
        hf.open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        hf.open_folder(folder)


def test_missing_shard_is_reported(tmp_path):
    in_shards(tmp_path)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"has \d of \d shards: {lost.name} is missing; download the rest"):
        hf.open_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"wte.weight": "../other.safetensors"}}', encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"not text naming a file in the same folder",
    ):
        hf.open_folder(tmp_path)


def test_pickled_weights_are_rejected_and_conversion_works(tmp_path):
    theirs = reference(SHRUNK["gpt2"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights") as caught:
        hf.open_folder(tmp_path)
    command = str(caught.value).partition("once: ")[2].replace("python -c", f'"{sys.executable}" -c')
    subprocess.run(command, shell=True, check=True)
    agree(loaded(tmp_path), theirs)


def test_tokens_added_to_gpt2_are_kept(real, tmp_path):
    """As after add_special_tokens and resize_token_embeddings: <|startoftext|> has an id of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    merges = real("gpt2/vocab.bpe")
    vocab = json.loads(real("gpt2/encoder.json").read_text(encoding="utf-8"))
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:] if line]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|startoftext|>", "<|pad|>"])
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 50259}
    folder = hf_folders.write(tmp_path / "model", merges=merges, **shape)
    made.save(str(folder / "tokenizer.json"))
    loaded = load(str(folder))
    assert loaded.tokenizer.vocab_size == 50259
    assert loaded.tokenizer.encode_prompt("<|startoftext|>Hi") == [50257, 17250]


def test_tokens_in_added_tokens_json_are_not_taken_for_padding(real, tmp_path):
    """As saved by older versions, with the embedding padded to a multiple of 64."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 50304}
    folder = hf_folders.write(tmp_path / "model", merges=real("gpt2/vocab.bpe"), **shape)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    vocab = real("gpt2/encoder.json").read_text(encoding="utf-8")
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "added_tokens.json").write_text('{"<|user|>": 50257, "<|bot|>": 50258}', encoding="utf-8")
    loaded = load(str(folder))
    assert loaded.tokenizer.vocab_size == 50259
    assert loaded.tokenizer.encode_prompt("<|user|>hi<|bot|>") == [50257, 5303, 50258]
