"""What an action is worth where: a linear model of gains, fitted to few and noisy episodes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: Weights of the penalty that are tried, per episode; the last leaves little but the means.
PENALTIES = tuple(float(10.0**power) for power in range(-2, 5))


class Gains(NamedTuple):
    """Predicted gains of each action in each episode, shape (episodes, actions).

    Attributes:
        fitted: By a model of all episodes.
        held_out: Of each episode by a model of all others.
        penalty: Of both.
    """

    fitted: Floats
    held_out: Floats
    penalty: float

    def choices(self, *, held_out: bool = False) -> npt.NDArray[np.int64]:
        """The action that is predicted to gain most in each episode; of equals the first."""
        found: npt.NDArray[np.int64] = (self.held_out if held_out else self.fitted).argmax(axis=1)
        return found


def predict_gains(features: Floats, gains: Floats) -> Gains:
    """Ridge regression of every action's gain on what was seen, one penalty for all.

    Formula, with X the features over their spread about their means, and y a column of gains about
    its mean m: prediction = m + X (X'X + penalty n I)^-1 X'y. Leaving out episode i changes its
    residual to e_i / (1 - h_i), with h the diagonal of 1/n + X (X'X + penalty n I)^-1 X' (Allen,
    Technometrics 16, 1974). The penalty is the one with the least sum of their squares.

    Args:
        features: What was seen, shape (n, features), n at least 2.
        gains: What each action gained, shape (n, actions).
    """
    count = len(features)
    centred = features - features.mean(axis=0)
    spread = centred.std(axis=0)
    scaled = centred[:, spread > 0] / spread[spread > 0]
    means = gains.mean(axis=0)
    candidates = [_fit(scaled, gains, means, penalty, count) for penalty in PENALTIES]
    return min(candidates, key=lambda found: float(((found.held_out - gains) ** 2).sum()))


def _fit(scaled: Floats, gains: Floats, means: Floats, penalty: float, count: int) -> Gains:
    gram = scaled.T @ scaled + penalty * count * np.eye(scaled.shape[1])
    smoother = scaled @ np.linalg.solve(gram, scaled.T)
    fitted = means + smoother @ (gains - means)
    leverage = 1 / count + np.diag(smoother)[:, None]
    return Gains(fitted, gains - (gains - fitted) / (1 - leverage), penalty)
