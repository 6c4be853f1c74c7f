"""Fits the step-time form of a GPU profile to measured steps.

The form is linear in its coefficients but for one number: the knee, the count of tokens at which
the linear layers go from reading weights to computing. `max(floor, base + token*T)` equals
`base + token*max(knee, T)` with `floor = base + token*knee`, so for each knee that is tried the
rest is a least-squares problem with coefficients that must not be negative. Errors count relative
to the measured time, and large ones only in proportion (Huber), so that a step which the machine
disturbed does not bend the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.profiles import FitError, StepTimeModel

Floats = NDArray[np.float64]

#: Fewest samples for six coefficients and the knee.
LEAST_SAMPLES = 12
_KNEES_TRIED = 32
_KNEES_REFINED = 9
_KNEE_ROUNDS = 4
_ROBUST_ROUNDS = 12
#: The column of what mixing decodes and prompts costs.
_MIXED = 4
#: Relative errors beyond this count in proportion, not squared.
_HUBER_RELATIVE = 0.03


class StepSample(NamedTuple):
    """A measured step.

    Attributes:
        seconds: What it took.
        decode_seqs: Sequences that decoded in it.
        prefill_tokens: Prompt tokens it computed.
        kv_tokens: Context lengths of its decoding sequences, summed.
        prefill_squares: Its prompts' lengths squared, each, and summed.
    """

    seconds: float
    decode_seqs: int
    prefill_tokens: int
    kv_tokens: int
    prefill_squares: int


@dataclass(frozen=True)
class StepTimeFit:
    """A fitted step-time model and how well it fits.

    Attributes:
        model: Without engine overhead of its own: what was measured is in the coefficients.
        error: Over the samples it was fitted to.
        fitted_seconds: One per sample, in their order.
    """

    model: StepTimeModel
    error: FitError
    fitted_seconds: tuple[float, ...]


def fit_step_times(samples: Sequence[StepSample], *, mixed_attention: bool = True) -> StepTimeFit:
    """Finds the coefficients that explain the samples best.

    Args:
        samples: Measured steps.
        mixed_attention: False where no step measured decodes and prompts together, as in samples
            composed of separate kernels: what mixing costs then stays unknown.

    Raises:
        ConfigError: Too few samples, or one whose time is not positive.
    """
    if len(samples) < LEAST_SAMPLES:
        raise ConfigError(
            f"{len(samples)} measured steps are too few to fit; at least {LEAST_SAMPLES} are needed"
        )
    table = np.array(samples, dtype=np.float64)
    if not (np.isfinite(table).all() and (table[:, 0] > 0).all()):
        raise ConfigError("a measured step has no positive time")
    model = _best_model(table, mixed_attention)
    fitted = tuple(model.seconds(*sample[1:]) for sample in samples)
    return StepTimeFit(model, fit_error(table[:, 0], np.array(fitted)), fitted)


def fit_error(measured: Floats, fitted: Floats) -> FitError:
    """How far fitted times are from measured ones; same length, same unit."""
    relative = np.abs(fitted - measured) / measured
    return FitError(
        mean_relative=round(float(relative.mean()), 5),
        p90_relative=round(float(np.percentile(relative, 90)), 5),
        samples=len(measured),
    )


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """Minimises |matrix @ x - target| over x >= 0, by Lawson and Hanson's active set (1974).

    Args:
        matrix: Samples by coefficients.
        target: One per sample.

    Returns:
        The coefficients.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    count = scaled.shape[1]
    solution, active = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-10 * float(np.linalg.norm(target))
    for _ in range(3 * count):
        gain = np.where(active, -np.inf, scaled.T @ (target - scaled @ solution))
        if active.all() or gain.max() <= tolerance:
            break
        active[int(gain.argmax())] = True
        solution, active = _solve_active(scaled, target, solution, active)
    return np.asarray(solution / scale, dtype=np.float64)


def _solve_active(
    matrix: Floats, target: Floats, solution: Floats, active: NDArray[np.bool_]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Solves for the active coefficients, letting go of those that would turn negative."""
    while active.any():
        trial = np.zeros_like(solution)
        trial[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
        negative = active & (trial <= 0)
        if not negative.any():
            return trial, active
        step = np.min(solution[negative] / (solution[negative] - trial[negative]))
        solution = solution + step * (trial - solution)
        active = active & (solution > 1e-15)
        solution[~active] = 0.0
    return solution, active


def _best_model(table: Floats, mixed_attention: bool) -> StepTimeModel:
    """Tries knees on a log scale over what was measured, then ever finer around the best."""
    tokens = table[:, 1] + table[:, 2]
    knees = np.concatenate(([0.0], np.geomspace(1, tokens.max(), _KNEES_TRIED)))
    for _ in range(_KNEE_ROUNDS):
        tried = [_fit_with_knee(table, knee, mixed_attention) for knee in knees]
        best = min(range(len(tried)), key=lambda index: tried[index][0])
        around = knees[max(best - 1, 0)], knees[min(best + 1, len(knees) - 1)]
        knees = np.linspace(*around, _KNEES_REFINED)
    return tried[best][1]


def _fit_with_knee(
    table: Floats, knee: float, mixed_attention: bool
) -> tuple[float, StepTimeModel]:
    """The best model with this knee, and its robust loss."""
    measured = table[:, 0] * 1e3
    columns = _columns(table, knee)
    columns[:, _MIXED] *= mixed_attention
    weights = np.ones(len(table))
    loss, coefficients = np.inf, np.zeros(columns.shape[1])
    for _ in range(_ROBUST_ROUNDS):
        row_weights = np.sqrt(weights) / measured
        coefficients = nonnegative_least_squares(
            columns * row_weights[:, None], measured * row_weights
        )
        relative = np.abs(columns @ coefficients - measured) / measured
        weights = _HUBER_RELATIVE / np.maximum(relative, _HUBER_RELATIVE)
        previous, loss = loss, _huber(relative)
        if previous - loss < 1e-6 * loss:
            break
    return loss, _model(coefficients, knee, has_mixed=bool(columns[:, _MIXED].any()))


def _huber(relative: Floats) -> float:
    """Mean of squares near zero and of distances beyond."""
    near = np.minimum(relative, _HUBER_RELATIVE)
    return float(np.mean(near * (relative - near / 2)))


def _columns(table: Floats, knee: float) -> Floats:
    """What each coefficient is multiplied with: samples by (base, token, D, K, mixed K, S)."""
    _, decode_seqs, prefill_tokens, kv_tokens, prefill_squares = table.T
    mixed = (decode_seqs > 0) & (prefill_tokens > 0)
    return np.column_stack(
        (
            np.ones(len(table)),
            np.maximum(knee, decode_seqs + prefill_tokens),
            decode_seqs,
            kv_tokens,
            kv_tokens * mixed,
            prefill_squares,
        )
    )


def _model(coefficients: Floats, knee: float, *, has_mixed: bool) -> StepTimeModel:
    base, token, decode_seq, kv_token, mixed, squared = (
        float(f"{value:.5g}") for value in coefficients
    )
    return StepTimeModel(
        floor_ms=float(f"{base + token * knee:.5g}"),
        linear_base_ms=base,
        token_ms=token,
        decode_seq_ms=decode_seq,
        kv_token_ms=kv_token,
        mixed_kv_token_ms=mixed if has_mixed else None,
        prefill_squared_ms=squared,
        overhead_ms=0.0,
        overhead_decode_seq_ms=0.0,
    )
