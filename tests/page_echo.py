"""The server app with a model that echoes its prompt token by token."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serve
from nanogpt.inference.engine import Text, Token
from nanogpt.server.app import build
from nanogpt.server.metrics import Meters
from nanogpt.server.openai_api import Limits
from nanogpt.server.scheduler import Scheduler
from nanogpt.server.streaming import Served
from nanogpt.tokenizer.tokenizer import CharTokenizer


class Echo:
    """A decoder whose tokens are complete payloads: payload i is followed by payload i."""

    model: Any = None

    def __init__(self, payloads: Sequence[str]):
        self.payloads = payloads
        self.texts: list[Text] = []

    @property
    def free(self) -> int:
        return 4 - len(self.texts)

    def warm(self, prompt: int) -> None:
        pass

    def add(self, texts: Sequence[Text]) -> None:
        self.texts += texts

    def remove(self, text: Text) -> None:
        self.texts.remove(text)

    def step(self) -> list[tuple[Text, Token]]:
        found = []
        for text in self.texts:
            id = len(self.payloads) if text.new else text.ids[-1]
            found.append((text, Token(id, -1.0, [(i, -1.0 - i) for i in range(10)])))
            text.ids.append(id)
        return found


class Whole(CharTokenizer):
    """A vocabulary of payloads, followed by the end-of-text token."""

    def __init__(self, payloads: Sequence[str]):
        super().__init__("a")
        self.payloads = list(payloads)
        self.vocab_size, self.end_of_text = len(payloads) + 1, len(payloads)
        self.characters = [*payloads, ""]

    def encode_prompt(self, text: str) -> list[int]:
        return [self.payloads.index(text)]

    def decode_bytes(self, ids: Any) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()


@contextmanager
def echoing(payloads: Sequence[str], run: Path, folder: Path) -> Iterator[str]:
    """Serve a page whose run also has the payloads as samples; yield its URL."""
    import uvicorn

    (folder / "samples").mkdir()
    content = "".join(f"{payload}\n{'-' * 15}\n" for payload in payloads)
    (folder / "samples" / "step-000010.txt").write_text(content, encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"event": "eval", "iter": 10, "tokens": 1, "val_loss": 1.0, "lr": payloads[0]}) + "\n",
        encoding="utf-8",
    )
    meters, tokens = Meters(), Whole(payloads)
    about = {"name": payloads[0], "created": 0, "parameters": 1, "block_size": 8, "vocab_size": 2}
    about |= {"tokenizer": payloads[1], "iter": 0, "val_loss": None, "max_tokens": 64}
    listener = serve.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    decoder: Any = Echo(payloads)
    served = Served(
        name="echo",
        tokenizer=tokens,
        scheduler=Scheduler(decoder, 8, meters),
        meters=meters,
        limits=Limits(8, 64, 4),
        about=about,
        run=folder,
    )
    served.scheduler.start()
    app = build(served, port=port, local=True, token="")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
