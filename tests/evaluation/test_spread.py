"""Problems of an evaluation on several processes."""

from types import SimpleNamespace

import pytest

from mtp.evaluation.spread import ALONE, Spread


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_every_problem_is_decoded_once_and_all_processes_decode_equally_many(world, number):
    found, sizes = [], set()
    for rank in range(world):
        fabric = SimpleNamespace(world_size=world, global_rank=rank)
        places, own = Spread(fabric).places(number)
        found += places[:own]
        sizes.add(len(places))
        assert all(place < number for place in places)
    assert found == list(range(number))
    assert len(sizes) == 1


def test_alone_a_process_has_all():
    assert ALONE.places(3) == ([0, 1, 2], 3)
    assert ALONE.all_of([1, 2]) == [1, 2]
