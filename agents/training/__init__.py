"""What needs torch: training agents, exporting them, and the command that does both.

Nothing outside this folder imports it: a trained policy leaves it as an ONNX file.
"""
