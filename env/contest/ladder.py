"""The highest rate of a shared ladder that a contestant keeps: a search that is cheap to be wrong.

Rung k is 2^(k / STEPS_PER_DOUBLING) times the scenario's own rate, the same for every contestant
and seed, so that outcomes can be shared and compared. From where it is expected the search moves
away until the verdict changes, then halves the gap. Upwards its steps double; downwards they do so
only once, for a rate far above what is kept is given up early, and one far below takes longest.

Limitations: it takes for granted that a higher rate is never easier. The answer is a rung, so that
two contestants that are less than a step (4.4 %) apart may come out equal.
"""

from __future__ import annotations

from collections.abc import Callable

STEPS_PER_DOUBLING = 16
LOWEST, HIGHEST = -64, 48
_FIRST_STRIDE, _LONGEST_FALL = 2, 4


def rate_scale(rung: int) -> float:
    """The factor on the scenario's own rate."""
    return float(2.0 ** (rung / STEPS_PER_DOUBLING))


def highest_kept(keeps: Callable[[int], bool], start: int) -> int | None:
    """The highest rung that is kept; None where not even the lowest is.

    Args:
        keeps: Tries a rung.
        start: Where the answer is expected.
    """
    start = min(max(start, LOWEST), HIGHEST)
    rises = keeps(start)
    kept, lost = (start, HIGHEST + 1) if rises else (LOWEST - 1, start)
    rung, stride = start, _FIRST_STRIDE
    while True:
        rung = min(rung + stride, HIGHEST) if rises else max(rung - stride, LOWEST)
        stride = 2 * stride if rises else _LONGEST_FALL
        if (rises and rung <= kept) or (not rises and rung >= lost):
            break
        if keeps(rung):
            kept = rung
            if not rises:
                break
        else:
            lost = rung
            if rises:
                break
    while lost - kept > 1 and kept >= LOWEST:
        middle = (kept + lost) // 2
        kept, lost = (middle, lost) if keeps(middle) else (kept, middle)
    return kept if kept >= LOWEST else None
