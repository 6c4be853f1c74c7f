"""Which form of the step time earns its place: `python -m batchpilot.env.step_time_table`.

Every form predicts each step just before it is told how long the step took; what is shown is the
mean absolute error of these one-step-ahead predictions, in per cent, once `--skip` steps have been
seen. Steps come from

- the bundled GPU profiles: vLLM's own scheduler serves bursts of ShareGPT requests on each, now at
  a budget of 2048 tokens, now of 512; with `--noise` 0.05 a form that knew the truth would be off
  by 4 %;
- with `--data DIR`, measured steps: `blis_h100_vllm_step_samples.csv` (vLLM on H100 GPUs, in order
  of time, where two samples follow one another), `ebvllm_qwen3_4b_rtxpro6000_mixed_steps.csv` and
  `llmservingsim_composed_steps.csv` (single steps, shuffled with a fixed seed).
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.step_time import StepTimeEstimator, StepTimeForm
from batchpilot.env.profiles import load_profile, profile_names
from batchpilot.env.virtual_engine import VOCAB_SIZE, VirtualEngine, VirtualEngineConfig
from batchpilot.env.workloads import WorkloadSpec, engine_requests

LINE = (0,)
FLOOR = StepTimeForm().knees
FORMS = {
    "linear": StepTimeForm(LINE, mixed_kv=False, prefill_squared=False),
    "+ S": StepTimeForm(LINE, mixed_kv=False),
    "+ mixed KV": StepTimeForm(LINE, prefill_squared=False),
    "+ both": StepTimeForm(LINE),
    "floor": StepTimeForm(FLOOR, mixed_kv=False, prefill_squared=False),
    "floor + S": StepTimeForm(FLOOR, mixed_kv=False),
    "floor + mixed KV": StepTimeForm(FLOOR, prefill_squared=False),
    "floor + both": StepTimeForm(FLOOR),
}
REQUESTS = 200
RATES = (0.5, 2.0)
LONGEST_STREAM = 4000


def profile_steps(name: str, noise: float) -> list[StepRecord]:
    """Steps of a profile under bursts that are now light, now heavy, at two token budgets."""
    steps: list[StepRecord] = []
    # What serves a request a second on the smallest device is light on the largest.
    fast = load_profile("llama-3.1-8b-rtx4090").step_time.seconds(1, 2048, 0)
    scale = fast / load_profile(name).step_time.seconds(1, 2048, 0)
    for index, budget in enumerate((2048, 512)):
        config = VirtualEngineConfig(name, max_num_batched_tokens=budget, noise=noise, seed=index)
        arrivals = ",".join(
            f"gamma:rate={rate * scale:.4g}:cv=2" + (f"@{60 / scale:.4g}" if place else "")
            for place, rate in enumerate(RATES)
        )
        workload = WorkloadSpec("sharegpt", arrivals, REQUESTS, seed=index).build()
        times = (request.arrival_seconds for request in workload.requests)
        requests = engine_requests(workload, vocab_size=VOCAB_SIZE, seed=index)
        with VirtualEngine(config) as engine:
            steps += _served(engine, zip(times, requests, strict=True))
    return steps


def _served(engine: VirtualEngine, timed: Iterable[tuple[float, object]]) -> list[StepRecord]:
    """Serves requests at their times; the steps of the first `LONGEST_STREAM` records."""
    pending = list(timed)[::-1]
    steps: list[StepRecord] = []
    while len(steps) < LONGEST_STREAM and (pending or engine.has_unfinished_requests()):
        if not engine.has_unfinished_requests():
            engine.wait_until(pending[-1][0])
        while pending and pending[-1][0] <= engine.clock_seconds:
            engine.add_request(pending.pop()[1])  # type: ignore[arg-type]
        record = engine.step().record
        if record is not None:
            steps.append(record)
    engine.abort_all()
    return steps


def measured_steps(folder: Path) -> Iterator[tuple[str, list[StepRecord]]]:
    """Streams of measured steps in a folder, by name; files that are not there are left out."""
    blis = folder / "blis_h100_vllm_step_samples.csv"
    if blis.is_file():
        rows = [row for row in _rows(blis) if row["next_sampled_step_gap"] == "1"]
        for experiment in dict.fromkeys(row["experiment"] for row in rows):
            chosen = [row for row in rows if row["experiment"] == experiment]
            yield f"measured: {experiment}", [_step(row, *_BLIS_COLUMNS) for row in chosen]
    for name, label in _SHUFFLED.items():
        path = folder / name
        if path.is_file():
            all_rows = list(_rows(path))
            keys = dict.fromkeys(_machine(row) for row in all_rows)
            for key in keys:
                chosen = [row for row in all_rows if _machine(row) == key]
                random.Random(0).shuffle(chosen)
                steps = [_step(row, "decode_seqs", "kv_tokens", "step_ms") for row in chosen]
                yield f"measured: {label}{key}", steps


_BLIS_COLUMNS = ("decode_reqs", "kv_tokens_used", "interval_ms_per_step_to_next_sample")
_SHUFFLED = {
    "ebvllm_qwen3_4b_rtxpro6000_mixed_steps.csv": "qwen3-4b-rtxpro6000",
    "llmservingsim_composed_steps.csv": "",
}


def _machine(row: dict[str, str]) -> str:
    return "-".join(row[key] for key in ("gpu", "model", "tp") if key in row)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _step(row: dict[str, str], decodes: str, kv_tokens: str, milliseconds: str) -> StepRecord:
    decode_seqs = int(row[decodes])
    return StepRecord(
        seconds=float(row[milliseconds] or 0) / 1e3,
        running=decode_seqs,
        decode_seqs=decode_seqs,
        prefill_tokens=int(row["prefill_tokens"]),
        kv_tokens=int(row[kv_tokens]),
    )


def mean_error(form: StepTimeForm, steps: Sequence[StepRecord], skip: int) -> float:
    """Mean absolute relative error of one-step-ahead predictions, the first `skip` left out."""
    model = StepTimeEstimator(form)
    errors = []
    for index, step in enumerate(steps):
        if index >= skip and step.regular and step.seconds > 0:
            errors.append(abs(model.expect(step) / step.seconds - 1))
        model.observe(step)
    return sum(errors) / len(errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.env.step_time_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of measured steps")
    parser.add_argument("--noise", type=float, default=0.0, help="of each step (default 0)")
    parser.add_argument("--skip", type=int, default=100, help="steps not counted (default 100)")
    parser.add_argument("--profiles", nargs="*", default=list(profile_names()), metavar="NAME")
    args = parser.parse_args(argv)
    table = Table(title="One-step-ahead error of the step time, mean, per cent")
    table.add_column("steps of", overflow="fold")
    table.add_column("n", justify="right")
    for name in FORMS:
        table.add_column(name, justify="right")
    streams = [(name, profile_steps(name, args.noise)) for name in args.profiles]
    streams += measured_steps(args.data) if args.data else []
    for name, steps in streams:
        errors = [mean_error(form, steps, args.skip) for form in FORMS.values()]
        cells = [f"{100 * error:.1f}" for error in errors]
        table.add_row(name, str(len(steps)), *cells)
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
