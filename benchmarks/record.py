"""Compare the outputs of two commits bitwise: a regression test for refactorings.

    python -m benchmarks.record BASE                   # a commit against this working tree
    python -m benchmarks.record BASE HEAD              # against another commit
    python -m benchmarks.record BASE --only=finetune   # cases whose name contains this, and their inputs

A case is a command run in a fresh checkout on small generated data: prepare, train every preset (reduced to
two blocks of 32 channels and a few iterations), resume, finetune, train in two processes, sample, score,
export, serve. SHA-256 digests of its outputs are compared: token files, weights and optimizer state, logged
rows, texts, HTTP responses. Times, ids, paths, versions and code are ignored. Exits with 1 unless all are
equal.

Both sides run concurrently, each on one thread. Run it from the repository root, on Linux; it takes three
minutes on two cores. With NANOGPT_TEST_DATA it also covers GPT-2's vocabulary.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks import shared
from nanogpt import ROOT
from nanogpt.config import load_with_arguments
from nanogpt.errors import UserError, run_program

# JSON keys that depend on time, place or software versions.
LEFT_OUT = {"step_s", "tokens_per_s", "elapsed_s", "mfu", "seconds", "created", "id", "commit", "command"}
LEFT_OUT |= {"environment", "python", "torch", "numpy", "device", "instructions", "source", "machine"}
LEFT_OUT |= {"share", "peak_memory_bytes", "clock_s", "evaluation_s"}  # of newer commits
LEFT_OUT |= {"p", "message"}  # p-values of random permutations, and texts of error messages
NEW_MODEL = {"ngram_orders", "ngram_rows"}  # settings of the model added since
NEW_STATE = {
    "data",
    "share",
    "clock_s",
    "evaluation_s",
    "ramp",
}  # keys of state.json that older commits do not write
# Renamed options: {"old": "new"}; options missing on one side are ignored.
RENAMED: dict[str, str] = {}

# Abbreviations used in commands. {W} is the working folder of a side, with its inputs and results.
SHORT = {
    "{TWO}": "-m torch.distributed.run --standalone --nproc_per_node=2 {TRAIN} --backend=gloo {CODE}",
    "{TRAIN}": "train.py --device=cpu --dtype=float32 --compile=False --n_layer=2 --n_head=2 --n_embd=32 "
    "--block_size=32 {ITERS}",
    "{ITERS}": "--batch_size=4 --gradient_accumulation_steps=2 --batch_tokens=0 --max_iters=6 "
    "--eval_interval=3 --eval_iters=2 --log_interval=1 --warmup_iters=2 --lr_decay_iters=6 "
    "--save_interval=0 --dropout=0.1",
    "{CODE}": "--dataset={W}/code",
    "{FAST}": "--optimizer=muon --position=rope --norm=rms --qk_norm=True --tied=False --softcap=15 "
    "--smear=True --init=zero --activation=relu2 --muon_weight_decay=0.1",
    "{CPU}": "--device=cpu --dtype=float32",
}
CASES = {
    "prepare characters": "data/prepare.py {W}/code.txt --out={W}/code",
    "prepare bytes in shards": "data/prepare.py {W}/code.txt --out={W}/bytes --tokenizer=byte "
    "--shard_tokens=30000",
    "prepare rows": "data/prepare.py {W}/rows.jsonl --out={W}/rows --tokenizer=bpe:300",
    "prepare pairs": "data/prepare.py {W}/pairs.jsonl --out={W}/pairs --tokenizer=bpe:300 "
    "--text_key=prompt+response",
    "prepare by a tokenizer.json": "data/prepare.py {W}/code.txt --out={W}/more "
    "--tokenizer={W}/rows/tokenizer.json",
    "prepare python_stdlib": "data/python_stdlib/prepare.py --out={W}/stdlib",
    "train": "{TRAIN} {CODE} --out_dir={W}/plain",
    "train GPT-2's shape": "{TRAIN} {CODE} --out_dir={W}/gpt2 --bias=True --vocab_multiple=1",
    "train the fast recipe": "{TRAIN} {CODE} --out_dir={W}/fast {FAST}",
    "train in bfloat16": "{TRAIN} {CODE} --out_dir={W}/bfloat16 {FAST} --dtype=bfloat16",
    "train grouped queries": "{TRAIN} {CODE} --out_dir={W}/grouped --position=alibi --n_kv_head=1 "
    "--activation=swiglu --recompute=True",
    "train a batch ramp": "{TRAIN} {CODE} --out_dir={W}/ramp --batch_ramp_tokens=500 --lr_schedule=wsd",
    "train rows": "{TRAIN} --dataset={W}/rows --out_dir={W}/by-rows --documents=rows",
    "train masked documents": "{TRAIN} --dataset={W}/rows --out_dir={W}/masked --documents=masked",
    "train prompts and responses": "{TRAIN} --dataset={W}/pairs --out_dir={W}/answers --block_size=64",
    "train a mixture": "{TRAIN} --dataset={W}/rows:0.7,{W}/more:0.3 --out_dir={W}/mixture",
    "train with samples": "{TRAIN} {CODE} --out_dir={W}/watched --sample_prompt=def --sample_tokens=8 "
    "--eval_tasks={W}/quiz.jsonl --eval_tasks_items=5",
    "train in halves": "{TRAIN} {CODE} --out_dir={W}/halves --max_iters=3 && "
    "{TRAIN} {CODE} --out_dir={W}/halves --init_from=resume",
    "train under DDP": "{TWO} --out_dir={W}/ddp --parallel=ddp",
    "train under FSDP": "{TWO} --out_dir={W}/fsdp --parallel=fsdp --optimizer=muon --dropout=0",
    "finetune": "{TRAIN} {CODE} --init_from={W}/plain --out_dir={W}/finetuned --freeze=wte*",
    "finetune with LoRA": "{TRAIN} {CODE} --init_from={W}/plain --out_dir={W}/lora --lora_rank=4",
    "export for transformers": "export.py --out_dir={W}/gpt2 --to={W}/hf",
    "export with its code": "export.py --out_dir={W}/fast --to={W}/hf-code --custom_code=True",
    "export for nanoGPT": "export.py --out_dir={W}/gpt2 --to={W}/nano --format=nanogpt",
    "finetune an export": "train.py {CPU} {ITERS} {CODE} --init_from={W}/hf --out_dir={W}/hf-finetuned",
    "finetune nanoGPT's checkpoint": "train.py {CPU} {ITERS} {CODE} --init_from={W}/nano/ckpt.pt "
    "--out_dir={W}/nano-finetuned",
    "sample": "sample.py --out_dir={W}/plain {CPU} --num_samples=3 --max_new_tokens=60",
    "sample the likeliest": "sample.py --out_dir={W}/gpt2 {CPU} --start=def --temperature=0 "
    "--max_new_tokens=80",
    "sample as JSON": "sample.py --out_dir={W}/fast {CPU} --prompts={W}/prompts.jsonl --json --logprobs=3 "
    "--top_p=0.9 --num_samples=2 --repetition_penalty=1.2 --max_new_tokens=40",
    "sample in int8": "sample.py --out_dir={W}/fast --device=cpu --dtype=int8 --num_samples=2 "
    "--max_new_tokens=40",
    "score": "eval.py {W}/plain {CPU} --text={W}/code.txt --limit=50 --out={W}/score.json",
    "score two": "eval.py {W}/plain {CPU} --tasks={W}/quiz.jsonl --against={W}/gpt2 --out={W}/tasks.json",
    "serve": "serve.py --out_dir={W}/plain {CPU} --port=0",
}
# Only if NANOGPT_TEST_DATA has GPT-2's merges.
GPT2_CASES = {
    "prepare GPT-2's tokens": "data/prepare.py {W}/code.txt --out={W}/ids --tokenizer=gpt2 "
    "--gpt2_bpe={DATA}/gpt2",
    "train GPT-2's vocabulary": "{TRAIN} --dataset={W}/ids --out_dir={W}/large --block_size=64",
}
PROMPTS = ["def ", "import os\n", "class A"]
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "def ", "max_tokens": 20, "temperature": 0},
    {"prompt": PROMPTS, "max_tokens": 12, "seed": 3, "logprobs": 2, "n": 2},
    {"prompt": "class A", "max_tokens": 9, "seed": 5, "stop": ["\n"], "echo": True},
    {"prompt": "import", "max_tokens": 6, "seed": 1, "stream": True},
    {"prompt": "x", "max_tokens": -1},  # rejected
]


@dataclass(frozen=True)
class Config:
    only: str = ""  # run only cases whose name contains this, and those they depend on


def every_case() -> dict[str, str]:
    """Return the commands of all cases by name, including presets."""
    found = CASES | {f"preset {path.stem}": preset(path) for path in sorted((ROOT / "config").glob("*.py"))}
    if data := os.environ.get("NANOGPT_TEST_DATA"):
        found |= {
            name: command.replace("{DATA}", str(Path(data).resolve())) for name, command in GPT2_CASES.items()
        }
    for short, words in SHORT.items():
        found = {name: command.replace(short, words) for name, command in found.items()}
    return found


def preset(path: Path) -> str:
    """Return the reduced command of a preset; init_from GPT-2 is replaced by the model trained here."""
    shrunk = "{TRAIN}"
    if "init_from" in path.read_text(encoding="utf-8"):
        shrunk = "train.py {CPU} {ITERS} --init_from={W}/gpt2"
    shrunk = shrunk.replace("train.py", f"train.py config/{path.name}")
    return f"{shrunk} {{CODE}} --eval_tasks= --sample_prompt= --out_dir={{W}}/{path.stem}"


def written(command: str) -> list[str]:
    """Return the files and folders in {W} that a command creates."""
    option = "out_dir" if "train.py" in command else "out|to"
    return list(dict.fromkeys(re.findall(rf"--(?:{option})=\{{W\}}/(\S+)", command)))


def closure(every: dict[str, str], names: list[str]) -> list[str]:
    """Return `names`, each preceded by the cases whose results it reads."""
    makers = {result: name for name, command in every.items() for result in written(command)}
    found: dict[str, None] = {}
    for name in names:
        read = re.findall(r"\{W\}/([\w-]+)", every[name])
        needed = [makers[result] for result in read if makers.get(result, name) != name]
        found |= dict.fromkeys([*closure(every, needed), name])
    return list(found)


# ----------------------------------------------------------------------------- one side


class Side:
    """A checkout and its working folder {W}."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work = root, work
        work.mkdir()
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "NANOGPT_CACHE": str(work / "cache")}
        self.environment = {**os.environ, **own}
        write_inputs(work)

    def run(self, command: str) -> dict[str, str]:
        """Run `command`; return the digest of each result by name, or {"failed": error} if it fails."""
        output = ""
        for part in command.replace("{W}", str(self.work)).split(" && "):
            if part.startswith("serve.py"):
                return {"answers": digest(self.hide(list(self.answers(part.split()))))}
            arguments = [sys.executable, *part.split()]
            how: dict[str, Any] = {
                "cwd": self.root,
                "env": self.environment,
                "capture_output": True,
                "text": True,
            }
            done = subprocess.run(arguments, **how)
            output = done.stdout
            if done.returncode:
                return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        found = {}
        for path in (self.work / name for name in written(command)):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    found |= {name: digest(value) for name, value in self.contents(file).items()}
        return found or {"output": digest(self.hide(printed(output)))}

    def contents(self, file: Path) -> dict[str, Any]:
        """Return the values of `file` to compare, by name: its content, and each option of a run."""
        name = file.relative_to(self.work).as_posix()
        if file.name in (".lock", "manifest.json") or file.suffix == ".py":
            return {}  # manifests hold digests of files compared here
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as saved:
                tensors = {key: saved.get_tensor(key) for key in sorted(saved.keys())}
            return {name: {key: (tensor.shape, tensor.tolist()) for key, tensor in tensors.items()}}
        if file.suffix == ".jsonl":
            return {
                name: self.hide([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
            }
        if file.suffix != ".json":
            return {name: file.read_bytes().hex()}
        value = self.hide(json.loads(file.read_text(encoding="utf-8")))
        options = value.pop("options", {}) if isinstance(value, dict) else {}
        if isinstance(value, dict) and isinstance(value.get("model"), dict):
            value["model"] = {key: saved for key, saved in value["model"].items() if key not in NEW_MODEL}
        if file.name == "state.json":
            value = {key: saved for key, saved in value.items() if key not in NEW_STATE}
        if file.name != "config.json":  # every checkpoint repeats the options
            options = {}
        return {name: value} | {f"{name} --{key}": option for key, option in options.items()}

    def hide(self, value: Any) -> Any:
        """Return `value` without what differs between runs of the same commit; options are renamed."""
        if isinstance(value, dict):
            return {RENAMED.get(k, k): self.hide(v) for k, v in value.items() if k not in LEFT_OUT}
        if isinstance(value, list):
            return [self.hide(one) for one in value]
        if isinstance(value, str):
            return value.replace(str(self.work), "").replace(str(self.root), "")
        return value

    def answers(self, words: list[str]) -> Iterator[Any]:
        """Yield the server's responses to REQUESTS."""
        with self.server(words) as url:
            for body in REQUESTS:
                answer = ask(f"{url}/v1/completions", body)
                if isinstance(answer, list) and body is not REQUESTS[-1]:
                    raise RuntimeError(f"the server rejected {body}: {answer}")
                yield answer
            yield ask(f"{url}/v1/models", None)

    @contextmanager
    def server(self, words: list[str]) -> Iterator[str]:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        try:
            line = process.stdout.readline()
            if not (found := re.search(r"http://[\d.]+:\d+", line)):
                raise RuntimeError(f"serve.py did not start: {line}")
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return [error.code, json.loads(error.read())]
    if "data: " not in text:
        return json.loads(text)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["text"] for choice in choices)  # the number of events depends on timing


def printed(output: str) -> Any:
    """Return the part of a program's output to compare: losses if any, parsed JSON lines, else all of it."""
    if losses := re.findall(r"(?:train|val) loss [\d.]+", output):
        return losses
    with suppress(ValueError):
        return [json.loads(line) for line in output.splitlines()]
    return output


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_inputs(work: Path) -> None:
    """Write inputs from Python's standard library: 100 KB of code, and its functions as rows, pairs, quiz."""
    text = inspect.getsource(argparse)
    functions = [part.strip() for part in re.split(r"\n(?=    def |class |def )", text) if len(part) > 60]
    rows = [{"text": part} for part in functions]
    pairs = [
        {"prompt": part.split("\n")[0], "response": part[len(part.split("\n")[0]) :][:300]}
        for part in functions
    ]
    quiz = [
        {"context": part.split("\n")[0], "choices": [part.split("\n")[1], "pass", "return None"], "answer": 0}
        for part in functions
        if "\n" in part
    ]
    (work / "code.txt").write_text(text, encoding="utf-8")
    inputs = {"rows": rows, "pairs": pairs, "quiz": quiz[:40], "prompts": PROMPTS}
    for name, lines in inputs.items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (work / f"{name}.jsonl").write_text(content, encoding="utf-8")


# ----------------------------------------------------------------------------- both


def main(config: Config, commits: list[str]) -> None:
    every = every_case()
    wanted = closure(every, [name for name in every if config.only in name])
    if not wanted:
        raise UserError(f"no case name contains --only={config.only!r}; cases: {', '.join(every)}")
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for number, commit in enumerate([*commits, ""][:2]):
            root = checkout(commit, Path(folder) / f"checkout-{number}")
            sides.append(Side(root, Path(folder) / f"results-{number}"))
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda side: {name: side.run(every[name]) for name in wanted}, sides)
            rows = compare(*both)
    shared.show("Outputs of two commits", ["case", "results", "verdict"], rows)
    if any(verdict != "equal" for _, _, verdict in rows):
        sys.exit("\nnot equal")
    print(f"\nequal: {sum(int(count) for _, count, _ in rows)} results of {len(rows)} cases")


def checkout(commit: str, folder: Path) -> Path:
    """Clone this repository at `commit` into `folder`; if `commit` is empty, use this working tree."""
    if not commit:
        return ROOT
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "-q", commit], check=True)
    return folder


def compare(base: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    """Return a row per case: its name, number of results, and verdict."""
    rows = []
    for case, results in base.items():
        theirs = other.get(case, {})
        differing = [name for name in results | theirs if results.get(name) != theirs.get(name)]
        differing = [n for n in differing if " --" not in n or (n in results and n in theirs)]
        verdict = "equal"
        if "failed" in results | theirs:
            verdict = f"FAILED: {theirs.get('failed') or results.get('failed')}"
        elif not results:
            verdict = "EMPTY"
        elif differing:
            verdict = f"DIFFERENT: {', '.join(differing)}"
        rows.append((case, str(len(results)), verdict))
    return rows


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
