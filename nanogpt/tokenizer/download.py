"""Download files once, verify their SHA-256 and keep them in the user's cache folder."""

from pathlib import Path

from nanogpt import command
from nanogpt.cache import cache_folder
from nanogpt.errors import UserError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tiny_shakespeare(url: str = SHAKESPEARE_URL) -> Path:
    """Return the path of tiny Shakespeare (40,000 lines), from the cache or downloaded from `url`.

    Raise UserError, with the cause and alternatives, if the download fails.
    """
    return fetch(
        url,
        SHAKESPEARE_SHA256,
        cache_folder() / "tinyshakespeare.txt",
        "pass a copy with --input=FILE, or use a text included in Python: "
        f"{command('prepare python_stdlib')}",
    )


def fetch(url: str, sha256: str, path: Path, instead: str) -> Path:
    """Download `url` to `path`, unless a file with this SHA-256 is already there.

    Raise UserError on failure; its message ends with `instead`, the alternative. `path` is then unchanged, or
    deleted if its hash was wrong.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")  # suppress pooch's progress messages
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent))
    except Exception as error:  # any network, proxy or disk error
        reason = (str(error).splitlines() or [""])[0].split(" (Caused by")[0]
        raise UserError(
            f"{url} could not be downloaded ({type(error).__name__}: {reason[:200]}); {instead}"
        ) from None
