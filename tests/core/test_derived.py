"""Values worked out once: again when, and only when, their tensor is another one or was written to."""

import copy
import pickle

import torch
from torch import nn

from jepa_plugins.core.derived import Derived


class Counter(nn.Module):
    """A buffer, and how often it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.known: Derived[int] = Derived()
        self.reads = 0

    def read(self) -> int:
        self.reads += 1
        return int(self.count)

    def value(self, key: object = None) -> int:
        return self.known.get(self.count, self.read, key)


def test_a_value_is_worked_out_once() -> None:
    counter = Counter()
    assert [counter.value() for _ in range(3)] == [0, 0, 0] and counter.reads == 1
    counter.count += 1
    assert [counter.value() for _ in range(2)] == [1, 1] and counter.reads == 2
    counter.value("another")
    assert counter.reads == 3


def test_whatever_changes_the_tensor_is_seen() -> None:
    counter = Counter()
    assert counter.value() == 0
    counter.count.fill_(5)
    assert counter.value() == 5
    counter.load_state_dict({"count": torch.tensor(7)})
    assert counter.value() == 7
    counter.load_state_dict({"count": torch.tensor(8)}, assign=True)
    assert counter.value() == 8
    counter.count = torch.tensor(9)
    assert counter.value() == 9
    counter._apply(torch.clone)  # as on the way to another device
    reads = counter.reads
    assert counter.value() == 9 and counter.reads == reads + 1


def test_a_value_that_is_known_is_not_worked_out() -> None:
    counter = Counter()
    counter.count += 1
    counter.known.put(counter.count, 1)
    assert counter.value() == 1 and counter.reads == 0


def test_copies_start_anew_and_state_dicts_know_nothing() -> None:
    counter = Counter()
    for _ in range(3):
        counter.count += 1
    assert counter.value() == 3 and list(counter.state_dict()) == ["count"]
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        for _ in range(3):  # as many writes as the original has seen
            other.count += 1
        assert other.value() == 6 and counter.value() == 3
