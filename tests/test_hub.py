"""Models by hub name: from the Hugging Face cache, and downloaded from a mock hub server."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanogpt.convert import hf
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from tests import hf_folders


@pytest.mark.parametrize("repo", ["openai-community/gpt2", "gpt2"])
def test_model_name_is_resolved_from_the_cache(repo, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = hf_folders.write_cache(tmp_path, repo)
    assert hf.find("gpt2").resolve() == snapshot.resolve()
    assert hf.open_folder(hf.find("gpt2")).config == replace(
        GPTConfig(), n_layer=2, n_head=2, n_embd=16, block_size=32
    )
    with pytest.raises(UserError) as caught:
        hf.find("gpt2-xl")
    assert "\n" not in str(caught.value)
    for part in (
        "gpt2-xl is not complete in the cache",
        "put config.json, model.safetensors",
        "--init_from=FOLDER",
    ):
        assert part in str(caught.value)


def test_model_is_downloaded_once(tmp_path, monkeypatch):
    """Download from a mock hub server; the second call uses the cache."""
    from huggingface_hub import constants

    served = hf_folders.write(tmp_path / "served")
    (served / "pytorch_model.bin").write_bytes(b"not wanted")
    (served / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        folder = hf.find("gpt2")
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == (served / "model.safetensors").read_bytes()
    assert hf.find("gpt2") == folder
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not complete in the cache"):
        hf.find("gpt2")


def hub(folder: Path) -> type[BaseHTTPRequestHandler]:
    commit, repo = "1" * 40, "openai-community/gpt2"

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            if "/tree/" in self.path:
                content = json.dumps(
                    [
                        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
                        for path in folder.iterdir()
                    ]
                ).encode()
            elif self.path.startswith(f"/api/models/{repo}"):
                content = json.dumps(
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": commit,
                        "siblings": [{"rfilename": path.name} for path in folder.iterdir()],
                    }
                ).encode()
            elif "/resolve/" in self.path:
                content = (folder / self.path.split("/")[-1]).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{abs(hash(content)):x}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *unused: object) -> None:
            pass

    return Hub
