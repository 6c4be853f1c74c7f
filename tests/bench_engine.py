"""A small deterministic engine in memory, for tests of the bench: a queue, a cache, a clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    StepRecord,
)
from batchpilot.agents.policy import LimitPolicy
from batchpilot.env.engine import EngineRequest, EngineStep

STEP_SECONDS = 0.01


@dataclass
class _Sequence:
    request: EngineRequest
    tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + self.tokens


class QueueEngine:
    """First come, first served; a step takes 10 ms and gives each running sequence a token.

    When the cache is over-full the newest sequence is preempted and waits at the front again, its
    tokens kept and its cache lost, as in vLLM.
    """

    def __init__(self, max_num_seqs: int = 8, total_blocks: int = 100, block_size: int = 1) -> None:
        self.facts = EngineFacts(BatchLimits(max_num_seqs, 1024), total_blocks, block_size)
        self.clock_seconds = 0.0
        self.applied_limits = self.facts.startup_limits
        self.decision: Decision | None = None
        self.policies: list[tuple[LimitPolicy | None, float]] = []
        self.resets = 0
        self.closed = False
        self.aborted: list[str] = []
        self.refuse: set[str] = set()
        self.interrupt_at_step: int | None = None
        self.stalled = False
        self.steps = 0
        self._policy: LimitPolicy | None = None
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()

    def snapshot(self) -> EngineSnapshot:
        used = -(-self._kv_tokens() // self.facts.block_size)
        return EngineSnapshot(
            engine=self.facts,
            clock_seconds=self.clock_seconds,
            running=len(self._running),
            waiting=len(self._waiting),
            used_blocks=used,
        )

    def set_policy(self, policy: LimitPolicy | None, *, watermark: float = 0.0) -> None:
        self._policy = policy
        self.applied_limits = self.facts.startup_limits
        self.policies.append((policy, watermark))

    def add_request(self, request: EngineRequest) -> None:
        if request.request_id in self.refuse:
            raise ValueError("too long")
        self._waiting.append(_Sequence(request))

    def abort_request(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._running = [s for s in self._running if s.request.request_id != request_id]
        kept = (s for s in self._waiting if s.request.request_id != request_id)
        self._waiting = deque(kept)

    def has_unfinished_requests(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> EngineStep:
        self.steps += 1
        if self.steps == self.interrupt_at_step:
            raise KeyboardInterrupt
        self.clock_seconds += STEP_SECONDS
        if self.stalled:
            return EngineStep(self.clock_seconds)
        if self._policy is not None:
            self.decision = self._policy.decide(self.snapshot())
            self.applied_limits = self.decision.limits
        return self._generate(*self._make_room(), self._admit())

    def wait_until(self, clock_seconds: float) -> None:
        self.clock_seconds = max(self.clock_seconds, clock_seconds)

    def reset(self, seed: int | None = None) -> None:
        if self.has_unfinished_requests():
            raise RuntimeError("unfinished")
        self.resets += 1

    def close(self) -> None:
        self.closed = True

    def _kv_tokens(self) -> int:
        return sum(sequence.kv_tokens for sequence in self._running)

    def _admit(self) -> int:
        """Admits while limit and cache allow; returns the prompt tokens that costs."""
        prefill = 0
        while self._waiting and len(self._running) < self.applied_limits.max_num_seqs:
            needed = self._waiting[0].kv_tokens + 1
            if self._running and self._kv_tokens() + needed > self.facts.kv_capacity_tokens:
                break
            self._running.append(self._waiting.popleft())
            prefill += needed - 1
        return prefill

    def _make_room(self) -> tuple[int, int]:
        """Preempts until each running sequence can grow by one token."""
        preemptions = recomputed = 0
        while self._kv_tokens() + len(self._running) > self.facts.kv_capacity_tokens:
            victim = self._running.pop()
            preemptions += 1
            recomputed += victim.kv_tokens
            self._waiting.appendleft(victim)
        return preemptions, recomputed

    def _generate(self, preemptions: int, recomputed: int, prefill: int) -> EngineStep:
        for sequence in self._running:
            sequence.tokens += 1
        kv_tokens, running = self._kv_tokens(), len(self._running)
        done = [s for s in self._running if s.tokens == s.request.output_tokens]
        names = [s.request.request_id for s in self._running]
        self._running = [s for s in self._running if s not in done]
        record = StepRecord(
            seconds=STEP_SECONDS,
            running=running,
            decode_seqs=running,
            prefill_tokens=prefill,
            kv_tokens=kv_tokens,
            preemptions=preemptions,
            recomputed_tokens=recomputed,
            finished=tuple(
                FinishedRequest(len(s.request.prompt_token_ids), s.tokens, True) for s in done
            ),
        )
        return EngineStep(
            self.clock_seconds,
            dict.fromkeys(names, 1),
            tuple(s.request.request_id for s in done),
            record,
        )
