"""Measures an engine's step times and fits a GPU profile to them."""
