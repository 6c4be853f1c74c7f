"""The contest: every policy against every baseline, on virtual GPUs, as one command."""
