"""Nothing that users measure has moved: short runs give the numbers that were recorded."""

from pathlib import Path

import pytest
import torch
from cases import CASES, DRAWN_BY_MKL, NEAR_TIES
from values import moved, read, report


@pytest.mark.parametrize("case", CASES)
def test_a_run_gives_the_recorded_numbers(case: str, tmp_path: Path):
    if case in DRAWN_BY_MKL and not torch.backends.mkl.is_available():
        pytest.skip(
            "the recorded tokens were sampled with MKL's random numbers, which torch lacks here"
        )
    found = moved(read(case), CASES[case](tmp_path), NEAR_TIES)
    if found:
        pytest.fail(report(case, found), pytrace=False)
