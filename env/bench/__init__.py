"""`batchpilot bench`: one workload, several policies, one engine, and a fair comparison."""
