"""What happens beside the learning itself: metrics, evaluations, checkpoints, stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from batchpilot.agents.training.checkpoint import resume_chance, write_checkpoint
from batchpilot.agents.training.evaluation import Evaluation
from batchpilot.agents.training.interrupts import StopRequest
from batchpilot.agents.training.model_files import write_model
from batchpilot.agents.training.progress import Progress
from batchpilot.agents.training.random_state import undisturbed
from batchpilot.agents.training.run_folder import EPISODES, EVALUATIONS, RunFolder, rounded

#: Means over a rollout, under `serving/` in TensorBoard.
_SERVING = (
    *("goodput_tokens_per_s", "throughput_tokens_per_s", "cost", "shielded_share"),
    *("running", "waiting", "kv_cache_usage", "preemptions"),
    *("reward_goodput", "reward_slo_penalty", "reward_preemption_penalty"),
    *("reward_shield_penalty", "reward_shaping"),
)


class ServingMetrics(BaseCallback):
    """Reports how requests are served: to TensorBoard, and each episode to `episodes.csv`."""

    def __init__(self, folder: RunFolder, progress: Progress) -> None:
        """Keeps where to report."""
        super().__init__()
        self._folder = folder
        self._progress = progress

    def _on_step(self) -> bool:
        rows = []
        for index, info in enumerate(self.locals["infos"]):
            for name in _SERVING:
                self.logger.record_mean(f"serving/{name}", float(info[name]))
            if "episode" in info:
                self.logger.record_mean("serving/slo_attainment", info["slo_attainment"])
                rows.append(self._row(index, info))
        if rows:
            self._folder.add_rows("episodes.csv", EPISODES, rows)
        self._progress(self.num_timesteps)
        return True

    def _row(self, index: int, info: dict[str, Any]) -> tuple[Any, ...]:
        episode = info["episode"]
        shares = (round(info[n], 5) for n in ("slo_attainment", "episode_shielded_share"))
        return self.num_timesteps, index, episode["r"], episode["l"], *shares


@dataclass(frozen=True)
class Rhythm:
    """When something is due: at every multiple of so many steps.

    Attributes:
        every: Steps.
        is_on: False: never.
    """

    every: int
    is_on: bool = True

    def is_due(self, before: int, now: int) -> bool:
        """Whether a multiple lies in (before, now]."""
        return self.is_on and before // self.every < now // self.every


class BetweenRollouts(BaseCallback):
    """Evaluates, saves and stops, each between an update and the next rollout.

    Args:
        folder: Of the run.
        evaluate: Plays held-out episodes with the model as it is; None: never.
        evaluations: When.
        checkpoints: When.
        stop: Whether to save now and stop.
        chance: Every source of chance, where training goes on from a checkpoint.
        progress: Hears of evaluations.
    """

    def __init__(
        self,
        folder: RunFolder,
        evaluate: Callable[[], Evaluation] | None,
        *,
        evaluations: Rhythm,
        checkpoints: Rhythm,
        stop: StopRequest,
        chance: dict[str, Any] | None,
        progress: Progress,
    ) -> None:
        """Keeps everything."""
        super().__init__()
        self._folder = folder
        self._evaluate = evaluate
        self._evaluations, self._checkpoints = evaluations, checkpoints
        self._stop = stop
        self._chance = chance
        self._progress = progress
        self._before = 0
        self.best: float | None = folder.best_attainment()
        self.stopped = False
        self.saved_steps = 0

    def _on_training_start(self) -> None:
        self._before = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        if self._chance is not None:
            resume_chance(self._chance)
            self._chance = None
        now = self.model.num_timesteps
        # The untrained agent is a candidate too: a residual one is its base policy.
        is_start = now == 0 and self._evaluations.is_on
        if is_start or self._evaluations.is_due(self._before, now):
            self.evaluate_now()
        if self._checkpoints.is_due(self._before, now) or self._stop.is_set:
            self.save_now()
        self._before = now
        self.stopped = self._stop.is_set

    def _on_step(self) -> bool:
        return not self.stopped

    def save_now(self) -> None:
        """Writes a checkpoint and the last model."""
        write_checkpoint(self.model, self._folder.checkpoint(self.model.num_timesteps))
        self._folder.prune_checkpoints()
        last = self._folder.path / "last"
        last.mkdir(exist_ok=True)
        write_model(self.model, last / "model.zip")
        self.saved_steps = self.model.num_timesteps

    def evaluate_now(self) -> Evaluation | None:
        """Plays held-out episodes, once a step; keeps the model where none was better."""
        before = self._folder.read_rows("evaluations.csv")
        done = bool(before) and before[-1]["step"] == self.model.num_timesteps
        if self._evaluate is None or done:
            return None
        with undisturbed():
            result = self._evaluate()
        step, figures = self.model.num_timesteps, rounded(result.figures())
        row = (step, *(figures[name] for name in EVALUATIONS[1:]))
        self._folder.add_rows("evaluations.csv", EVALUATIONS, [row])
        for name in EVALUATIONS[1:]:
            self.logger.record(f"eval/{name}", figures[name])
        if self.best is None or figures["slo_attainment"] >= self.best:
            self._keep_best(figures)
        self._progress(step, f"attainment {figures['slo_attainment']:.3f} on held-out seeds, "
                             f"best {self.best:.3f}")  # fmt: skip
        return result

    def _keep_best(self, figures: dict[str, Any]) -> None:
        self.best = figures["slo_attainment"]
        best = self._folder.path / "best"
        best.mkdir(exist_ok=True)
        write_model(self.model, best / "model.zip")
        self._folder.write_json("best/figures.json", {"step": self.model.num_timesteps, **figures})
