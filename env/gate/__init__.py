"""The gate: a trained policy is promoted only where it is shown to be better than what is there."""
