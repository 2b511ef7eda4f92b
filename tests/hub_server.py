"""A stand-in for the Hugging Face hub: one dataset, its branches given as folders."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@contextmanager
def dataset_hub(repo: str, branches: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve the dataset `repo`; yield the URL (for HF_ENDPOINT) and the list of files sent."""
    sent: list[str] = []
    commits = {branch: f"{number:x}" * 40 for number, branch in enumerate(branches, 1)}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(body).get("paths") if body.startswith("{") else None
            self._answer(paths or [unquote(path) for path in re.findall(r"paths=([^&]*)", body)])

        def do_GET(self) -> None:
            self._answer([])

        def _answer(self, paths: list[str]) -> None:
            path = unquote(self.path.partition("?")[0])
            branch = next((b for b in branches if f"/{b}" in path or f"/{commits[b]}" in path), "")
            folder = branches.get(branch or "main", Path("nowhere"))
            if found := re.match(rf"/datasets/{repo}/resolve/(?:{branch}|{commits.get(branch)})/(.*)", path):
                self._send_file(folder / found[1], commits[branch])
            elif not path.startswith(f"/api/datasets/{repo}") or not folder.is_dir():
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif "/tree/" in path:
                inner = re.sub(rf".*/tree/({branch}|{commits.get(branch)})/?", "", path)
                if not (folder / inner).is_dir():
                    self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
                pattern = "*" if "recursive=False" in self.path or "recursive=false" in self.path else "**/*"
                self._json([entry(file, folder) for file in sorted((folder / inner).glob(pattern))])
            elif "/paths-info/" in path:
                self._json([entry(folder / name, folder) for name in paths if (folder / name).exists()])
            else:
                every = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*.*")]
                self._json({"id": repo, "sha": commits[branch or "main"], "siblings": every, "tags": []})

        def _send_file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content, status, more = (
                file.read_bytes(),
                200,
                {"X-Repo-Commit": commit, "ETag": f'"{file.name}"'},
            )
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                end = min(len(content) - 1, int(wanted[2] or len(content)))
                more["Content-Range"] = f"bytes {wanted[1]}-{end}/{len(content)}"
                content, status = content[int(wanted[1]) : end + 1], 206
            if self.command == "GET" and file.suffix == ".parquet":
                sent.append(file.name)
            self._send(status, content, more)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *unused: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def entry(file: Path, folder: Path) -> dict[str, Any]:
    """Return what the hub tells of a file or folder."""
    name = file.relative_to(folder).as_posix()
    if file.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "oid": "0" * 40, "size": file.stat().st_size}
