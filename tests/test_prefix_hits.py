"""The share of prompts that the prefix cache holds."""

import pytest

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.prefix_hits import MEMORY_STEPS, PrefixHits


def taught(hits, steps, cached, computed):
    for _ in range(steps):
        hits.observe(StepRecord(0.02, 4, 4, computed, cached_tokens=cached))
    return hits.share


def test_the_share_is_that_of_all_prompt_tokens():
    hits = PrefixHits()
    assert taught(hits, 1, cached=0, computed=500) == 0
    assert taught(hits, 1, cached=1500, computed=1000) == 0.5


def test_decodes_say_nothing_of_it():
    hits = PrefixHits()
    taught(hits, 1, cached=300, computed=100)
    assert taught(hits, 10 * MEMORY_STEPS, cached=0, computed=0) == 0.75


def test_a_cache_that_is_dropped_is_forgotten():
    hits = PrefixHits()
    assert taught(hits, 1000, cached=900, computed=100) == pytest.approx(0.9)
    assert taught(hits, 3 * MEMORY_STEPS, cached=0, computed=1000) < 0.15
    assert taught(hits, 10 * MEMORY_STEPS, cached=0, computed=1000) < 0.001
