"""TensorBoard's HPARAMS tab, read back from the event file."""

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
    """Settings and metric names that the tab shows."""
    content = events_of(folder).PluginTagToContent("hparams")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content[TAGS["experiment"]]).experiment
    start = plugin_data_pb2.HParamsPluginData.FromString(content[TAGS["start"]]).session_start_info
    settings = {}
    for name, value in start.hparams.items():
        settings[name] = getattr(value, value.WhichOneof("kind"))
    return settings, [info.name.tag for info in experiment.metric_infos]


def test_settings_and_headline_metrics_are_in_the_tab_with_final_values():
    cli = run(["fit", *BASIC, "--model.offset", "0.25", "--trainer.max_epochs", "2"])
    settings, metrics = hparams_in(cli.folder)
    assert metrics == ["val/loss", "val/slope"]
    assert settings["model"] == "SlopeModule" and settings["model.offset"] == 0.25
    assert settings["model.learning_rate"] == 0.1 and settings["model.lora"] == "None"
    assert settings["data.count"] == 2 * UPDATES and settings["trainer.max_epochs"] == 2
    assert not [name for name in settings if "_class_path" in name or "_instantiator" in name]
    for tag in metrics:
        points = scalars_of(cli.folder, tag)
        assert points[-1][0] == 2 * UPDATES
        assert points[-1][1] == float(cli.trainer.callback_metrics[tag])
        assert min(step for step, _ in points) > 0, "no made-up value at the start"


def test_there_is_no_meaningless_metric():
    tags = events_of(run(["fit", *BASIC]).folder).Tags()["scalars"]
    assert "hp_metric" not in tags and "_hparams_/session_start_info" not in tags


def test_the_axis_counts_updates_and_the_last_value_is_written_without_validation():
    cli = run(["fit", *BASIC, "--model", "tiny_run.RolloutModule", "--trainer.limit_val_batches", "0"])
    assert [step for step, _ in scalars_of(cli.folder, "train/loss")] == [3 * n for n in range(1, UPDATES + 1)]
    assert isinstance(cli.model, RolloutModule)


def test_nested_settings_get_dotted_names():
    class Module:
        hparams = {"lora": {"r": 8, "targets": ["q", "v"]}, "beta": 0.1, "name": None, "_class_path": "x"}

    class Trainer:
        max_epochs, max_steps, precision, world_size, datamodule = 1, -1, "32-true", 2, None

    flat = flat_hparams(Module(), Trainer())
    assert {name: value for name, value in flat.items() if name.startswith("model")} == {
        "model": "Module", "model.lora.r": 8, "model.lora.targets": "['q', 'v']", "model.beta": 0.1,
        "model.name": "None",
    }  # fmt: skip
    assert (flat["trainer.max_epochs"], flat["trainer.precision"], flat["trainer.ranks"]) == (1, "32-true", 2)


def test_metrics_that_compare_stand_in_one_group_of_custom_scalars():
    folder = run(["fit", *BASIC]).folder
    content = events_of(folder).PluginTagToContent("custom_scalars")
    assert "custom_scalars__config__" in content
