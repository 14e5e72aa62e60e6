from collections.abc import Iterator
from pathlib import Path

import pytest
from small_server import SmallServer, serving
from tiny_folders import one_thread, other_folder, policy_folder, reward_folder, tokenizer
from transformers import AutoTokenizer

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.hand_over import write_server_folder

__all__ = ["one_thread", "other_folder", "policy_folder", "reward_folder", "tokenizer"]


@pytest.fixture(scope="module")
def policy(policy_folder: str) -> CausalLM:
    return load_policy(policy_folder).requires_grad_(False).eval()


@pytest.fixture
def server(policy_folder: str) -> Iterator[SmallServer]:
    with serving(policy_folder) as running:
        yield running


@pytest.fixture
def tied(policy_folder: str, tmp_path: Path) -> tuple[CausalLM, Path]:
    """Return a policy whose head is tied to its embeddings, and the folder that servers start from."""
    model = load_policy(policy_folder)
    config = model.model.config
    config.tie_word_embeddings = True
    model.model.tie_weights()
    assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    folder = write_server_folder(model.model, AutoTokenizer.from_pretrained(policy_folder), tmp_path / "server")
    return model, folder
