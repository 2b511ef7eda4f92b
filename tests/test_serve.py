"""The OpenAI completions API for external clients: serve.py in a subprocess, with real sockets."""

import json
import math
import tomllib

import pytest
import torch

import serve
from nanogpt import ROOT
from nanogpt.checkpoint import reader
from nanogpt.convert import hf_tokenizer
from nanogpt.inference.engine import score
from nanogpt.tokenizer import tokenizer
from tests import launch
from tests.serving import serving, train_small


def test_packages_to_install_are_those_of_the_extra():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = listed["project"]["optional-dependencies"]["serve"]
    assert serve.PACKAGES.split() == [package.partition(">")[0] for package in wanted]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    # n-gram tables: slots must keep the ids before each token
    return train_small(tmp_path_factory.mktemp("served"), ngram_orders="2,3", ngram_rows=200)


@pytest.fixture(scope="module")
def server(out):
    with serving(out) as running:
        yield running


@pytest.fixture(scope="module")
def model(out):
    found, _ = reader.find(out, "best")
    tokens = tokenizer.from_text((out / "tokenizer.json").read_text(encoding="utf-8"))
    return found.load_model(), tokens


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_client_lists_the_model(client, out):
    assert [entry.id for entry in client.models.list()] == [out.name]
    assert client.models.retrieve(out.name).owned_by == "nanogpt"


def test_openai_client_gets_the_model_output(client, out, model):
    gpt, tokens = model
    answer = client.completions.create(model=out.name, prompt="abc", max_tokens=20, temperature=0)
    ids = tokens.encode_prompt("abc")
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(gpt(torch.tensor([ids]))[0][:, -1].argmax()))
    assert answer.choices[0].text == tokenizer.decode(tokens, ids[3:])
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)


def test_streamed_and_full_responses_are_equal(client, out):
    asked = {"model": out.name, "prompt": ["ab", "c d"], "n": 2, "max_tokens": 90, "seed": 5, "logprobs": 3}
    whole = client.completions.create(**asked)
    texts, tokens, finish = [""] * 4, [[] for _ in range(4)], [None] * 4
    for event in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs
            finish[choice.index] = choice.finish_reason or finish[choice.index]
        usage = event.usage
    assert texts == [choice.text for choice in whole.choices]
    # Batching may change the last bits of a product, so texts may diverge where two tokens are nearly tied.
    for mine, choice in zip(tokens, whole.choices, strict=True):
        assert mine == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    assert finish == ["length"] * 4 and usage.completion_tokens == 360
    assert len(set(texts)) == 4


def test_seeded_text_is_independent_of_concurrent_requests(server):
    def text(**fields):
        return [c["text"] for c in server.complete(prompt="abc", max_tokens=40, seed=7, **fields)["choices"]]

    assert text() == text(n=5)[:1] == text()
    assert text(n=5) == text(n=5)


def test_echo_and_logprobs_are_exact(server, model):
    gpt, tokens = model
    ids = tokens.encode_prompt("abc def\ngh")
    for fields in ({"max_tokens": 0}, {"max_tokens": 1}):
        answer = server.complete(prompt=[ids, ids[:4]], echo=True, logprobs=2, temperature=0, **fields)
        for choice, given in zip(answer["choices"], (ids, ids[:4]), strict=True):
            logprobs = choice["logprobs"]
            assert choice["text"].startswith(tokenizer.decode(tokens, given))
            assert len(logprobs["token_logprobs"]) == len(given) + fields["max_tokens"]
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            expected = [token.logprob for token in score(gpt, given, 2)]
            found = logprobs["token_logprobs"][1 : len(given)]
            assert found == pytest.approx(expected, abs=1e-5)
            for value, top in zip(found, logprobs["top_logprobs"][1:], strict=False):
                assert value in top.values() and len(top) in (2, 3)
            assert "".join(logprobs["tokens"]) == choice["text"]
            assert logprobs["text_offset"] == list(range(len(choice["text"])))  # each token is one character


def test_first_token_follows_the_model_distribution(server, model):
    """Chi-square test of 1,280 first tokens against the model's probabilities, at p = 0.001."""
    gpt, tokens = model
    with torch.inference_mode():
        expected = gpt(torch.tensor([tokens.encode_prompt("abc ")]))[0][:, -1][0].softmax(-1)
    counts = torch.zeros(tokens.vocab_size)
    for seed in range(20):
        answer = server.complete(prompt="abc ", max_tokens=1, n=64, seed=seed * 1000)
        for choice in answer["choices"]:
            counts[tokens.encode_prompt(choice["text"])[0]] += 1
    expected = expected * counts.sum()
    kept = expected >= 5
    pooled = torch.cat([expected[kept], expected[~kept].sum()[None]])
    found = torch.cat([counts[kept], counts[~kept].sum()[None]])
    pooled, found = pooled[pooled > 0.5], found[pooled > 0.5]
    degrees = len(pooled) - 1
    statistic = float(((found - pooled) ** 2 / pooled).sum())
    assert statistic < degrees + 3.3 * math.sqrt(2 * degrees) + 7  # approximately the 99.9% quantile


def test_stop_strings_end_the_text_and_are_excluded(server):
    free = server.complete(prompt="abc", max_tokens=60, seed=3)["choices"][0]["text"]
    stop = free[10:13]  # spans token boundaries
    stopped = server.complete(prompt="abc", max_tokens=60, seed=3, stop=[stop, "zzz"])["choices"][0]
    assert stopped["text"] == free[: free.index(stop)] and stopped["finish_reason"] == "stop"


def test_lm_eval_through_the_server_gives_equal_scores(server, out, model, monkeypatch, tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    gpt, tokens = model
    hf_tokenizer.write(tmp_path, tokens)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=out.name,
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        max_length=64,
        batch_size=4,
    )
    pairs = [("abc de", "f"), ("gh ", "abc"), ("a", "b c d"), ("hgf ", "\n"), ("ab ", "ba")]
    encoded = [(pair, tokens.encode_prompt(pair[0]), tokens.encode_prompt(pair[1])) for pair in pairs]
    found = theirs._loglikelihood_tokens(encoded)
    for (logprob, greedy), (_, context, target) in zip(found, encoded, strict=True):
        expected = score(gpt, context + target, 1)[-len(target) :]
        assert logprob == pytest.approx(sum(token.logprob for token in expected), abs=1e-5)
        assert greedy == all(token.id == token.top[0][0] for token in expected)
    text = server.complete(prompt="abc", max_tokens=5, temperature=0)["choices"][0]["text"]
    generated = theirs.model_call(["abc"], generate=True, gen_kwargs={"max_gen_toks": 5, "until": None})
    assert theirs.parse_generations(generated) == [text]


BAD = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["ab", ""]}, "prompt"),
    ({"prompt": "abZé"}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a" * 65}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_p": 1.1}, "top_p"),
    ({"prompt": "a", "top_k": -1}, "top_k"),
    ({"prompt": "a", "min_p": 2}, "min_p"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x", ""]}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1 << 40}, "max_tokens"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "suffix": "z"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
def test_invalid_requests_are_400_and_name_the_field(server, fields, param):
    status, content = server.ask("/v1/completions", fields)
    error = json.loads(content)["error"]
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error", error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b'{"prompt": "a", "temperature": NaN}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"9" * 5000,
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": ' + b"9" * 4000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_malformed_bodies_are_rejected(server, body):
    status, content = server.ask("/v1/completions", body)
    assert status == 400 and json.loads(content)["error"]["message"]


def test_unknown_model_is_404(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="model 'gpt-9' not found"):
        client.completions.create(model="gpt-9", prompt="a")


def test_health_and_metrics(server):
    assert server.ask("/health")[0] == 200
    before = server.meter("generated_tokens_total")
    server.complete(prompt="a", max_tokens=7)
    assert server.meter("generated_tokens_total") == before + 7
    assert server.meter("active") == server.meter("waiting") == 0


def test_full_queue_is_429(out):
    with serving(out, "--slots=2", "--queue=4") as small:
        import threading

        statuses = []
        asked = {"prompt": "a", "n": 3, "max_tokens": 400}

        def ask():
            statuses.append(small.ask("/v1/completions", asked)[0])

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert small.ask("/v1/completions", {"prompt": "a", "n": 5})[0] == 400  # can never fit: not 429


def test_startup_errors_are_one_line(out, server, tmp_path):
    def run(*options: str) -> str:
        done = launch.run(["serve.py", *options], ROOT)
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert f"--port={server.port}" in run(f"--out_dir={out}", f"--port={server.port}")
    assert "no checkpoint" in run(f"--out_dir={tmp_path}", "--port=0")
    assert "give an address of this host" in run(f"--out_dir={out}", "--host=no.such.host.invalid")
