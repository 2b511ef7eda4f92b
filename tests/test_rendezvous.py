"""The rendezvous reports missing ranks and differing options. Threads simulate ranks."""

import threading

import pytest
from torch.distributed import HashStore, PrefixStore

from nanogpt.distributed import rendezvous
from nanogpt.errors import SHARED, UserError


def together(size, work):
    """Run `work(rank)` in `size` threads; return the results or exceptions."""
    found = [None] * size

    def run(rank):
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_share_a_key_that_is_unique_per_attempt():
    store, words = HashStore(), set()
    for _ in range(3):  # entries of earlier attempts are neither answers nor heartbeats
        found = together(4, lambda rank: rendezvous.gather(store, rank, 4, 10.0, "here:1"))
        assert len(set(found)) == 1
        words |= set(found)
    assert len(words) == 3


def test_missing_rank_is_named_to_the_others():
    store = HashStore()
    together(4, lambda rank: rendezvous.gather(store, rank, 4, 10.0, "here:1"))

    def come(rank):
        if rank == 2:
            return ""
        word = rendezvous.gather(store, rank, 4, 1.0, "here:1")
        return rendezvous.compare(PrefixStore(word, store), rank, 4, {})

    first, second, _, third = together(4, come)
    for error in (first, second, third):
        assert isinstance(error, UserError) and SHARED in error.__notes__
        assert "rank(s) 2 of 4 did not join at here:1 within 1 s" in str(error)


def test_missing_rank_0_error_names_the_address():
    with pytest.raises(UserError, match="rank 1 got no reply from rank 0 at here:1 within"):
        rendezvous.gather(HashStore(), 1, 2, 0.1, "here:1")


ABOUT = {
    "machine": {"device": "cuda", "torch": "2.13.0"},
    "code": {"train.py": "ab", "nanogpt/model.py": "cd"},
    "options": {"batch_size": 4, "dataset": "words"},
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("options", {"batch_size": 8}, "rank 2 has --batch_size=8, rank 0 has --batch_size=4"),
        ("code", {"nanogpt/model.py": "ef"}, "rank 2 has a different nanogpt/model.py"),
        ("code", {"nanogpt/new.py": "ef"}, "rank 2 has an extra nanogpt/new.py"),
        ("machine", {"device": "cpu"}, "rank 2 has device cpu, rank 0 has device cuda"),
        ("machine", {"torch": "2.11.0"}, "rank 2 has torch 2.11.0, rank 0 has torch 2.13.0"),
    ],
)
def test_difference_is_reported_on_all_ranks(kind, change, message):
    store = HashStore()

    def compare(rank):
        about = ABOUT | {kind: ABOUT[kind] | change} if rank == 2 else ABOUT
        rendezvous.compare(store, rank, 3, about)

    for error in together(3, compare):
        assert isinstance(error, UserError) and SHARED in error.__notes__
        assert message in str(error) and "\n" not in str(error)


def test_equal_ranks_proceed():
    store = HashStore()
    assert together(3, lambda rank: rendezvous.compare(store, rank, 3, ABOUT)) == [None] * 3
