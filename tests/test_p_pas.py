"""P-PAS: when the smaller token budget holds."""

import pytest

from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.p_pas import PPasParameters, PPasPolicy

FACTS = EngineFacts(BatchLimits(16, 8192), total_blocks=1000, block_size=16)


@pytest.mark.parametrize(
    ("running", "prefilling", "waiting", "tokens"),
    [
        (10, 2, 0, 2048),  # two prefills beside eight decodes
        (10, 1, 1, 2048),  # one more comes in with this step
        (10, 0, 2, 2048),
        (10, 1, 0, 8192),  # a single one
        (10, 0, 0, 8192),  # none
        (3, 3, 9, 8192),  # nothing decodes yet
        (16, 1, 9, 8192),  # the waiting ones cannot come in: RUNNING is full
        (15, 1, 9, 2048),
    ],
)
def test_prefills_contend_from_two_on_and_only_beside_decodes(running, prefilling, waiting, tokens):
    snapshot = EngineSnapshot(FACTS, 0.0, running, waiting, prefill_seqs=prefilling)
    limits = PPasPolicy(PPasParameters()).decide(snapshot).limits
    assert limits == BatchLimits(16, tokens)


def test_the_budget_never_rises_above_the_start_up_value():
    facts = EngineFacts(BatchLimits(16, 512), total_blocks=1000, block_size=16)
    snapshot = EngineSnapshot(facts, 0.0, 10, 5, prefill_seqs=3)
    assert PPasPolicy(PPasParameters()).decide(snapshot).limits == BatchLimits(16, 512)
