"""Makes the environments known to Gymnasium: import this module, then `gymnasium.make`.

Nothing heavy is imported before an environment is made. `gymnasium.make` also imports the module
itself where it is told to, as in `batchpilot.env.registration:batchpilot/BatchLimits-v0`.
"""

from __future__ import annotations

import gymnasium

VIRTUAL_ENV = "batchpilot/BatchLimits-v0"
RANDOM_ENV = "batchpilot/RandomBatchLimits-v0"
LIVE_ENV = "batchpilot/LiveBatchLimits-v0"
SERVED_ENV = "batchpilot/ServedBatchLimits-v0"

gymnasium.register(VIRTUAL_ENV, entry_point="batchpilot.env.batch_limits_env:BatchLimitsEnv")
gymnasium.register(
    RANDOM_ENV, entry_point="batchpilot.env.random_batch_limits_env:RandomBatchLimitsEnv"
)
gymnasium.register(
    LIVE_ENV,
    entry_point="batchpilot.env.live_batch_limits_env:LiveBatchLimitsEnv",
    nondeterministic=True,
)
gymnasium.register(
    SERVED_ENV,
    entry_point="batchpilot.env.served_batch_limits_env:ServedBatchLimitsEnv",
    nondeterministic=True,
)
