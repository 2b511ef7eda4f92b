"""The user's cache folder: downloads, and compiled code, which is trusted only where others cannot write."""

import os
import stat
from pathlib import Path

from nanogpt.errors import UserError


def cache_folder() -> Path:
    """Return the folder for downloads: NANOGPT_CACHE, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("NANOGPT_CACHE") or pooch.os_cache("nanogpt"))


def private(folder: Path) -> Path:
    """Return `folder`, created if needed. Raise UserError if others can write in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder.lstat()):
        raise UserError(f"{folder} can be written by others; chmod 700 it, or set NANOGPT_CACHE")
    return folder


def is_private(about: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and no other can write it; False for a link."""
    mine = os.name == "nt" or about.st_uid == os.getuid()
    return mine and not about.st_mode & 0o022 and not stat.S_ISLNK(about.st_mode)
