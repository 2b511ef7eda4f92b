"""Serve a model over HTTP: a web page to try it, and an OpenAI-compatible completions API.

    python serve.py --out_dir=out-shakespeare-char          # then open http://127.0.0.1:8000
    python serve.py --init_from=gpt2
    python serve.py --out_dir=out --host=0.0.0.0            # reachable from other machines; needs a token

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

While train.py is training the run, the page plots its loss curves. See docs/serving.md.
"""

import gc
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from nanogpt import INSTALLED, files, metrics
from nanogpt.checkpoint import reader
from nanogpt.config import FilePath, PositiveInt, Range, load
from nanogpt.diagnostics import runs
from nanogpt.errors import UserError, run_program
from nanogpt.inference import api, cpu_kernels
from nanogpt.inference.engine import Engine
from nanogpt.planning import estimate
from nanogpt.tokenizer import tokenizer

if TYPE_CHECKING:
    import uvicorn

    from nanogpt.server.streaming import Served

PACKAGES = "pydantic starlette uvicorn prometheus_client"  # the extra "serve" of pyproject.toml
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN = "NANOGPT_TOKEN"


@dataclass(frozen=True)
class Config:
    # model
    init_from: FilePath = "resume"  # resume: load out_dir; or gpt2 .. gpt2-xl, a folder, nanoGPT's ckpt.pt
    out_dir: FilePath = "out"  # run folder written by train.py
    which: str = "best"  # checkpoint: best (lowest validation loss), last, or an iteration number
    # network
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all interfaces (clients need a token)
    port: Annotated[int, Range(0, 65535)] = 8000  # 0: any free port
    public_address: str = ""  # address of a proxy or tunnel in front: https://gpt.example; empty: none
    token: str = ""  # bearer token; visible in process lists, so prefer NANOGPT_TOKEN
    # limits
    slots: Annotated[int, Range(1, 10_000)] = 16  # completions generated concurrently
    queue: Annotated[int, Range(1, 10**6)] = 128  # completions waiting for a slot; beyond: HTTP 429
    max_tokens: PositiveInt = 4096  # maximum completion length in tokens
    # device
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: best available
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"  # weight dtype; int8: CPU only


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Serve until a signal arrives. Raise UserError for a missing run, a port in use or missing packages."""
    try:
        import uvicorn

        from nanogpt.server.app import build
        from nanogpt.server.http import DeadlineProtocol
    except ImportError as error:
        packages = PACKAGES if INSTALLED else "-c constraints.txt -e '.[serve]'"
        raise UserError(f"serve.py needs {error.name}: pip install {packages}") from None
    local = config.host in LOOPBACK
    token = config.token or os.environ.get(TOKEN, "") or ("" if local else secrets.token_urlsafe(24))
    if not token.isascii() or any(character.isspace() for character in token):
        raise UserError(f"the token (--token or {TOKEN}) must be ASCII without whitespace")
    if config.public_address and not re.fullmatch(r"https?://[^/\s]+/?", config.public_address):
        raise UserError(f"--public_address={config.public_address}: write it like https://gpt.example")
    with bind(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)  # no access log
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{socket.gethostname() if config.host in ('0.0.0.0', '[::]') else host}:{port}"
        began = f"serving at {address}/{f'#token={token}' if token else ''}  (Ctrl-C to stop)"
        while True:
            served = open_model(config)
            if served.scheduler:
                cpu_kernels.release_threads()  # computation moves to the scheduler's thread
                served.scheduler.start()
            app = build(served, port=port, local=local, token=token, address=config.public_address)
            settings = uvicorn.Config(
                app,
                http=DeadlineProtocol,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=800,
                h11_max_incomplete_event_size=1 << 14,
                timeout_graceful_shutdown=2,
            )
            gc.collect()
            gc.freeze()  # exclude loaded objects from collections, which would pause all requests for 90 ms
            print(f"{served.about['origin']}; {served.about['machine']}", file=sys.stderr)
            if began:
                print(began)
            server, began = uvicorn.Server(settings), ""
            if not served.scheduler:
                threading.Thread(target=stop_at_checkpoint, args=(server, config), daemon=True).start()
            server.run(sockets=[listener.dup()])  # which it closes
            if served.scheduler or not reader.step_folders(Path(config.out_dir)):
                return


def stop_at_checkpoint(server: "uvicorn.Server", config: Config) -> None:
    """Stop `server`, which shows the log of a run, as soon as the run has a checkpoint to serve."""
    while not reader.step_folders(Path(config.out_dir)):
        time.sleep(1)
    server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a socket listening on host:port. Raise UserError if that fails."""
    ipv6 = ":" in host
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=ipv6)
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(
            f"--host={host} --port={port}: {reason}; give an address of this host and a port that is free, "
            f"or --port=0 for any"
        ) from None


def open_model(config: Config) -> "Served":
    """Load the model and prepare it for serving. Raise UserError as api.load does."""
    from nanogpt.server.metrics import Meters
    from nanogpt.server.openai_api import Limits
    from nanogpt.server.scheduler import Scheduler
    from nanogpt.server.streaming import Served

    resumes = config.init_from == "resume"
    run = Path(config.out_dir if resumes else config.init_from)
    name = run.resolve().name if run.exists() else config.init_from
    facts: dict[str, Any] = {"name": name, "created": int(time.time()), "max_tokens": config.max_tokens}
    if resumes and not reader.step_folders(run) and (run / metrics.NAME).is_file():
        facts |= {"origin": f"{run} has no checkpoint yet", "waiting": True}
        facts |= {"machine": "showing its training log until it has one"}
        limits, tokens = Limits(0, config.max_tokens, 1), tokenizer.CharTokenizer("")
        return Served(name, tokens, None, Meters(), limits, facts, run)
    loaded = api.load(
        config.init_from,
        run=Path(config.out_dir),
        which=config.which,
        device=config.device,
        dtype=config.dtype,
        notice=lambda line: print(line, file=sys.stderr),
    )
    meters = Meters()
    with loaded.machine.memory_errors("fewer --slots"):
        engine = Engine(loaded.model, config.slots)
    scheduler = Scheduler(engine, config.queue, meters)
    return Served(
        name=name,
        tokenizer=loaded.tokenizer,
        scheduler=scheduler,
        meters=meters,
        limits=Limits(loaded.model.config.block_size, config.max_tokens, min(64, config.queue)),
        about=facts | describe(loaded),
        run=run if (run / metrics.NAME).is_file() else None,
    )


def describe(loaded: api.LanguageModel) -> dict[str, Any]:
    """Return the facts about the model that the page shows (/about)."""
    parameters = estimate.parameters(loaded.model.config)  # int8 weights are not parameters
    state = Path(loaded.origin) / "state.json"
    progress = files.read_json(state, dict) if state.is_file() else {}
    return {
        "origin": loaded.origin,
        "machine": loaded.machine.reason,
        "parameters": parameters.total - parameters.padding,
        "block_size": loaded.model.config.block_size,
        "vocab_size": loaded.tokenizer.vocab_size,
        "tokenizer": loaded.tokenizer.kind,
        "iter": progress.get("iter_num", 0),
        "val_loss": progress.get("val_loss"),
        "baseline": runs.baseline(Path(loaded.origin).parent) or None,
    }


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
