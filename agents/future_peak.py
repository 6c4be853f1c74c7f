"""Rule 1c: the most KV memory the batch will need, and how many more requests fit beside it.

After LightLLM's Past-Future scheduler (arXiv:2507.10150): every decoding sequence grows one token a
step until it finishes, then frees all it holds, so that a batch may fit now and overflow later.
Where that draws one future from the lengths, here the mean and the variance of all futures are
computed: one draw of a dozen sequences is off by as much as a sequence or two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth
from batchpilot.agents.survival import Floats, SurvivalCurve

#: Sequences of similar age are taken together, in so many groups.
AGE_GROUPS = 32
#: Moments looked at, as shares of the mean output length, besides those at which groups end.
_MOMENTS = np.geomspace(1 / 32, 8, 16)


class Growing(NamedTuple):
    """Sequences that hold KV memory, or will.

    Attributes:
        held: KV tokens each holds once its prompt is in; shape (n,).
        ages: Output tokens each has generated; shape (n,).
        context: Tokens of its context then, where not every layer keeps all of them; shape (n,).
    """

    held: Floats
    ages: Floats
    context: Floats | None = None


class Forecast(NamedTuple):
    """KV tokens held at moments to come.

    Attributes:
        steps: The moments, in decode steps from now, 1 or more and rising; shape (t,).
        mean: Expected KV tokens at each; shape (t,).
        variance: Their variance; shape (t,).
    """

    steps: Floats
    mean: Floats
    variance: Floats


def forecast(running: Growing, output: SurvivalCurve, growth: KvGrowth = EVERY_TOKEN) -> Forecast:
    """The memory that these sequences will hold.

    Formula: in step t sequence i holds c_i + t with probability p_i = P(L >= a_i + t | L > a_i),
    else nothing: the mean is the sum of (c_i + t) p_i, the variance of (c_i + t)^2 p_i (1 - p_i).
    Where not every layer keeps every token, what t more of them take stands for t.
    A step in which a sequence ends counts: it is freed after it. O(n log n) for the groups, and
    O(1) for the rest.

    Args:
        running: The sequences, in any order; at least one.
        output: Distribution of the output length.
        growth: What a sequence holds, by its context.
    """
    order = np.argsort(running.ages, kind="stable")
    held, ages = running.held[order], running.ages[order]
    count = len(held)
    starts = np.unique(np.arange(AGE_GROUPS) * count // AGE_GROUPS)
    sizes = np.diff(np.append(starts, count)).astype(np.float64)[:, None]
    group_ages = np.add.reduceat(ages, starts) / sizes[:, 0]
    sums = np.add.reduceat(held, starts)[:, None]
    squares = np.add.reduceat(held * held, starts)[:, None]

    ends = output.quantile_remaining(np.append(group_ages, 0.0), 0.5)
    steps = np.unique(np.ceil(np.concatenate(([1.0], output.mean * _MOMENTS, ends))))
    alive = _alive(group_ages, steps, output)
    grown = growth.grown(_group_means(running.context, order, starts, sizes), steps)
    mean = ((sums + sizes * grown) * alive).sum(axis=0)
    second = squares + 2 * grown * sums + sizes * grown * grown
    return Forecast(steps, mean, (second * alive * (1 - alive)).sum(axis=0))


def admissible(
    running: Growing,
    waiting: Growing,
    output: SurvivalCurve,
    *,
    capacity: float,
    deviations: float = 0.0,
    growth: KvGrowth = EVERY_TOKEN,
) -> int:
    """How many waiting requests can start, in queue order, without the peak passing `capacity`.

    The peak is the maximum over moments of mean + `deviations` sqrt(variance); one more sequence
    never lowers it.

    Args:
        running: Sequences that run; at least one.
        waiting: Requests in queue order.
        output: Distribution of the output length.
        capacity: KV tokens the peak may reach.
        deviations: Standard deviations kept in reserve, theta in the formula.
        growth: What a sequence holds, by its context.

    Returns:
        The largest j whose first j waiting requests fit beside all running ones; 0 also when the
        running ones alone pass `capacity`.

    Raises:
        ValueError: Shapes differ, or nothing runs.
    """
    for name, group in (("running", running), ("waiting", waiting)):
        if group.held.shape != group.ages.shape:
            raise ValueError(
                f"{name}: held has shape {group.held.shape} and ages {group.ages.shape}; "
                "give one value of each per sequence"
            )
    if not len(running.held):
        raise ValueError("nothing runs: the first request may always start")
    now = forecast(running, output, growth)
    # Nearly all that wait have age 0.
    ages, which = np.unique(waiting.ages, return_inverse=True)
    alive = _alive(ages, now.steps, output)[which]
    context = np.zeros(1) if waiting.context is None else waiting.context
    held = waiting.held[:, None] + growth.grown(context[:, None], now.steps)
    memory = held * alive
    spread = memory * held * (1 - alive)
    mean = np.vstack((now.mean, now.mean + np.cumsum(memory, axis=0)))
    variance = np.vstack((now.variance, now.variance + np.cumsum(spread, axis=0)))
    peaks = (mean + deviations * np.sqrt(variance)).max(axis=1)
    return max(int(np.searchsorted(peaks, capacity, side="right")) - 1, 0)


def _group_means(values: Floats | None, order: Any, starts: Any, sizes: Floats) -> Floats:
    """The mean of each group; shape (groups, 1), or one 0 where there are no values."""
    if values is None:
        return np.zeros((1, 1))
    means: Floats = np.add.reduceat(values[order], starts)[:, None] / sizes
    return means


def _alive(ages: Floats, steps: Floats, output: SurvivalCurve) -> Floats:
    """P(L >= age + t | L > age) for each age and step t; shape (n, t)."""
    reached = output.survival(ages[:, None] + (steps - 1))
    alive: Floats = np.minimum(reached / np.maximum(output.survival(ages), 1e-12)[:, None], 1.0)
    return alive
