"""Nothing that users measure has moved: short runs give the numbers that were recorded."""

from pathlib import Path

import pytest
from cases import CASES, NEAR_TIES
from values import moved, read, report


@pytest.mark.parametrize("case", CASES)
def test_a_run_gives_the_recorded_numbers(case: str, tmp_path: Path):
    found = moved(read(case), CASES[case](tmp_path), NEAR_TIES)
    if found:
        pytest.fail(report(case, found), pytrace=False)
