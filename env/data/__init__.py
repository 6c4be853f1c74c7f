"""Recorded traffic that comes with batchpilot; `sources.json` says whose it is."""
