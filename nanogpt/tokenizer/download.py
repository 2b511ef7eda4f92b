"""Texts from the net: fetched once, checked by their SHA-256 and kept in the user's cache."""

from pathlib import Path

from nanogpt.errors import UserError
from nanogpt.files import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tiny_shakespeare(url: str = SHAKESPEARE_URL) -> Path:
    """The file of 40,000 lines of Shakespeare, from the cache or `url`.

    UserError says why it could not be had, and what does without it.
    """
    return fetch(
        url,
        SHAKESPEARE_SHA256,
        cache_folder() / "tinyshakespeare.txt",
        "give a copy of it with --input=FILE, or use the text that every Python has: "
        "python data/python_stdlib/prepare.py",
    )


def fetch(url: str, sha256: str, path: Path, instead: str) -> Path:
    """Download `url` to `path`, unless the right file is there already.

    UserError ends with what to do `instead`; then `path` has not been touched, or is gone if it was wrong.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the library does not print
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent))
    except Exception as error:  # whatever the net, a proxy or a disk may raise
        reason = (str(error).splitlines() or [""])[0].split(" (Caused by")[0]
        raise UserError(
            f"{url} could not be downloaded ({type(error).__name__}: {reason[:200]}); {instead}"
        ) from None
