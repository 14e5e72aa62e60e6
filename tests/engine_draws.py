"""Prompts that the tests of engines sample from, and what they do with the completions."""

from typing import Any

import torch
from tiny_models import EOS, random_rows
from torch import Tensor

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingSettings

PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(9, seed=5, prompt=9)]
EPISODES = torch.arange(20, 29)
ENDS = (EOS, *range(20, 34))


def draw(engine: SamplingEngine, policy: CausalLM, ends: tuple[int, ...] = ENDS, **settings: Any) -> Completions:
    chosen = SamplingSettings(**({"max_new_tokens": 12, "temperature": 0.9} | settings))
    return engine.sample(policy, PROMPTS, EPISODES, chosen, 7, ends)


def as_lists(drawn: Completions) -> list[list[int]]:
    return [ids.tolist() for ids in drawn.ids]


def adapted(folder: str) -> CausalLM:
    model = load_policy(folder, lora=LoraSettings(r=4))
    change(model, 1)
    return model


def change(model: CausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator, std=0.1)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
