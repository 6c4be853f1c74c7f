"""What the experience log holds: one row a report, the decision that answered it beside it.

A row is a telemetry window and the limits that were answered. Its outcome is the next row of the
same session (the next `sequence`): nothing is written twice, and a query joins them:

    SELECT *, lead(window_decode_tokens) OVER (PARTITION BY session ORDER BY sequence) AS next
    FROM 'folder/*.parquet'

Columns, beside those below: `window_NAME` for every field of `TelemetryWindow` but its limits, in
the same units, and `applied_max_num_seqs`, `applied_max_num_batched_tokens`: the limits that were
in force at the window's end.

    recorded_at                     when the report came, UTC
    session                         one stream of one engine
    sequence                        counts a session's reports from 1
    engine_group, engine, data_parallel_rank, model_name
                                    whose report it is
    startup_max_num_seqs, startup_max_num_batched_tokens
                                    the limits the engine was started with
    total_blocks, block_size        KV blocks that requests can use, and tokens per block
    itl_slo_ms, ttft_slo_ms         latency targets, the engine's own or else its group's; null
                                    without one. Slow tokens are counted by the first
    policy                          who decided: its text, with the version of a learned one
    source, reason                  of the decision
    proposed_max_num_seqs, proposed_max_num_batched_tokens
                                    what the policy wanted
    limit_max_num_seqs, limit_max_num_batched_tokens
                                    what was answered, after the shield
    clamp                           why the shield changed it; `none` where it did not
    local_max_num_seqs, local_max_num_batched_tokens
                                    what the engine's own policy would apply; null where unknown
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.telemetry import TelemetryWindow

EXPERIENCE_SCHEMA = 1

_WINDOW_FIELDS = tuple(item.name for item in fields(TelemetryWindow) if item.name != "limits")

#: Column: its type, `timestamp`, `text`, `integer` or `number`. Only those in `NULLABLE` hold null.
COLUMNS: Mapping[str, str] = {
    "recorded_at": "timestamp",
    "session": "text",
    "sequence": "integer",
    "engine_group": "text",
    "engine": "text",
    "data_parallel_rank": "integer",
    "model_name": "text",
    "startup_max_num_seqs": "integer",
    "startup_max_num_batched_tokens": "integer",
    "total_blocks": "integer",
    "block_size": "integer",
    "itl_slo_ms": "number",
    "ttft_slo_ms": "number",
    **{f"window_{name}": "number" if "seconds" in name else "integer" for name in _WINDOW_FIELDS},
    "applied_max_num_seqs": "integer",
    "applied_max_num_batched_tokens": "integer",
    "policy": "text",
    "source": "text",
    "reason": "text",
    "proposed_max_num_seqs": "integer",
    "proposed_max_num_batched_tokens": "integer",
    "limit_max_num_seqs": "integer",
    "limit_max_num_batched_tokens": "integer",
    "clamp": "text",
    "local_max_num_seqs": "integer",
    "local_max_num_batched_tokens": "integer",
}
NULLABLE = frozenset(
    ("itl_slo_ms", "ttft_slo_ms", "local_max_num_seqs", "local_max_num_batched_tokens")
)


@dataclass(frozen=True, slots=True)
class ExperienceRow:
    """One report and its answer; the module says what each is.

    Attributes:
        recorded_at: Seconds since 1970, UTC.
        session: Its name.
        sequence: From 1.
        engine_group: Engines that share a policy.
        engine: The server.
        data_parallel_rank: The rank inside it.
        model_name: The served model.
        facts: What does not change while the engine runs.
        targets: The latency targets.
        window: What happened since the last report.
        policy: Who decided.
        proposed: What it wanted.
        limits: What was answered.
        source: Of the decision.
        reason: Of the decision.
        clamp: What the shield did.
        local_limits: What the engine's own policy would apply; None where unknown.
    """

    recorded_at: float
    session: str
    sequence: int
    engine_group: str
    engine: str
    data_parallel_rank: int
    model_name: str
    facts: EngineFacts
    targets: LatencyTargets
    window: TelemetryWindow
    policy: str
    proposed: BatchLimits
    limits: BatchLimits
    source: str
    reason: str
    clamp: str = "none"
    local_limits: BatchLimits | None = None

    def values(self) -> tuple[Any, ...]:
        """Its values in the order of `COLUMNS`; the time in microseconds."""
        facts, window, local = self.facts, self.window, self.local_limits
        return (
            round(self.recorded_at * 1e6),
            self.session,
            self.sequence,
            self.engine_group,
            self.engine,
            self.data_parallel_rank,
            self.model_name,
            *_pair(facts.startup_limits),
            facts.total_blocks,
            facts.block_size,
            self.targets.itl_slo_ms,
            self.targets.ttft_slo_ms,
            *[getattr(window, name) for name in _WINDOW_FIELDS],
            *_pair(window.limits),
            self.policy,
            self.source,
            self.reason,
            *_pair(self.proposed),
            *_pair(self.limits),
            self.clamp,
            *(_pair(local) if local is not None else (None, None)),
        )


def to_columns(rows: Iterable[ExperienceRow]) -> dict[str, list[Any]]:
    """Rows as columns, in the order of `COLUMNS`."""
    columns = list(zip(*(row.values() for row in rows), strict=True))
    if not columns:
        return {name: [] for name in COLUMNS}
    return {name: list(column) for name, column in zip(COLUMNS, columns, strict=True)}


def window_of(row: Mapping[str, Any]) -> TelemetryWindow:
    """The telemetry window in a row that was read back."""
    limits = BatchLimits(row["applied_max_num_seqs"], row["applied_max_num_batched_tokens"])
    return TelemetryWindow(
        **{name: row[f"window_{name}"] for name in _WINDOW_FIELDS}, limits=limits
    )


def facts_of(row: Mapping[str, Any]) -> EngineFacts:
    """The engine's facts in a row that was read back."""
    startup = BatchLimits(row["startup_max_num_seqs"], row["startup_max_num_batched_tokens"])
    return EngineFacts(startup, row["total_blocks"], row["block_size"])


def targets_of(row: Mapping[str, Any]) -> LatencyTargets:
    """The latency targets in a row that was read back."""
    return LatencyTargets(row["itl_slo_ms"], row["ttft_slo_ms"])


def _pair(limits: BatchLimits) -> tuple[int, int]:
    return limits.max_num_seqs, limits.max_num_batched_tokens
