"""The tuning service: limits for a fleet of engines, over gRPC."""
