"""An engine as the load generator plays it: it runs what it is allowed, and more makes it slower.

Its step time grows with the sequences that run and varies at random, so that a policy with a
latency target hunts around that target and changes its limits as it does for real engines.
"""

from __future__ import annotations

import random

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb

STARTUP = pb.BatchLimits(max_num_seqs=256, max_num_batched_tokens=8192)
ITL_SLO_MS = 50.0
#: A step takes so long with nothing in it, and so much longer for each sequence, in seconds.
STEP_SECONDS, SECONDS_PER_SEQUENCE = 0.018, 0.0002
#: Each interval's step time varies by this share, standard deviation.
NOISE = 0.05
BLOCKS_PER_SEQUENCE = 75
BLOCK_SIZE = 16


def hello(number: int) -> pb.TuneRequest:
    """An engine's first words: a 70B model's figures."""
    return pb.TuneRequest(
        hello=pb.EngineHello(
            id=pb.EngineId(group=f"group-{number % 4}", engine=f"engine-{number}"),
            facts=pb.EngineFacts(
                startup_limits=STARTUP,
                total_blocks=20_000,
                block_size=BLOCK_SIZE,
                tokens_per_decode=1,
            ),
            model_name="load",
            vllm_version="0.32.0",
            batchpilot_version="load",
            itl_slo_ms=ITL_SLO_MS,
            min_num_seqs=1,
            min_prefill_chunk=64,
        )
    )


class LoadEngine:
    """What one engine reports.

    Args:
        number: Which engine; the seed of its noise, and what sets its demand.
        interval: Seconds between its reports.
    """

    def __init__(self, number: int, interval: float) -> None:
        """Starts at its start-up limits."""
        self._chance = random.Random(number)
        self._interval = interval
        self._demand = 96 + number * 7 % 128
        self._request = pb.TuneRequest()
        report = self._request.report
        report.source = "remote"
        report.window.limits.CopyFrom(STARTUP)
        report.local_limits.CopyFrom(STARTUP)

    def apply(self, limits: pb.BatchLimits) -> None:
        """Goes on with other limits."""
        self._request.report.window.limits.CopyFrom(limits)

    def report(self, sequence: int, lease_remaining_seconds: float = 0.0) -> pb.TuneRequest:
        """The next report; the same object every time, changed."""
        report = self._request.report
        report.sequence = sequence
        if lease_remaining_seconds > 0:
            report.lease_remaining_ms = int(1000 * lease_remaining_seconds)
        else:
            report.ClearField("lease_remaining_ms")
        limited = report.window.limits.max_num_seqs < self._demand
        report.binding = pb.BINDING_MAX_NUM_SEQS if limited else pb.BINDING_NONE
        self._fill(report.window, min(self._demand, report.window.limits.max_num_seqs), limited)
        return self._request

    def _fill(self, window: pb.TelemetryWindow, running: int, limited: bool) -> None:
        """A window of a busy engine."""
        interval = self._interval
        mean = STEP_SECONDS + SECONDS_PER_SEQUENCE * running
        step = mean * max(0.5, self._chance.gauss(1.0, NOISE))
        steps = max(1, round(interval / step))
        decoded = steps * running
        window.seconds = window.busy_seconds = interval
        window.steps = steps
        window.slowest_step_seconds = 1.5 * step
        window.decode_tokens = decoded
        window.decode_seconds = decoded * step
        window.prefill_tokens = 1500
        window.running_seconds = running * interval
        window.kv_token_seconds = running * BLOCKS_PER_SEQUENCE * BLOCK_SIZE * interval
        window.peak_running = running
        window.peak_kv_tokens = running * BLOCKS_PER_SEQUENCE * BLOCK_SIZE
        window.arrived = window.finished = 2
        window.arrived_prompt_tokens = 1600
        window.finished_output_tokens = 500
        window.seqs_bound_steps = steps if limited else 0
        window.running = running
        window.waiting = self._demand - running
        window.prefill_seqs = min(2, running)
        window.used_blocks = running * BLOCKS_PER_SEQUENCE
