"""A run that takes milliseconds through the real interfaces: one weight to fit, on the package's base classes."""

import json
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from rlhf_lightning.data import AlignmentDataModule
from rlhf_lightning.data.loader import StepLoader
from rlhf_lightning.sampling.engines import Completions
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.types import Step

UPDATES = 8
"""Updates per epoch."""


class TinyBatch(tuple):
    """Numbers that are predicted from themselves."""


class SlopeModule(OfflineModule):
    """Fit y = 2 x with one weight: loss (w x - 2 x)^2 / 2.

    Args:
        slope: initial value of the weight.
        offset: added to each prediction.
        scorer: scores an answer.
    """

    batch_type = TinyBatch
    headline_metrics = ("val/loss", "val/slope")
    scorer: Any = None

    def __init__(self, init_from: str = "none", slope: float = 0.0, offset: float = 0.0, **kwargs: Any) -> None:
        super().__init__(init_from, **kwargs)
        self.slope, self.offset = slope, offset

    @property
    def tokenizer(self) -> Any:
        return None

    @property
    def model(self) -> nn.Module:
        return self.line

    def load_models(self) -> None:
        self.line = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.line.weight, self.slope)

    crash_at: ClassVar[int | None] = None
    """Update before which training dies, as if the machine had failed."""

    def training_step(self, step: Step[Any], batch_idx: int) -> Any:
        if self.crash_at is not None and self.updates >= self.crash_at:
            raise RuntimeError("the machine is gone")
        return super().training_step(step, batch_idx)

    def loss_sum(self, batch: TinyBatch, meter: Meter) -> torch.Tensor:
        x = torch.stack(list(batch)).unsqueeze(-1)
        losses = (self.line(x) + self.offset - 2 * x).square().squeeze(-1) / 2
        meter.add("loss", losses)
        meter.add("slope", self.line.weight.detach().squeeze())
        return losses.sum()

    def answer(self, prompts: Any, sampling: Any, seed: int = 0, first_episode: int = 0) -> Completions:
        weight = float(self.line.weight.detach())
        count = len(prompts)
        return Completions(
            ids=(torch.tensor([1, 2, 3]),) * count,
            logprobs=(torch.full((3,), -0.5),) * count,
            finished=torch.ones(count, dtype=torch.bool),
            texts=tuple(f"{prompt} | {weight:.3f}" for prompt in prompts),
        )

    def predict_step(self, step: Step[Any], batch_idx: int) -> list[dict[str, Any]]:
        return [{"x": float(x), "y": float(self.line(x.view(1)))} for batch in step.micro_batches for x in batch]

    def export(self, folder: str | Path) -> Path:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "weight.json").write_text(json.dumps(float(self.line.weight.detach())))
        return Path(folder)


class ScoredSlopeModule(SlopeModule):
    """A SlopeModule without a policy."""

    has_policy = False


class OtherModule(SlopeModule):
    """Another class with the same arguments."""


class PoisonedModule(SlopeModule):
    """A SlopeModule whose loss is NaN at some updates.

    Args:
        poison: the updates, from 0.
        value: factor applied to the loss at these updates.
        masked: add the value to the loss instead, which leaves the gradient unchanged.
    """

    def __init__(self, poison: list[int], value: str = "nan", masked: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.poison, self.value, self.masked = poison, float(value), masked

    def loss_sum(self, batch: TinyBatch, meter: Meter) -> torch.Tensor:
        loss = super().loss_sum(batch, meter)
        if not self.trainer.training or self.updates not in self.poison:
            return loss
        return loss + self.value if self.masked else loss * self.value


class HungryModule(SlopeModule):
    """A SlopeModule that requests a gigabyte in its fourth update.

    Args:
        kind: library that requests the memory.
    """

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def loss_sum(self, batch: TinyBatch, meter: Meter) -> torch.Tensor:
        if self.updates == 3:
            size = 2**30  # bytes or more
            {"torch": torch.ones, "numpy": np.ones, "python": bytearray}[self.kind](size)
        return super().loss_sum(batch, meter)


class RolloutModule(SlopeModule):
    """Three updates in each training step, like on-policy modules."""

    def training_step(self, step: Step[Any], batch_idx: int) -> None:
        meter = Meter()
        for _ in range(3):
            norm = self.update([partial(self.loss_sum, batch, meter) for batch in step.micro_batches], step.rows)
        self.rollouts += 1
        self.tokens += step.tokens
        self.log_training(meter, grad_norm=norm)


class PoisonedRollouts(RolloutModule, PoisonedModule):
    """Three updates in each training step, some of them with NaN losses."""


class NumbersDataModule(AlignmentDataModule):
    """Numbers, reshuffled in each epoch, two per step.

    Args:
        count: numbers per epoch.
    """

    batch_types = (TinyBatch,)

    def __init__(self, source: str = "numbers", count: int = 2 * UPDATES, **kwargs: Any) -> None:
        super().__init__(source, batch_size=2, **kwargs)
        self.count = count

    def encoder(self) -> Any:
        raise AssertionError("no text is read")

    def collator(self) -> Any:
        raise AssertionError("no text is read")

    def prepare_data(self) -> None:
        if self.count == 0:
            raise ValueError("numbers has no rows: nothing to train on")

    def setup(self, stage: str) -> None:
        self.steps_per_epoch, self.fingerprint = self.count // 2, f"numbers-{self.count}"
        self.report = {"read": self.count, "kept": self.count}

    def steps(self, epoch: int) -> list[Step[Any]]:
        generator = torch.Generator().manual_seed(100 + epoch)
        numbers = torch.rand(self.count, generator=generator) + 0.5
        ids = torch.arange(self.count).split(2)
        return [
            Step((TinyBatch(pair),), 2, 2, tuple(i.tolist())) for pair, i in zip(numbers.split(2), ids, strict=True)
        ]

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.steps, self.count // 2, self.fingerprint)

    def val_dataloader(self) -> StepLoader:
        return StepLoader(lambda _: self.steps(-1), self.count // 2, self.fingerprint)

    test_dataloader = predict_dataloader = val_dataloader

    def examples(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        return [(f"prompt <{n}>\nsecond | line", {}) for n in range(count)]


BASIC = ["--model", "tiny_run.SlopeModule", "--data", "tiny_run.NumbersDataModule", "--model.learning_rate", "0.1"]
"""The shortest valid flags, after the command's name."""


class UnfinishedDataModule(NumbersDataModule):
    """Lacks a method that its base class requires."""

    @abstractmethod
    def further(self) -> None: ...


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events_of(folder: Path) -> Any:
    """Return the TensorBoard events of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(folder).Scalars(tag)]
