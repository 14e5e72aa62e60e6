"""Fixtures shared by test folders that use models; each conftest imports the ones it needs."""

from typing import Any

import pytest
import torch
from tiny_models import save_policy, save_reward_model

from rlhf_lightning.tokenization import load_tokenizer


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model of the same architecture with different weights."""
    return save_policy(tmp_path_factory.mktemp("tiny") / "other", seed=5)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("tiny") / "reward")


@pytest.fixture(scope="session")
def tokenizer(policy_folder: str) -> Any:
    return load_tokenizer(policy_folder)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, because models this small are slower on several."""
    torch.set_num_threads(1)
