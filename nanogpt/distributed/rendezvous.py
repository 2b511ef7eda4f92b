"""How the processes of a run find each other before they work together, and see that they fit.

It needs nothing but the store that torchrun (or the first process) holds ready, so that options, code or
devices that differ are named instead of hanging the first collective operation.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from nanogpt.errors import SHARED, UserError

POLL_S = 0.02
READ_S = 3.0  # the longest wait for the others to read what all are told


def gather(store: Any, rank: int, size: int, wait_s: float, address: str) -> str:
    """Wait until all processes are here; returns a word that only those of this attempt know.

    A store may outlive an attempt, so what lies in it proves nothing: each process says a word of its own,
    the first gives its word in exchange, and only who has it counts as here. UserError names who has not
    come to `address` in `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)

        def answered() -> bool:
            return _read(store, f"welcome/{rank}").startswith(own)

        if not _until(answered, deadline):
            raise UserError(f"process {rank} was not answered by process 0 at {address} within {wait_s:g} s")
        word = _read(store, f"welcome/{rank}").removeprefix(own)
        store.set(f"{word}/here/{rank}", "")
        return word
    missing, seen = set(range(1, size)), dict.fromkeys(range(1, size), "")

    def all_here() -> bool:
        for other in list(missing):
            said = _read(store, f"hello/{other}")
            if said != seen[other]:
                seen[other] = said
                store.set(f"welcome/{other}", said + own)
            if said and store.check([f"{own}/here/{other}"]):
                missing.discard(other)
        return not missing

    if not _until(all_here, deadline):
        listed = ", ".join(map(str, sorted(missing)[:8])) + (" ..." if len(missing) > 8 else "")
        text = (
            f"of the {size} processes {listed} did not come to {address} within {wait_s:g} s "
            f"(--rdzv_timeout_s): are all started, and can they reach this address?"
        )
        store.set(f"{own}/verdict", text)
        _await_readers(store, [f"{own}/read/{other}" for other in range(1, size) if other not in missing])
        raise _for_all(text)
    return own


def compare(store: Any, rank: int, size: int, about: dict[str, dict[str, Any]], wait_s: float) -> None:
    """UserError, the same in all processes, if `about` (values by name, by kind) differs from the first's.

    `store` is that of this attempt alone.
    """
    text = json.dumps(about, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"about/{rank}", text)
    store.set(f"digest/{rank}", digest)
    deadline = time.monotonic() + wait_s
    if rank == 0:
        verdict = ""
        for other in range(1, size):
            if not _until(partial(store.check, [f"digest/{other}"]), deadline):
                verdict = f"process {other} was lost while the processes compared their options"
            elif store.get(f"digest/{other}").decode() != digest:
                theirs = json.loads(store.get(f"about/{other}"))
                verdict = first_difference(json.loads(text), theirs, other)
            if verdict:
                break
        store.set("verdict", verdict)
        if verdict:
            _await_readers(store, [f"read/{other}" for other in range(1, size)])
    elif not _until(partial(store.check, ["verdict"]), deadline):
        raise UserError(f"process {rank} waited {wait_s:g} s for process 0 to compare their options")
    if verdict := store.get("verdict").decode():
        store.set(f"read/{rank}", "")
        raise _for_all(verdict)


def _for_all(message: str) -> UserError:
    error = UserError(message)
    error.add_note(SHARED)
    return error


def first_difference(mine: dict[str, Any], theirs: dict[str, Any], other: int) -> str:
    """What is not the same in process 0 and in process `other`, in a line."""
    for kind, values in mine.items():
        for name in sorted(values.keys() | theirs[kind].keys()):
            one, two = values.get(name), theirs[kind].get(name)
            if one == two:
                continue
            if kind == "options":
                return (
                    f"process {other} has --{name}={two}, process 0 has --{name}={one}; "
                    f"start all processes with the same options"
                )
            if kind == "code":
                how = "has another" if one and two else "lacks" if one else "alone has"
                return f"process {other} {how} {name}; give all machines the code that process 0 has"
            return f"process {other} has {name} {two}, process 0 has {name} {one}; they must be the same"
    return f"process {other} differs from process 0"


def _await_readers(store: Any, keys: list[str]) -> None:
    """The store may end with this process: let the others read in it first."""
    _until(lambda: not keys or store.check(keys), time.monotonic() + READ_S)


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _until(happened: Callable[[], bool], deadline: float) -> bool:
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
