"""Environments that reply to the policy's turns: built-in environments, loading of user classes, and fault tolerance.

An environment is any class with ``reset`` and ``reply``, see `types.Environment`. It handles text and rewards; the
sampling engines and `sampling.conversation` handle tokens.
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
