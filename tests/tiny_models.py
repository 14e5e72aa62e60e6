"""Tiny language models with a tokenizer and batches, and training runs that take milliseconds.

Initial weights have ten times the usual standard deviation, so that next-token distributions are far from uniform. A
test that mixes up two tokens, rows or models then cannot pass by accident.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from rlhf_lightning.types import (
    DemonstrationBatch,
    MicroBatchLimits,
    PreferenceBatch,
    PromptBatch,
    RankedBatch,
    Sequences,
    Step,
)


def keep_double(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """Compute the root-mean-square norm in float32 or wider. The original casts a double model to float32 at every
    norm, which would dominate comparisons to 1e-9.
    """
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(hidden.dtype)


LlamaRMSNorm.forward = keep_double


def rotated_in_double(rotary: LlamaRotaryEmbedding, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the positions in the model's precision. The original uses float32, whose last bit
    differs on a GPU.
    """
    if hidden.dtype != torch.float64:
        return in_single(rotary, hidden, position_ids)
    size, base = rotary.config.head_dim, rotary.config.rope_parameters["rope_theta"]
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=hidden.device) / size)
    angles = (position_ids.double().unsqueeze(-1) * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


in_single = LlamaRotaryEmbedding.forward
LlamaRotaryEmbedding.forward = rotated_in_double

SPECIAL = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
PAD, EOS, FIRST_WORD, VOCABULARY = 0, 3, 6, 120
"""Ids from FIRST_WORD on are words; the token with id 17 has the text ``w17``."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{index}" for index in range(FIRST_WORD, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "num_labels": 1,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return LlamaConfig(**settings | changes)


def save_policy(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a random causal language model with its tokenizer; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(**changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, seed: int = 1, **changes: Any) -> str:
    """Write a random reward model with its tokenizer; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(tiny_config(**changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def sequences(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], supervised: Sequence[Sequence[bool]] | None = None
) -> Sequences:
    """Return sequences of the given prompts and completions, one prompt per row."""
    completions = tuple(torch.tensor(completion, dtype=torch.long) for _, completion in rows)
    flags = [[True] * len(c) for c in completions] if supervised is None else supervised
    return Sequences(
        prompts=tuple(torch.tensor(prompt, dtype=torch.long) for prompt, _ in rows),
        completions=completions,
        parents=tuple(range(len(rows))),
        supervised=tuple(torch.tensor(flag, dtype=torch.bool) for flag in flags),
    )


def random_rows(count: int, seed: int = 0, prompt: int = 6, completion: int = 9) -> list[tuple[list[int], list[int]]]:
    """Random (prompt, completion) ids of up to the given lengths; completions end with the end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()

    return [(ids(prompt), [*ids(completion), EOS]) for _ in range(count)]


def plain_logprobs(
    model: Any, prompt: Sequence[int] | Tensor, completion: Sequence[int] | Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of each completion token, from the logits of one unpadded sequence."""
    ids = torch.tensor([*map(int, prompt), *map(int, completion)])
    logprobs = torch.log_softmax(model(ids.unsqueeze(0)).logits[0] / temperature, dim=-1)
    return torch.stack([logprobs[t - 1, ids[t]] for t in range(len(prompt), len(ids))])


# -- steps ------------------------------------------------------------------------------------------------------------


def cut(rows: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
    size = size or max(len(rows), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def demonstration_step(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    micro: int | None = None,
    weights: Sequence[float] | None = None,
    supervised: Sequence[Sequence[bool]] | None = None,
) -> Step[DemonstrationBatch]:
    weights = weights or [1.0] * len(rows)
    flags = supervised or [[True] * len(completion) for _, completion in rows]
    batches = tuple(
        DemonstrationBatch(
            sequences([rows[i] for i in part], [flags[i] for i in part]), torch.tensor([weights[i] for i in part])
        )
        for part in cut(range(len(rows)), micro)
    )
    return Step(batches, len(rows), sum(sum(flag) for flag in flags))


Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Return random (prompt, chosen, rejected) rows."""
    chosen, rejected = random_rows(count, seed), random_rows(count, seed + 1000)
    return [(prompt, first, second) for (prompt, first), (_, second) in zip(chosen, rejected, strict=True)]


def pair_sequences(pairs: Sequence[Pair]) -> Sequences:
    """Stack chosen completions on rejected ones, with the same prompts in both halves."""
    completions = [torch.tensor(pair[side]) for side in (1, 2) for pair in pairs]
    return Sequences(
        prompts=tuple(torch.tensor(pair[0]) for pair in pairs),
        completions=tuple(completions),
        parents=tuple(range(len(pairs))) * 2,
        supervised=tuple(torch.ones(len(completion), dtype=torch.bool) for completion in completions),
    )


def preference_step(
    pairs: Sequence[Pair],
    micro: int | None = None,
    target: Sequence[float] | None = None,
    margin: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Step[PreferenceBatch]:
    ones, zeros = [1.0] * len(pairs), [0.0] * len(pairs)
    columns = (target or ones, margin or zeros, weights or ones)
    batches = tuple(
        PreferenceBatch(
            pair_sequences([pairs[i] for i in part]), *(torch.tensor([column[i] for i in part]) for column in columns)
        )
        for part in cut(range(len(pairs)), micro)
    )
    return Step(batches, len(pairs), sum(len(c) + len(r) for _, c, r in pairs))


Group = tuple[Sequence[int], Sequence[Sequence[int]], Sequence[int]]


def ranked_step(
    groups: Sequence[Group],
    micro: int | None = None,
    target: Sequence[float] | None = None,
    margin: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Step[RankedBatch]:
    """Return a step of groups, each given as (prompt, completions, ranks)."""
    ones, zeros = [1.0] * len(groups), [0.0] * len(groups)
    columns = (target or ones, margin or zeros, weights or ones)
    batches = []
    for part in cut(range(len(groups)), micro):
        chosen = [groups[i] for i in part]
        completions = tuple(torch.tensor(c) for _, many, _ in chosen for c in many)
        ragged = Sequences(
            prompts=tuple(torch.tensor(prompt) for prompt, _, _ in chosen),
            completions=completions,
            parents=tuple(index for index, (_, many, _) in enumerate(chosen) for _ in many),
            supervised=tuple(torch.ones(len(c), dtype=torch.bool) for c in completions),
        )
        ranks = torch.tensor([rank for _, _, many in chosen for rank in many])
        batches.append(RankedBatch(ragged, ranks, *(torch.tensor([column[i] for i in part]) for column in columns)))
    tokens = sum(len(c) for _, many, _ in groups for c in many)
    return Step(tuple(batches), len(groups), tokens)


def ranked_pairs(pairs: Sequence[Pair]) -> list[Group]:
    return [(prompt, [chosen, rejected], [0, 1]) for prompt, chosen, rejected in pairs]


def prompt_step(
    prompts: Sequence[Sequence[int]],
    first_episode: int = 0,
    texts: Sequence[Any] | None = None,
    pretraining: DemonstrationBatch | None = None,
    **columns: list[Any],
) -> Step[PromptBatch]:
    count = len(prompts)
    batch = PromptBatch(
        prompts=tuple(torch.tensor(prompt) for prompt in prompts),
        texts=tuple(texts or ["text"] * count),
        columns=columns,
        episodes=torch.arange(first_episode, first_episode + count),
        group=torch.arange(count),
        pretraining=pretraining,
    )
    return Step((batch,), count, 0)


def within(
    steps: Sequence[Step[Any]], micro_batch_size: int | None = None, max_tokens: int | None = None
) -> list[Step[Any]]:
    """Return the steps with limits on their forward passes."""
    return [step._replace(limits=MicroBatchLimits(micro_batch_size, max_tokens)) for step in steps]


# -- fits -------------------------------------------------------------------------------------------------------------


class StepData(pl.LightningDataModule):
    """Returns the given steps, the same in every epoch."""

    def __init__(self, steps: Sequence[Step[Any]], evaluation: Sequence[Step[Any]] = ()) -> None:
        super().__init__()
        self.steps, self.evaluation = list(steps), list(evaluation)
        self.batch_size = self.steps[0].rows if self.steps else 1
        self.steps_per_epoch = len(self.steps)
        self.batch_types = {type(step.micro_batches[0]) for step in self.steps}

    def step_ahead(self, epoch: int, index: int) -> Step[Any] | None:
        return self.steps[index] if index < len(self.steps) else None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.steps, batch_size=None, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.evaluation, batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


def quiet_trainer(**changes: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(settings | changes))


def fit(
    module: pl.LightningModule,
    steps: Sequence[Step[Any]],
    evaluation: Sequence[Step[Any]] = (),
    ckpt_path: str | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Fit on the steps, one optimizer step or rollout each; return the trainer."""
    made = quiet_trainer(**({} if evaluation else {"limit_val_batches": 0}) | trainer)
    made.fit(module, StepData(steps, evaluation), ckpt_path=ckpt_path)
    return made


def evaluate(module: pl.LightningModule, steps: Sequence[Step[Any]]) -> dict[str, float]:
    """Return the metrics of a validation pass."""
    return quiet_trainer().validate(module, DataLoader(list(steps), batch_size=None), verbose=False)[0]


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trainable weights."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def gradients_of_step(module: pl.LightningModule, step: Step[Any], **trainer: Any) -> dict[str, Tensor]:
    """Return the gradients after one training step, after clipping."""
    kept = LastGradients()
    fit(module, [step], callbacks=[kept], **trainer)
    return kept.gradients


class LastGradients(pl.Callback):
    """Keeps the gradients of the last optimizer step, which the Trainer frees at the end of fit."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        named = module.named_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert found and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class MetricsLog(pl.Callback):
    """Records the metrics logged at the end of each training step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def doubled(module: Any) -> Any:
    """Make a module load its models in double precision; return the module."""
    load = module.load_models

    def load_in_double() -> None:
        load()
        module.double()
        for frozen in module.frozen_models():
            frozen.double()

    module.load_models = load_in_double
    return module
