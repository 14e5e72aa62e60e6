"""Environments: what replies to the policy's turns. Those that ship, and how a user's class is loaded and kept safe.

An environment is any class with ``reset`` and ``reply``, see `types.Environment`. It knows text and rewards; the
sampling engines and `sampling.conversation` know tokens.
"""

from rlhf_lightning.environments.environment import (
    EnvironmentFailedError,
    FaultTolerantEnvironment,
    conversing,
    fingerprint_of,
    load_environment,
)
from rlhf_lightning.environments.games import GuessTheNumber, ReasoningGym
from rlhf_lightning.environments.tool_use import ToolEnvironment, calculator

__all__ = [
    "EnvironmentFailedError", "FaultTolerantEnvironment", "GuessTheNumber", "ReasoningGym", "ToolEnvironment",
    "calculator", "conversing", "fingerprint_of", "load_environment",
]  # fmt: skip
