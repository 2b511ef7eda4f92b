"""The user's cache folder, for downloads and compiled code, which is used only if others cannot write it."""

import os
import stat
from pathlib import Path

from nanogpt.errors import UserError


def cache_folder() -> Path:
    """Return the cache folder: the environment variable NANOGPT_CACHE, or the usual folder of this system."""
    import pooch

    return Path(os.environ.get("NANOGPT_CACHE") or pooch.os_cache("nanogpt"))


def private(folder: Path) -> Path:
    """Return `folder`, created if needed. Raise UserError if others can write in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder.lstat()):
        raise UserError(f"{folder} can be written by others; chmod 700 it, or set NANOGPT_CACHE")
    return folder


def is_private(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, who alone can write it; False for a link."""
    owned = os.name == "nt" or status.st_uid == os.getuid()
    return owned and not status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
