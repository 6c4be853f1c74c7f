"""What is steered: engines, workloads and the commands that run one on the other."""
