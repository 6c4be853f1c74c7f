"""Who takes part: ours, the paper's rules, other systems' rules, and static settings.

The grid of static pairs stands for an operator who tunes by hand: for each scenario the best of it
is named, and that is the rival that counts.
"""

from __future__ import annotations

from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.profiles import load_profile

OURS = "predictive"
DEFAULT = "static"
WATERMARKS = ("watermark:0.01", "watermark:0.02", "watermark:0.05")
#: Both of the paper's algorithms as published.
PUBLISHED = "memory+sla:sla=sla"
MEMORY_RULES = ("memory", "memory-clt", "memory-peak")
SLA_RULES = ("sla", "sla-guarded", PUBLISHED, "memory+sla")
OTHERS = ("trtllm", "p-pas", "gradient2", "aimd")
#: Of them, those that move the sequence limit.
_BY_SEQUENCES = ("trtllm", "gradient2", "aimd")
#: KV tokens up to which a device counts as small: its grid has half as many sequences.
SMALL_KV_TOKENS = 100_000
_PAIRS = ((64, 512), (128, 256), (128, 512), (128, 1024), (128, 2048), (256, 1024))


def static_pair(max_num_seqs: int, max_num_batched_tokens: int) -> str:
    """A fixed pair, as a contestant is asked for."""
    return f"{DEFAULT}:max_num_seqs={max_num_seqs}:max_num_batched_tokens={max_num_batched_tokens}"


def is_static(label: str) -> bool:
    """Whether a contestant is a fixed pair, vLLM's default among them."""
    return label.partition(":")[0] == DEFAULT


def is_hand_tuned(label: str) -> bool:
    """Whether a contestant stands for tuning by hand: a fixed pair, or a watermark."""
    return is_static(label) or label in WATERMARKS


def static_grid(scenario: Scenario) -> tuple[str, ...]:
    """The pairs an operator would try on this device."""
    share = _grid_share(scenario)
    return tuple(static_pair(seqs // share, tokens) for seqs, tokens in _PAIRS)


def grid_name(label: str, scenario: Scenario) -> str:
    """A contestant's short name, a pair of the grid by what a large device has in its place."""
    share = _grid_share(scenario)
    for seqs, tokens in _PAIRS:
        if label == static_pair(seqs // share, tokens):
            return short_name(static_pair(seqs, tokens))
    return short_name(label)


def _grid_share(scenario: Scenario) -> int:
    """By what the grid's sequences are divided on this device."""
    small = load_profile(scenario.profile).kv_capacity_tokens <= SMALL_KV_TOKENS
    return 2 if small else 1


def slo_lineup(scenario: Scenario) -> tuple[str, ...]:
    """Everybody, where there are targets."""
    return (
        *(DEFAULT, OURS),
        *static_grid(scenario),
        *WATERMARKS,
        *MEMORY_RULES,
        *SLA_RULES,
        *OTHERS,
    )


def saturated_lineup(scenario: Scenario) -> tuple[str, ...]:
    """Everybody who needs no target; the grid's pairs with a full token budget among them."""
    budget = scenario.startup_limits.max_num_batched_tokens
    profile = load_profile(scenario.profile)
    blocks = scenario.kv_blocks or profile.num_blocks
    small = blocks * profile.block_size <= SMALL_KV_TOKENS
    seqs = (16, 32, 64) if small else (64, 128, 256)
    pairs = (static_pair(number, budget) for number in seqs)
    return (*(DEFAULT, OURS), *pairs, *WATERMARKS, *MEMORY_RULES, *_BY_SEQUENCES)


def contestant(label: str) -> Contestant:
    """A contestant by its label.

    Raises:
        ConfigError: Malformed or unknown.
    """
    return Contestant.parse(label)


def short_name(label: str) -> str:
    """A label short enough for a table: a fixed pair as `static 64/256`."""
    name, *pairs = label.split(":")
    if name == DEFAULT and pairs:
        return f"{name} {'/'.join(pair.partition('=')[2] for pair in pairs)}"
    return {PUBLISHED: "memory+sla published"}.get(label, label)
