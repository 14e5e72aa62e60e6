"""TensorBoard's HPARAMS tab, read back from the event file."""

import re
from pathlib import Path

import pytest
import tiny_run
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_run import BASIC, UPDATES, RolloutModule, events_of, scalars_of

from rlhf_lightning.commands.train import run
from rlhf_lightning.runs.loggers import flat_hparams

TAGS = {
    "experiment": "_hparams_/experiment",
    "start": "_hparams_/session_start_info",
    "end": "_hparams_/session_end_info",
}


def hparams_in(folder):
    """Return settings in the order of the tab, and metric names."""
    content = events_of(folder).PluginTagToContent("hparams")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content[TAGS["experiment"]]).experiment
    start = plugin_data_pb2.HParamsPluginData.FromString(content[TAGS["start"]]).session_start_info
    settings = {}
    for info in experiment.hparam_infos:
        value = start.hparams[info.name]
        settings[info.name] = getattr(value, value.WhichOneof("kind"))
    return settings, [info.name.tag for info in experiment.metric_infos]


def status_in(folder):
    """How the run ended: 1 for success, 2 for failure; None if it has not."""
    content = events_of(folder).PluginTagToContent("hparams").get(TAGS["end"])
    return None if content is None else plugin_data_pb2.HParamsPluginData.FromString(content).session_end_info.status


def test_hparams_has_changed_settings_and_final_headline_metrics():
    cli = run(["fit", *BASIC, "--model.offset", "0.25", "--trainer.max_epochs", "2"])
    settings, metrics = hparams_in(cli.folder)
    assert metrics[:2] == ["val/loss", "val/slope"] and "val/reward_accuracy" in metrics
    assert list(settings)[:3] == ["objective", "seed", "stage"]
    assert settings == {
        "objective": "SlopeModule", "seed": 0.0, "stage": "fit", "model.learning_rate": 0.1, "model.offset": 0.25,
        "data": "NumbersDataModule", "trainer.max_epochs": 2.0,
    }  # fmt: skip
    assert status_in(cli.folder) == 1
    for tag in metrics[:2]:
        points = scalars_of(cli.folder, tag)
        assert points[-1][0] == 2 * UPDATES
        assert points[-1][1] == float(cli.trainer.callback_metrics[tag])
        assert min(step for step, _ in points) > 0, "no made-up value at the start"


def test_a_failed_run_is_marked_in_hparams_until_it_is_resumed(monkeypatch):
    settings = ["--run_name", "cut", "--checkpoint.every_n_updates", "2"]
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", 3)
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC, *settings])
    assert status_in(Path("runs/cut/version_0")) == 2
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", None)
    assert status_in(run(["fit", "--resume", "runs/cut"]).folder) == 1


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_run_is_marked_in_hparams(command):
    settings, _ = hparams_in(run([command, *BASIC]).folder)
    assert (settings["stage"], settings["objective"]) == (command, "SlopeModule")


def test_hp_metric_is_not_logged():
    tags = events_of(run(["fit", *BASIC]).folder).Tags()["scalars"]
    assert "hp_metric" not in tags and "_hparams_/session_start_info" not in tags


def test_steps_count_updates_and_the_last_value_is_written():
    cli = run(["fit", *BASIC, "--model", "tiny_run.RolloutModule", "--trainer.limit_val_batches", "0"])
    assert [step for step, _ in scalars_of(cli.folder, "train/loss")] == [3 * n for n in range(1, UPDATES + 1)]
    assert isinstance(cli.model, RolloutModule)


def test_nested_settings_get_dotted_names():
    class Module:
        hparams = {"lora": {"r": 8, "targets": ["q", "v"]}, "beta": 0.1, "name": None, "_class_path": "x"}

    class Trainer:
        max_epochs, max_steps, precision, world_size, datamodule = 1, -1, "32-true", 2, None
        state = TrainerState(fn=TrainerFn.FITTING)

    flat = flat_hparams(Module(), Trainer())
    assert {name: value for name, value in flat.items() if name.startswith("model")} == {
        "model.lora.r": 8, "model.lora.targets": "['q', 'v']", "model.beta": 0.1,
        "model.name": "None",
    }  # fmt: skip
    assert (flat["trainer.max_epochs"], flat["trainer.precision"], flat["trainer.ranks"]) == (1, "32-true", 2)


def test_comparable_metrics_share_a_custom_scalars_group():
    folder = run(["fit", *BASIC]).folder
    events = events_of(folder)
    (config,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    charts = {group.title: {one.title: one.multiline.tag[0] for one in group.chart} for group in layout.category}
    assert list(charts) == ["compare", "compare over episodes", "compare over tokens", "losses"]
    assert re.match(charts["compare over tokens"]["KL"], "vs_tokens/val/kl")
    assert re.match(charts["compare"]["reward accuracy"], "val/reward_accuracy")
    assert charts["losses"] == {"SlopeModule": "loss/SlopeModule$"}
    assert scalars_of(folder, "loss/SlopeModule") == scalars_of(folder, "train/loss")
