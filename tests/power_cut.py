"""Simulate power cuts: a disk that keeps only flushed data, cut after each fsync and rename."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class Disk:
    """Track what is flushed below `root`. POSIX only guarantees a file's content as of its last fsync (empty
    before the first), and a folder's entries as of the folder's last fsync.

    `moments`: copies of what a power cut would leave after each fsync and each rename.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, keep_in: Path):
        self.root, self.keep_in = root, keep_in
        self.contents: dict[int, bytes] = {}  # by inode
        self.entries: dict[int, dict[str, tuple[int, bool]]] = {}  # folder inode -> inodes of its entries
        self.moments: list[Path] = []
        self.flush_all()
        self._patch(monkeypatch, "fsync", self._after_fsync)
        self._patch(monkeypatch, "replace", lambda *_: None)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, name: str, after: Callable[..., None]) -> None:
        real = getattr(os, name)

        def call(*arguments):
            real(*arguments)
            after(*arguments)
            self.moments.append(self.survivors(self.keep_in / f"{len(self.moments):03d}"))

        monkeypatch.setattr(os, name, call)

    def _after_fsync(self, handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            self._flush_folder(Path(os.readlink(f"/proc/self/fd/{handle}")))
        else:
            self.contents[os.fstat(handle).st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def _flush_folder(self, folder: Path) -> None:
        self.entries[folder.stat().st_ino] = {
            child.name: (child.stat().st_ino, child.is_dir()) for child in folder.iterdir()
        }

    def flush_all(self) -> None:
        """Flush everything, as the kernel does eventually."""
        for path in [self.root, *self.root.rglob("*")]:
            if path.is_dir():
                self._flush_folder(path)
            else:
                self.contents[path.stat().st_ino] = path.read_bytes()

    def survivors(self, folder: Path) -> Path:
        """Write to `folder` what a power cut at this moment would leave of `root`."""
        shutil.rmtree(folder, ignore_errors=True)
        self._restore(self.root.stat().st_ino, folder)
        return folder

    def _restore(self, inode: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, (child, is_dir) in self.entries.get(inode, {}).items():
            if is_dir:
                self._restore(child, folder / name)
            else:
                (folder / name).write_bytes(self.contents.get(child, b""))
