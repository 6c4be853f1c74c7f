"""batchpilot: steers the batch limits of LLM servers while they run."""

__version__ = "0.1.0"
