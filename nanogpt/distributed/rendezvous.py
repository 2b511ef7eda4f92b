"""Rendezvous of the ranks of a run, and the check that they agree on options, code and devices.

Uses only the store provided by torchrun (or rank 0), so a mismatch is reported by name instead of hanging the
first collective.
"""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from nanogpt.errors import SHARED, UserError

POLL_S = 0.02
READ_S = 3.0  # longest wait for the other ranks to read a verdict


def gather(store: Any, rank: int, size: int, wait_s: float, address: str) -> str:
    """Wait until all ranks have joined; return a token known only to the ranks of this attempt.

    A store may outlive an attempt, so keys found in it prove nothing: each rank writes a random token, rank 0
    replies with its own, and only ranks that return it count as joined. Raise UserError naming the ranks that
    have not joined at `address` within `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    token = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", token)

        def answered() -> bool:
            return _read(store, f"welcome/{rank}").startswith(token)

        if not _until(answered, deadline):
            raise UserError(f"rank {rank} got no reply from rank 0 at {address} within {wait_s:g} s")
        word = _read(store, f"welcome/{rank}").removeprefix(token)
        store.set(f"{word}/here/{rank}", "")
        return word
    missing, seen = set(range(1, size)), dict.fromkeys(range(1, size), "")

    def all_here() -> bool:
        for other in list(missing):
            hello = _read(store, f"hello/{other}")
            if hello != seen[other]:
                seen[other] = hello
                store.set(f"welcome/{other}", hello + token)
            if hello and store.check([f"{token}/here/{other}"]):
                missing.discard(other)
        return not missing

    if not _until(all_here, deadline):
        listed = ", ".join(map(str, sorted(missing)[:8])) + (" ..." if len(missing) > 8 else "")
        text = (
            f"rank(s) {listed} of {size} did not join at {address} within {wait_s:g} s "
            f"(--rdzv_timeout_s); check that all are started and can reach this address"
        )
        store.set(f"{token}/verdict", text)
        _await_readers(store, [f"{token}/read/{other}" for other in range(1, size) if other not in missing])
        raise _for_all(text)
    return token


def compare(store: Any, rank: int, size: int, facts: dict[str, dict[str, Any]]) -> None:
    """Raise UserError, the same on all ranks, if `facts` ({kind: {name: value}}) differs from that of rank 0.

    `store` must be private to this attempt. Collective: call on all ranks.
    """
    mine = json.dumps(facts, sort_keys=True, default=str)
    store.set(f"about/{rank}", mine)
    if rank == 0:
        verdict = ""
        for other in range(1, size):
            theirs = store.get(f"about/{other}").decode()
            if theirs != mine:
                verdict = verdict or first_difference(json.loads(mine), json.loads(theirs), other)
        store.set("verdict", verdict)
        if verdict:
            _await_readers(store, [f"read/{other}" for other in range(1, size)])
    if verdict := store.get("verdict").decode():
        store.set(f"read/{rank}", "")
        raise _for_all(verdict)


def _for_all(message: str) -> UserError:
    error = UserError(message)
    error.add_note(SHARED)
    return error


def first_difference(mine: dict[str, Any], theirs: dict[str, Any], other: int) -> str:
    """Return a one-line description of the first difference between rank 0 and rank `other`."""
    for kind, values in mine.items():
        for name in sorted(values.keys() | theirs[kind].keys()):
            one, two = values.get(name), theirs[kind].get(name)
            if one == two:
                continue
            if kind == "options":
                return (
                    f"rank {other} has --{name}={two}, rank 0 has --{name}={one}; "
                    f"start all ranks with the same options"
                )
            if kind == "code":
                verb = "has a different" if one and two else "lacks" if one else "has an extra"
                return f"rank {other} {verb} {name}; install the code of rank 0 on all nodes"
            return f"rank {other} has {name} {two}, rank 0 has {name} {one}; they must be the same"
    return f"rank {other} differs from rank 0"


def _await_readers(store: Any, keys: list[str]) -> None:
    """Wait until the other ranks have read the verdict: the store may end with this process."""
    _until(lambda: not keys or store.check(keys), time.monotonic() + READ_S)


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _until(happened: Callable[[], bool], deadline: float) -> bool:
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
