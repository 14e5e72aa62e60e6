"""Frozen policies (reference, teachers) that are evaluated without gradient, and a cache of their log-probabilities."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.models.adapters import POLICY, is_low_rank_alone
from rlhf_lightning.models.causal_lm import CausalLM, PredictingStates, inference_mode_of
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.models.roles import load_reference
from rlhf_lightning.models.sharding import is_sharded, shard_like, whole
from rlhf_lightning.types import Sequences


class FrozenPolicy:
    """Base class of the reference and of teachers.

    Args:
        model: the language model to forward; its LM head computes the logits.
        models: models that this object owns. They are in no checkpoint and no optimizer, and are moved to the device
            explicitly.
    """

    moved: bool = False
    """Whether its weights have been updated from the policy's."""

    _whole_head: tuple[Tensor, Tensor | None] | None = None

    def __init__(self, model: CausalLM, models: tuple[CausalLM, ...] = ()) -> None:
        self.model, self.models = model, models

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        """Yield the language model, to sample from or to forward."""
        yield self.model

    @torch.no_grad()
    def logprobs(self, layout: Layout, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities of the layout's completions, shape (completions, length)."""
        with self.as_model() as model:
            return model(layout, temperature).logprobs

    @torch.no_grad()
    def predicting_states(self, layout: Layout) -> Tensor:
        """Return the states that predict the layout's supervised tokens, shape (tokens, hidden size)."""
        owner = self.model
        if is_sharded(owner) and owner.logits_path != "product":
            raise ModelError(
                "sharded-own-logits",
                f"{type(owner.model).__name__} computes logits in its own forward, which cannot be called on hidden "
                "states while its weights are sharded; train without sharding, or with an objective that needs no full "
                "distributions",
            )
        if self._whole_head is None and is_sharded(owner):
            # Ranks need different numbers of chunks of logits, but gathering a weight is a collective of all ranks.
            weight, bias = owner.head()
            self._whole_head = whole(weight.detach()), None if bias is None else whole(bias.detach())
        with self.as_model() as model:
            return model(PredictingStates(layout))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states, fp32 or wider, shape (tokens, vocabulary)."""
        if self.model.logits_path == "product":
            return self.model.logits(hidden, self._whole_head)
        with self.as_model() as model:
            return model.logits(hidden)


class Reference(FrozenPolicy):
    """The frozen model that training started from. If the policy is an adapter, its backbone is the reference.

    Args:
        policy: the policy in training.
        init_from: the model that the policy started from.
        settings: how a copy is loaded.
        own: always load an fp32 copy, for a reference that will be updated.

    Raises:
        SettingError: the reference will be updated, but its weights are quantised or cannot follow the adapter's.
    """

    def __init__(self, policy: CausalLM, init_from: str, settings: LoadSettings, own: bool = False) -> None:
        if own and settings.quantization is not None:
            raise SettingError(
                "quantized-moving-reference",
                f"a moving reference cannot be in {settings.quantization}; set quantization to null",
            )
        self.policy = policy
        if own and policy.has_adapter and not is_low_rank_alone(policy.model.peft_config[POLICY]):
            raise SettingError(
                "moving-reference-adapter",
                "a moving reference cannot follow an adapter with dora, target_parameters, modules_to_save or "
                "trained_tokens; train every weight (lora: null), or use a plain adapter",
            )
        if own:
            settings = replace(settings, frozen_dtype="float32")
        self.copy = load_reference(init_from, settings) if own or not policy.has_adapter else None
        super().__init__(self.copy or policy, () if self.copy is None else (self.copy,))

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        with self.policy.as_reference() if self.copy is None else nullcontext():
            yield self.model

    # -- a reference that is updated -----------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, alpha: float = 1.0) -> None:
        """Update the copy: alpha * policy + (1 - alpha) * reference; alpha = 1 replaces the reference by the policy."""
        for _, reference, policy in self._followed():
            reference.copy_(torch.lerp(reference, policy.to(reference), alpha))
        self.moved, self._whole_head = True, None

    def moved_weights(self) -> dict[str, Tensor]:
        """Return the copy's weights that follow the policy's, for a checkpoint."""
        return {name: whole(reference.detach()) for name, reference, _ in self._followed()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Restore the copy's weights from a checkpoint."""
        for name, reference, _ in self._followed():
            reference.copy_(shard_like(weights[name], reference))
        self.moved, self._whole_head = True, None

    def _followed(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, reference weight and policy weight of each updated weight; of an adapter only adapted weights."""
        model = self.policy.model
        for name, weight in _adapted_weights(model) if self.policy.has_adapter else model.named_parameters():
            yield name, self.model.model.get_parameter(name), weight


def _adapted_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted weight, merged, under its name in the backbone: base + scaling * B A."""
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            base = layer.base_layer.weight
            yield f"{name.removeprefix('base_model.model.')}.weight", base + layer.get_delta_weight("default").to(base)


class Teacher(FrozenPolicy):
    """A frozen teacher policy in eval mode, without gradient; it is in no checkpoint.

    Args:
        name: Hub id or folder, whole weights or an adapter.
        tokenizer: the student's.
        settings: how weights are loaded.

    Raises:
        MissingError: the folder or its weights do not exist.
        ModelError: ``other-tokenizer``: the teacher has another tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, settings: LoadSettings) -> None:
        check_same_vocabulary(tokenizer, tokenization.load_tokenizer(resolve_folder(name)), name)
        model = load_reference(name, replace(settings, from_scratch=False))
        super().__init__(model, (model,))


class CurrentPolicy(FrozenPolicy):
    """The policy in training as its own teacher: its current weights, in eval mode and without gradient."""

    @contextmanager
    def as_model(self) -> Iterator[CausalLM]:
        with inference_mode_of(self.model):
            yield self.model

    def predicting_states(self, layout: Layout) -> Tensor:
        self._whole_head = None  # the head changes with every update
        return super().predicting_states(layout)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Check that each id means the same token to both tokenizers. One vocabulary may be longer than the other.

    Raises:
        ModelError: ``other-tokenizer``: an id within both vocabularies is another token; the first such id is named.
    """
    mine, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (student, teacher))
    common = min(max(mine), max(theirs)) + 1
    other = [index for index in range(common) if mine.get(index) != theirs.get(index)]
    if other:
        first = other[0]
        raise ModelError(
            "other-tokenizer",
            f"the teacher {name} has a different tokenizer from the student: id {first} is {theirs.get(first)!r} to "
            f"the teacher and {mine.get(first)!r} to the student, and {len(other):,} of {common:,} ids differ; "
            "distillation compares distributions over the same tokens; choose a teacher with the student's tokenizer",
        )


# -- cached log-probabilities ------------------------------------------------------------------------------------------

DTYPES = {torch.float32: b"4", torch.float64: b"8"}
"""Precisions of the log-probabilities, and the byte that denotes each in a key."""


class ReferenceCache:
    """A cache of a frozen reference's log-probabilities in one SQLite file, which several processes may share.

    With fixed data, the reference is then forwarded once instead of once per epoch. The file name identifies the
    reference's weights and precision; the key of a row is a hash of the token ids of prompt and completion. Tokenizer,
    template and data set act only through these ids, so they are not part of the key. A cache failure never fails a
    run: an entry that cannot be read is computed, and a failed write is reported once.

    Args:
        file: path of the SQLite file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection: sqlite3.Connection | None = None
        self._broken = False

    def read(self, sequences: Sequences, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the log-probabilities of all completions, shape (completions, length); None if any is missing.

        Args:
            sequences: prompts and completions.
            mask: bool, True on supervised tokens, shape (completions, length).
            dtype: precision of the reference's log-probabilities.
        """
        keys = row_keys(sequences, dtype)
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), 500):  # SQLite takes a limited number of values at once
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            found |= dict(self._execute(f"SELECT key, row FROM logprobs WHERE key IN ({marks})", part))
        grid = torch.zeros(mask.shape, dtype=dtype)
        for index, (key, completion) in enumerate(zip(keys, sequences.completions, strict=True)):
            row = found.get(key)
            if row is None or len(row) != len(completion) * dtype.itemsize:
                return None
            grid[index, : len(completion)] = torch.frombuffer(bytearray(row), dtype=dtype)
        return grid

    def write(self, sequences: Sequences, logprobs: Tensor) -> None:
        """Store the log-probabilities of completions, shape (completions, length)."""
        rows = logprobs.detach().cpu()
        values = [
            (key, row[: len(completion)].numpy().tobytes())
            for key, row, completion in zip(
                row_keys(sequences, rows.dtype), rows.contiguous(), sequences.completions, strict=True
            )
        ]
        self._execute("INSERT OR IGNORE INTO logprobs VALUES (?, ?)", many=values)

    def _execute(
        self, statement: str, values: Sequence[bytes] = (), many: list[tuple[bytes, bytes]] | None = None
    ) -> list[tuple[bytes, bytes]]:
        if self._broken:
            return []
        try:
            if self._connection is None:
                self._connection = self._connected()
            if many is not None:
                with self._connection:
                    self._connection.executemany(statement, many)
                return []
            return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self._broken = True
            rank_zero_warn(f"reference log-probabilities are not kept: {self.file} cannot be used ({error})")
            return []

    def _connected(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.file, timeout=60)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # a row lost in a power failure is recomputed
        connection.execute("CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID")
        return connection


def row_keys(sequences: Sequences, dtype: torch.dtype) -> list[bytes]:
    """Return each completion's key: a hash of its prompt, its ids, its supervised mask and the precision."""
    keys = []
    prompts = [prompt.numpy().tobytes() for prompt in sequences.prompts]
    for parent, ids, supervised in zip(sequences.parents, sequences.completions, sequences.supervised, strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in (DTYPES[dtype], prompts[parent], b"|", ids.numpy().tobytes(), b"|", supervised.numpy().tobytes()):
            digest.update(part)
        keys.append(digest.digest())
    return keys
