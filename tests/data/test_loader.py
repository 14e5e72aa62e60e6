"""Test loaders inside Lightning: exact resume, one owner of the row order, and the matching DataModule
of each module.
"""

from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import yaml
from conftest import make_tiny_tokenizer, refused
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DistributedSampler

from rlhf_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.types import DataNeeds, DemonstrationBatch, PreferenceBatch, PromptBatch, RankedBatch

SOURCE = [{"prompt": f"p{i}:", "completion": "x" * (1 + i % 4)} for i in range(14)]


class Watcher(L.LightningModule):
    """Records the batches that it gets, and stops at a given step."""

    data_needs: ClassVar[DataNeeds] = DataNeeds(DemonstrationBatch)

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = make_tiny_tokenizer()
        self.stop = stop
        self.seen: list[Any] = []
        self.validated: list[int] = []

    def training_step(self, step: Any, batch_idx: int) -> None:
        prompts = [tuple(ids.tolist()) for batch in step.micro_batches for ids in batch.sequences.prompts]
        self.seen.append((self.current_epoch, batch_idx, sorted(prompts)))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum())
        optimizer.step()
        if self.global_step == self.stop:
            self.trainer.should_stop = True

    def validation_step(self, step: Any, batch_idx: int) -> None:
        self.validated.append(step.rows)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Any, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    return L.Trainer(**{**settings, "enable_checkpointing": "callbacks" in changes, **changes})


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (4, 0), (6, 0), (6, 1)])
def test_a_resumed_loader_continues_at_the_next_step(cache, write_rows, tmp_path, stop, workers):
    source = write_rows(SOURCE)
    data = lambda: SFTDataModule(source, batch_size=4, num_workers=workers)
    whole = Watcher()
    trainer(tmp_path).fit(whole, datamodule=data())
    assert len(whole.seen) == 12

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    cut = Watcher(stop)
    trainer(tmp_path, callbacks=[saving]).fit(cut, datamodule=data())
    assert cut.seen == whole.seen[:stop]
    resumed = Watcher()
    checkpoint = str(tmp_path / "saved" / f"step={stop}.ckpt")
    trainer(tmp_path).fit(resumed, datamodule=data(), ckpt_path=checkpoint)
    assert resumed.seen == whole.seen[stop:]


def test_resuming_with_other_data_is_refused(cache, write_rows, tmp_path):
    source = write_rows(SOURCE)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, callbacks=[saving]).fit(Watcher(2), datamodule=SFTDataModule(source, batch_size=4))
    with refused("other-data", "written with other data", "its position cannot be used here"):
        trainer(tmp_path).fit(
            Watcher(), datamodule=SFTDataModule(source, batch_size=5), ckpt_path=str(tmp_path / "saved" / "step=2.ckpt")
        )


def test_validation_covers_the_held_out_rows(cache, write_rows, tmp_path):
    module = Watcher()
    data = SFTDataModule(write_rows(SOURCE), batch_size=4, eval_rows=5, eval_batch_size=2)
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=data)
    assert module.validated == [2, 2, 1] * 2
    assert sum(len(prompts) for _, _, prompts in module.seen) == 2 * 9


def test_without_held_out_rows_there_is_no_validation(cache, write_rows, tmp_path):
    module = Watcher()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=SFTDataModule(write_rows(SOURCE), batch_size=4))
    assert module.validated == []


def test_lightning_does_not_replace_the_sampler(cache, write_rows, tmp_path, monkeypatch):
    run = trainer(tmp_path, max_epochs=1)
    monkeypatch.setattr(type(run._accelerator_connector), "is_distributed", property(lambda _: True))
    run.fit(Watcher(), datamodule=SFTDataModule(write_rows(SOURCE), batch_size=4))
    assert not isinstance(run.train_dataloader.sampler, DistributedSampler)


@pytest.mark.parametrize(
    ("data", "batch_type", "message"),
    [
        (
            SFTDataModule,
            PreferenceBatch,
            "takes a PreferenceBatch, but SFTDataModule gives a DemonstrationBatch; use Pref",
        ),
        (PreferenceDataModule, PromptBatch, "gives a PreferenceBatch or RankedBatch; use PromptDataModule"),
        (PromptDataModule, DemonstrationBatch, "gives a PromptBatch; use SFTDataModule"),
    ],
)
def test_a_datamodule_of_the_wrong_kind_is_refused(cache, write_rows, tmp_path, data, batch_type, message):
    module = Watcher()
    module.__class__ = type("Taker", (Watcher,), {"data_needs": DataNeeds(batch_type)})
    with refused("wrong-datamodule", message):
        trainer(tmp_path).fit(module, datamodule=data(write_rows(SOURCE)))


PAIRS = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(3)]


@pytest.mark.parametrize(("has_policy", "kind"), [(True, PromptBatch), (False, RankedBatch)])
def test_policies_predict_from_prompts_and_scorers_from_completions(cache, write_rows, tmp_path, has_policy, kind):
    found = []

    class Predictor(Watcher):
        data_needs = DataNeeds(RankedBatch, predicts_prompts=has_policy)

        def predict_step(self, step: Any, batch_idx: int) -> None:
            found.extend(step.micro_batches)

    trainer(tmp_path).predict(Predictor(), datamodule=PreferenceDataModule(write_rows(PAIRS)))
    assert [type(batch) for batch in found] == [kind]


def test_any_policy_can_predict_from_prompts(cache, write_rows, tmp_path):
    found = []

    class Predictor(Watcher):
        def predict_step(self, step: Any, batch_idx: int) -> None:
            found.extend(step.micro_batches[0].texts)

    trainer(tmp_path).predict(Predictor(), datamodule=PromptDataModule(write_rows([{"prompt": "a"}, {"prompt": "b"}])))
    assert found == ["a", "b"]


def test_the_module_selects_pair_or_group_batches(cache, write_rows, tmp_path):
    kinds = []

    class Taker(Watcher):
        data_needs = DataNeeds(RankedBatch)

        def training_step(self, step: Any, batch_idx: int) -> None:
            kinds.extend(type(batch) for batch in step.micro_batches)

    trainer(tmp_path, max_epochs=1).fit(Taker(), datamodule=PreferenceDataModule(write_rows(PAIRS)))
    assert kinds == [RankedBatch]


def test_without_a_trainer_a_tokenizer_must_be_set(write_rows):
    with refused("no-tokenizer-set", "set its attribute tokenizer"):
        SFTDataModule(write_rows(SOURCE)).prepare_data()


@pytest.mark.parametrize("data", [SFTDataModule, PreferenceDataModule, PromptDataModule])
def test_every_argument_is_on_the_command_line(data):
    """All arguments of the base class are offered, documented, and read from plain YAML."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(data, "data")
    text = parser.format_help()
    for name in ("source", "eval_source", "batch_size", "micro_batch_size", "max_tokens", "streaming", "cache_dir"):
        assert f"--data.{name} " in text, name
    assert "rows of an optimizer step, over all ranks" in " ".join(text.split())
    sources = [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]
    written = yaml.safe_dump({"data": {"source": sources, "columns": {"q": "prompt"}, "max_tokens": 512}})
    config = parser.parse_string(written)
    made = parser.instantiate(config)["data"]
    assert [(source.path, source.weight) for source in made.sources] == [("a.jsonl", 2), ("b.jsonl", 1.0)]
    assert (made.max_tokens, made.columns, made.hparams["max_tokens"]) == (512, {"q": "prompt"}, 512)
