"""Who decides: the vocabulary of limits, the policies, the estimators they share, the shield.

Everything here imports only the standard library and numpy, holds no clock, no I/O and no engine:
the same objects run inside vLLM, in an environment, in the tuning service and in a unit test.
"""
