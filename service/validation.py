"""What cannot be real is refused, before anything is computed from it.

A report is believed where it is possible, not where it is likely: an engine that lies about itself
misleads the limits that it gets itself, where its own shield still has the last word, and the trial
of a canary that it is part of.
"""

from __future__ import annotations

import math
import re

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb

#: Group and engine names become metric labels and log fields.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
#: Longest free text an engine may send of itself, in characters.
LONGEST_TEXT = 256
#: A hello is kept as long as its session.
LARGEST_HELLO_BYTES = 4096
LARGEST_RANK = 65_535
LARGEST_NUM_SEQS = 1_000_000
LARGEST_TOKENS = 100_000_000
LARGEST_BLOCKS = 1_000_000_000
LARGEST_BLOCK_SIZE = 1_000_000
LARGEST_SLO_MS = 3_600_000.0
#: Longest time a report may span: a hook that was stopped for a day starts anew.
LONGEST_WINDOW_SECONDS = 86_400.0
#: What clocks read at different moments may differ by.
SLACK_SECONDS = 1.0
#: Fastest engine that is believed; a bound on the work one report can ask for.
STEPS_PER_SECOND = 20_000
MOST_STEPS = 20_000
#: Steps told one by one, and waiting requests: more than any hook sends.
MOST_DETAILED_STEPS, MOST_WAITING = 4096, 4096
MOST_REQUESTS = 100_000
MOST_CLAMP_REASONS = 32


class ReportError(ValueError):
    """A message that cannot be real; the text names the field, its value and what is possible."""


def check_id(message: pb.EngineId) -> None:
    """Refuses names that could not be labels.

    Raises:
        ReportError: Naming the field.
    """
    for field, text in (("group", message.group), ("engine", message.engine)):
        if not NAME.fullmatch(text):
            raise ReportError(
                f"{field}={text[:40]!r} must be 1 to 128 letters, digits or ._:/@- "
                "and begin with a letter or digit"
            )
    _at_most("data_parallel_rank", message.data_parallel_rank, LARGEST_RANK)


def check_hello(message: pb.EngineHello) -> None:
    """Refuses an engine that could not exist.

    Raises:
        ReportError: Naming the field.
    """
    if message.ByteSize() > LARGEST_HELLO_BYTES:
        raise ReportError(f"a hello of {message.ByteSize()} bytes; {LARGEST_HELLO_BYTES} suffice")
    check_id(message.id)
    facts, startup = message.facts, message.facts.startup_limits
    _between("max_num_seqs", startup.max_num_seqs, 1, LARGEST_NUM_SEQS)
    _between("max_num_batched_tokens", startup.max_num_batched_tokens, 1, LARGEST_TOKENS)
    _between("total_blocks", facts.total_blocks, 1, LARGEST_BLOCKS)
    _between("block_size", facts.block_size, 1, LARGEST_BLOCK_SIZE)
    _between("tokens_per_decode", facts.tokens_per_decode, 1, startup.max_num_batched_tokens)
    if facts.HasField("kv_growth_share"):
        _between("kv_growth_share", facts.kv_growth_share, 0, 1)
        least = 0 if facts.kv_growth_share == 1 else 1
        _between("kv_window_tokens", facts.kv_window_tokens, least, LARGEST_TOKENS)
    _at_most("unchunked_prefill_tokens", facts.unchunked_prefill_tokens, LARGEST_TOKENS)
    _at_most("min_num_seqs", message.min_num_seqs, startup.max_num_seqs)
    _at_most("min_prefill_chunk", message.min_prefill_chunk, LARGEST_TOKENS)
    for field in ("itl_slo_ms", "ttft_slo_ms"):
        if message.HasField(field):
            value = getattr(message, field)
            if not 0 < value <= LARGEST_SLO_MS:  # false for NaN too
                raise ReportError(f"{field}={value} must be above 0 and at most {LARGEST_SLO_MS:g}")
    for field in ("model_name", "vllm_version", "batchpilot_version"):
        if len(getattr(message, field)) > LONGEST_TEXT:
            raise ReportError(f"{field} must be at most {LONGEST_TEXT} characters")


def check_report(report: pb.Report, facts: pb.EngineFacts) -> None:
    """Refuses a report that no engine of these facts could send.

    Raises:
        ReportError: Naming the field.
    """
    window = report.window
    _check_window(window, facts)
    _at_most("outside_blocks", report.outside_blocks, window.used_blocks)
    if report.HasField("tokens_per_decode"):
        _between("tokens_per_decode", report.tokens_per_decode, 1, facts.tokens_per_decode)
    if report.binding not in _BINDINGS:
        raise ReportError(f"binding={report.binding} is not known")
    if len(report.source) > LONGEST_TEXT or len(report.clamps) > MOST_CLAMP_REASONS:
        raise ReportError(f"source or clamps are longer than {LONGEST_TEXT}, {MOST_CLAMP_REASONS}")
    if report.steps or report.running.kv_tokens or report.waiting.kv_tokens:
        _check_detail(report, facts)


_BINDINGS = frozenset(pb.Binding.values())


def _check_window(window: pb.TelemetryWindow, facts: pb.EngineFacts) -> None:
    seconds, busy = window.seconds, window.busy_seconds
    # Comparisons written so that NaN fails them.
    if not (0 <= seconds <= LONGEST_WINDOW_SECONDS and 0 <= busy <= LONGEST_WINDOW_SECONDS):
        raise ReportError(
            f"seconds={seconds} and busy_seconds={busy} must be 0 to {LONGEST_WINDOW_SECONDS:g}"
        )
    # The oldest of its steps may have begun before the window did.
    if busy > seconds + window.slowest_step_seconds + SLACK_SECONDS:
        raise ReportError(f"busy_seconds={busy} is more than there was in {seconds} seconds")
    steps = window.steps
    if steps > MOST_STEPS or steps > 16 + STEPS_PER_SECOND * max(seconds, busy):
        raise ReportError(f"steps={steps} are too many for {seconds} seconds")
    most_seqs = facts.startup_limits.max_num_seqs
    if not window.prefill_seqs <= window.running <= most_seqs:
        raise ReportError(
            f"running={window.running}, of which prefill_seqs={window.prefill_seqs}, "
            f"must be at most the start-up max_num_seqs={most_seqs}"
        )
    if window.used_blocks > facts.total_blocks:
        raise ReportError(f"used_blocks={window.used_blocks} must be at most {facts.total_blocks}")
    if window.kv_bound_steps + window.seqs_bound_steps + window.tokens_bound_steps > steps:
        raise ReportError(f"more steps were bound than the {steps} there were")
    _check_sums(window, facts)


def _check_sums(window: pb.TelemetryWindow, facts: pb.EngineFacts) -> None:
    for total in (
        window.slowest_step_seconds,
        window.decode_seconds,
        window.running_seconds,
        window.kv_token_seconds,
    ):
        if not 0 <= total < math.inf:
            raise ReportError(f"a sum of seconds is {total}; it must be finite and not negative")
    most = window.steps * facts.startup_limits.max_num_batched_tokens
    if window.decode_tokens > most or window.prefill_tokens > most:
        raise ReportError(
            f"decode_tokens={window.decode_tokens} or prefill_tokens={window.prefill_tokens} "
            f"is more than {window.steps} steps can compute"
        )
    if window.arrived > MOST_REQUESTS or window.finished > MOST_REQUESTS:
        raise ReportError(
            f"arrived={window.arrived} and finished={window.finished} must be at most "
            f"{MOST_REQUESTS}"
        )
    if window.slow_decode_tokens > window.decode_tokens:
        raise ReportError(f"slow_decode_tokens={window.slow_decode_tokens} exceeds decode_tokens")


def _check_detail(report: pb.Report, facts: pb.EngineFacts) -> None:
    """Checks the steps and sequences of DETAIL_STEPS."""
    if len(report.steps) > MOST_DETAILED_STEPS:
        raise ReportError(f"{len(report.steps)} steps are more than {MOST_DETAILED_STEPS}")
    most_seqs = facts.startup_limits.max_num_seqs
    for step in report.steps:
        if not (0 <= step.seconds <= LONGEST_WINDOW_SECONDS and step.binding in _BINDINGS):
            raise ReportError(f"a step took {step.seconds} s, bound by {step.binding}")
        if not step.decode_seqs <= step.running <= most_seqs:
            raise ReportError(
                f"decode_seqs={step.decode_seqs} of running={step.running} in a step; "
                f"the start-up max_num_seqs is {most_seqs}"
            )
    for name, columns in (("running", report.running), ("waiting", report.waiting)):
        count = len(columns.kv_tokens)
        if not count == len(columns.output_tokens) == len(columns.prefill_tokens_left):
            raise ReportError(f"the columns of {name} differ in length")
    waiting = len(report.waiting.kv_tokens)
    if waiting > MOST_WAITING:
        raise ReportError(f"{waiting} waiting requests are more than {MOST_WAITING}")
    if len(report.running.kv_tokens) > most_seqs:
        raise ReportError(f"{len(report.running.kv_tokens)} sequences run; at most {most_seqs} can")


def _at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise ReportError(f"{field}={value} must be at most {most}")


def _between(field: str, value: float, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ReportError(f"{field}={value} must be between {least} and {most}")
