"""The contract holds for every family of docs/models.md, on tiny random models."""

import pytest
from families import QUICK, REFUSED, SUPPORTED
from family_checks import check_family


@pytest.mark.parametrize("family", QUICK)
def test_a_family_keeps_the_contract(family):
    check_family(family, num_new=24)


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_keeps_the_contract_far_past_its_windows(family):
    check_family(family, num_new=60)


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_at_build(family):
    with pytest.raises(ValueError, match=r"; choose|; set "):
        check_family(family)
