"""The part that runs inside vLLM: reads the engine, applies limits, reports what it did."""

from batchpilot.scheduler_hook.scheduler import Scheduler

__all__ = ["Scheduler"]
