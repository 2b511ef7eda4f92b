"""Processes that meet see who is missing and what differs. Threads stand for processes."""

import threading

import pytest
from torch.distributed import HashStore, PrefixStore

from nanogpt.distributed import rendezvous
from nanogpt.errors import SHARED, UserError


def together(size, work):
    """What `work(rank)` returns or raises, in `size` threads."""
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


def test_all_get_the_same_word_and_each_attempt_its_own_in_the_same_store():
    store, words = HashStore(), set()
    for _ in range(3):  # what the attempts before have left is no answer, and no sign of life
        found = together(4, lambda rank: rendezvous.gather(store, rank, 4, 10.0, "here:1"))
        assert len(set(found)) == 1
        words |= set(found)
    assert len(words) == 3


def test_who_does_not_come_is_named_to_those_that_did():
    store = HashStore()
    together(4, lambda rank: rendezvous.gather(store, rank, 4, 10.0, "here:1"))

    def come(rank):
        if rank == 2:
            return ""
        word = rendezvous.gather(store, rank, 4, 1.0, "here:1")
        return rendezvous.compare(PrefixStore(word, store), rank, 4, {}, 5.0)

    first, second, _, third = together(4, come)
    for error in (first, second, third):
        assert isinstance(error, UserError) and SHARED in error.__notes__
        assert "of the 4 processes 2 did not come to here:1 within 1 s" in str(error)


def test_without_the_first_process_the_others_say_where_they_waited():
    with pytest.raises(UserError, match="process 1 was not answered by process 0 at here:1 within"):
        rendezvous.gather(HashStore(), 1, 2, 0.1, "here:1")


ABOUT = {
    "machine": {"device": "cuda", "torch": "2.13.0"},
    "code": {"train.py": "ab", "nanogpt/model.py": "cd"},
    "options": {"batch_size": 4, "dataset": "words"},
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("options", {"batch_size": 8}, "process 2 has --batch_size=8, process 0 has --batch_size=4"),
        ("code", {"nanogpt/model.py": "ef"}, "process 2 has another nanogpt/model.py"),
        ("code", {"nanogpt/new.py": "ef"}, "process 2 alone has nanogpt/new.py"),
        ("machine", {"device": "cpu"}, "process 2 has device cpu, process 0 has device cuda"),
        ("machine", {"torch": "2.11.0"}, "process 2 has torch 2.11.0, process 0 has torch 2.13.0"),
    ],
)
def test_a_difference_is_told_to_all_of_them(kind, change, message):
    store = HashStore()

    def compare(rank):
        about = ABOUT | {kind: ABOUT[kind] | change} if rank == 2 else ABOUT
        rendezvous.compare(store, rank, 3, about, 5.0)

    for error in together(3, compare):
        assert isinstance(error, UserError) and SHARED in error.__notes__
        assert message in str(error) and "\n" not in str(error)


def test_equal_processes_may_go_on():
    store = HashStore()
    assert together(3, lambda rank: rendezvous.compare(store, rank, 3, ABOUT, 5.0)) == [None] * 3
