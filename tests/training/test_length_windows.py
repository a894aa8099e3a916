"""Steps of similar length: a permutation within windows, whatever the number of processes."""

from types import SimpleNamespace

import pytest

from mtp.run import Progress, Run, next_examples
from mtp.tasks.base import Example, Task, training_index
from mtp.training.length_windows import LengthWindows, end_of_window, window_order

LENGTHS = [5, 1, 4, 1, 9, 2, 6, 3]


def test_a_window_is_cut_into_batches_of_similar_length():
    order = window_order(LENGTHS, 2, "seed")
    batches = sorted(sorted(LENGTHS[i] for i in order[at : at + 2]) for at in range(0, 8, 2))
    assert batches == [[1, 1], [2, 3], [4, 5], [6, 9]]
    assert sorted(order) == list(range(8))
    orders = {tuple(window_order(LENGTHS, 2, str(seed))) for seed in range(200)}
    assert len(orders) == 24  # every order of the four batches
    assert window_order(LENGTHS, 2, "seed") == order


def test_the_end_of_a_window():
    assert [end_of_window(p, 8) for p in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]


class Letters(Task):
    """Problem i is a text of `(7 * i) % 23` letters; 12 problems."""

    def size(self, split):
        return 12

    def example(self, split, index):
        return Example("x" * (7 * index % 23), str(index))


def run(rank=0, world=1, position=0):
    fabric = SimpleNamespace(global_rank=rank, world_size=world)
    made = SimpleNamespace(
        config=SimpleNamespace(seed=3), fabric=fabric, task=Letters(),
        progress=Progress(position=position),
        windows=LengthWindows(lambda example: len(example.prompt), 3),
    )  # fmt: skip
    return made


def steps(number, window=3, **given):
    """The answers of each step's examples, in the order of their places."""
    one = run(**given)
    return [[e.answer for e in next_examples(one, 2, window).values()] for _ in range(number)]


def test_every_example_is_used_as_often_as_without_windows():
    plain = [str(training_index(p, 12, 3)) for p in range(24)]
    found = steps(12)
    for at in range(0, 24, 6):
        window = [answer for step in found[at // 2 : at // 2 + 3] for answer in step]
        assert sorted(window) == sorted(plain[at : at + 6])
        lengths = [[7 * int(a) % 23 for a in step] for step in found[at // 2 : at // 2 + 3]]
        flat = sorted(length for step in lengths for length in step)
        assert sorted(lengths) == [flat[0:2], flat[2:4], flat[4:6]]
    assert found != steps(12, window=0)


def test_a_resumed_run_continues_with_the_same_steps():
    found = steps(12)
    for step in (1, 3, 7):
        assert steps(12 - step, position=2 * step) == found[step:]


def test_processes_share_the_steps_of_one():
    together, shared = run(), [run(rank, 2) for rank in range(2)]
    for _ in range(9):
        parts = [next_examples(one, 4, 2) for one in shared]
        assert next_examples(together, 4, 2) == dict(sorted({**parts[0], **parts[1]}.items()))


def test_a_run_measures_the_tokens_of_an_example():
    fmt = SimpleNamespace(example_segments=lambda e: [([1] * len(e.prompt), [2, 3]), ([1], [2])])
    fake = SimpleNamespace(fmt=fmt, config=SimpleNamespace(seed=1))
    windows = Run.windows.func(fake)
    assert windows.length(Example("abc", "")) == 5 and windows.seed == 1


def test_a_window_of_one_step_sorts_within_it():
    found = steps(6, window=1)
    plain = steps(6, window=0)
    assert [sorted(step) for step in found] == [sorted(step) for step in plain]
    assert all(7 * int(a) % 23 <= 7 * int(b) % 23 for a, b in found)
    assert found != plain


@pytest.mark.parametrize("window", [0, 2])
def test_the_position_counts_examples(window):
    one = run()
    next_examples(one, 4, window)
    assert one.progress.position == 4


def test_steps_are_of_similar_length_after_a_stage_of_other_steps():
    """From a position within a batch each step would cross two of them."""
    aligned, moved = run(), run(position=3)
    first = next_examples(aligned, 2, 3), next_examples(aligned, 2, 3), next_examples(aligned, 2, 3)
    assert next_examples(moved, 2, 3) == first[2]
    assert moved.progress.position == aligned.progress.position == 6
