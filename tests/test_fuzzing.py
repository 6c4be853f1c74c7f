"""A short run of the fuzzers; `make fuzz` is the long one."""

import pytest
from fuzzing import fuzz_answers, fuzz_requests


@pytest.mark.parametrize("seed", range(2))
def test_mutated_answers_crash_nothing_and_move_no_limit_out_of_its_bounds(seed):
    outcomes = fuzz_answers(2000, seed)
    assert outcomes["lease accepted"] > 20
    assert outcomes["lease out_of_range"] > 10
    assert outcomes["no message"] > 50


@pytest.mark.parametrize("seed", range(2))
def test_mutated_requests_are_served_or_refused_and_get_no_limit_out_of_bounds(seed):
    outcomes = fuzz_requests(2000, seed)
    assert outcomes["leases"] > 300
    assert outcomes["ReportError"] > 50
    assert outcomes["served"] > 20
