"""Loggers: their folders, and logging of tables and hyper-parameters."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, create_summary_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import hparams as hparams_summary

from rlhf_lightning.compat import attached_datamodule, event_writer
from rlhf_lightning.errors import PackageError
from rlhf_lightning.runs.run import aligned, updates_of

PLACES = ("save_dir", "name", "run_name", "version", "tracking_uri", "artifact_location")
"""Arguments that set a logger's folder and run name; null derives them from the run folder."""

LONGEST = 250
"""Characters of a setting that Lightning's MLflow logger keeps."""

RUN_IDS = ("run_id", "id")
"""Arguments that name the run of MLflow and W&B."""

COMPARED = {
    "reward accuracy": "(reward_)?accuracy", "margin": "(reward|score)_margin", "score": "score", "KL": "kl",
    "length": "(length|completion_length)", "EOS rate": "eos_rate",
}  # fmt: skip
"""Name patterns of metrics that are comparable between objectives."""

CHARTS = {
    f"compare{over}": {
        name: ["Multiline", [rf"{prefix}(val|rollout)/{pattern}$"]] for name, pattern in COMPARED.items()
    }
    for over, prefix in (("", ""), (" over episodes", "vs_episodes/"), (" over tokens", "vs_tokens/"))
}
"""Groups of TensorBoard's custom scalars tab: `COMPARED` over each x-axis."""

HEADLINES = ("val/loss", "val/accuracy", "val/reward_accuracy", "val/score", "val/kl", "rollout/score", "rollout/kl")
"""Metrics of the HPARAMS tab, added to a module's own metrics, because the tab takes its columns from a single run."""


def logger_arguments(
    kind: type[Logger], given: Mapping[str, Any], folder: Path, runs: Path, earlier: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a logger's arguments; arguments in `PLACES` that are null are derived from the run folder.

    TensorBoard and CSV loggers write into the folder itself. Other loggers get it as ``save_dir``, and their run is
    named after it. MLflow's runs share a database in the runs folder, so that one server shows all of them.

    Args:
        kind: the logger's class.
        given: the arguments as given.
        folder: the run folder, ``runs/<name>/version_<n>``.
        runs: the folder of all runs.
        earlier: `tracked_runs` of the session that is resumed; the logger continues its run.
    """
    name = folder.relative_to(runs).as_posix()
    if issubclass(kind, TensorBoardLogger | CSVLogger):
        filled = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
        if any(given.get(argument) is not None for argument in filled):
            filled = {"save_dir": str(folder)}
    elif "tracking_uri" in given:
        filled = {"run_name": name}
        if given.get("save_dir") is None:
            filled["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
        if filled.get("tracking_uri", "").startswith("sqlite:") and given["tracking_uri"] is None:
            filled["artifact_location"] = (runs / "mlartifacts").absolute().as_uri()
    else:
        filled = {"save_dir": str(folder), "run_name" if "run_name" in given else "name": name}
    if isinstance(earlier, Mapping) and (known := earlier.get(kind.__name__)):
        filled |= dict.fromkeys(RUN_IDS, known)
    left_open = [argument for argument in (*PLACES, *RUN_IDS) if argument in given and given[argument] is None]
    kept = {argument: value for argument, value in given.items() if argument not in left_open}
    return kept | {argument: filled[argument] for argument in left_open if argument in filled}


def tracked_runs(loggers: Sequence[Logger]) -> dict[str, str]:
    """Start the runs of MLflow and W&B, and return their ids by the name of the logger's class."""
    found = {}
    for logger in loggers:
        if {*RUN_IDS} & {*inspect.signature(type(logger)).parameters}:
            getattr(logger, "experiment", None)  # the run gets its id when it starts
            found[type(logger).__name__] = str(logger.version)
    return found


class TrackioLogger(Logger):
    """Writes metrics, settings and samples to trackio, whose dashboard works offline: ``trackio show``.

    The database is in trackio's own folder (TRACKIO_DIR). A resumed run continues its curves. Needs the extra
    ``trackio``.

    Args:
        project: trackio's project.
        name: name of the run; null uses the name of the run folder.
        init_args: further arguments of ``trackio.init``, as in {space_id: me/curves}.

    Raises:
        PackageError: trackio is not installed.
    """

    def __init__(self, project: str = "rlhf", name: str | None = None, init_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        try:
            self._trackio: Any = importlib.import_module("trackio")
        except ModuleNotFoundError as error:
            raise PackageError(
                "not-installed", "TrackioLogger needs trackio: pip install 'rlhf-lightning[trackio]'"
            ) from error
        self.project, self.run_name, self.init_args = project, name, init_args or {}
        self._settings: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The trackio run; it is started with the first metric, when the settings are known."""
        if self._run is None:
            self._run = self._trackio.init(
                project=self.project, name=self.run_name, config=self._settings, resume="allow", **self.init_args
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Store the settings until the run is started."""
        self._settings.update(dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the values that are still in memory."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def log_table(logger: Logger, name: str, rows: Sequence[Mapping[str, Any]], text: str, step: int) -> bool:
    """Log a table; return whether the logger accepts tables or text.

    Supported loggers: TensorBoard (``experiment.add_text``), W&B and other loggers with ``log_table(key, columns, data,
    step)``, MLflow (``experiment.log_table(run_id, data, file)``), trackio (``trackio.Table``), and loggers with
    ``log_text(key, text, step)``.

    Args:
        logger: the logger.
        name: name of the table.
        rows: the table, with the same keys in each row.
        text: the table as Markdown.
        step: number of updates so far.
    """
    experiment: Any = getattr(logger, "experiment", None)
    columns = list(rows[0]) if rows else []
    if isinstance(logger, TensorBoardLogger) or hasattr(experiment, "add_text"):
        experiment.add_text(name, text, step)
    elif callable(method := getattr(logger, "log_table", None)):
        method(key=name, columns=columns, data=[list(row.values()) for row in rows], step=step)
    elif hasattr(experiment, "log_table") and (run_id := getattr(logger, "run_id", None)) is not None:
        columnwise = {column: [row[column] for row in rows] for column in columns}
        experiment.log_table(run_id, columnwise, f"{name}/update_{step:06d}.json")
    elif callable(method := getattr(logger, "log_text", None)):
        method(key=name, text=text, step=step)
    elif type(experiment).__module__.partition(".")[0] == "trackio" and hasattr(experiment, "log"):
        pandas: Any = importlib.import_module("pandas")
        trackio: Any = importlib.import_module("trackio")
        experiment.log({name: trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)
    else:
        return False
    return True


def _log_settings(logger: Logger, flat: Mapping[str, Any]) -> None:
    """Log settings. MLflow keeps the first value of a setting, so other values of a resumed run become tags."""
    if isinstance(logger, MLFlowLogger):
        experiment, run_id = logger.experiment, logger.run_id
        known = experiment.get_run(run_id).data.params
        for name, value in flat.items():
            if known.get(name, str(value)[:LONGEST]) != str(value)[:LONGEST]:
                experiment.set_tag(run_id, name, value)
        flat = {name: value for name, value in flat.items() if name not in known}
    logger.log_hyperparams(dict(flat))


def flat_hparams(module: LightningModule, trainer: Trainer, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all settings of a run, named as on the command line (``model.beta``), as text, numbers and booleans.

    ``objective`` is the module's class, and ``stage`` is fit, validate or test. ``data`` holds the arguments of the
    DataModule; None uses its hyper-parameters.
    """
    flat: dict[str, Any] = {"objective": type(module).__name__, "seed": module.hparams.get("seed")}
    flat |= {"stage": getattr(trainer.state.fn, "value", None), **_flat("model", module.hparams)}
    datamodule = attached_datamodule(trainer)
    if datamodule is not None:
        flat["data"] = type(datamodule).__name__
        flat.update(_flat("data", datamodule.hparams if data is None else data))
    flat["trainer.max_epochs"], flat["trainer.max_steps"] = trainer.max_epochs, trainer.max_steps
    flat["trainer.precision"], flat["trainer.ranks"] = str(trainer.precision), trainer.world_size
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat.items()}


ALWAYS = ("objective", "seed", "stage")
TRAINER_DEFAULTS = {
    "trainer.max_epochs": 1,
    "trainer.max_steps": -1,
    "trainer.precision": "32-true",
    "trainer.ranks": 1,
}


def differing_hparams(flat: Mapping[str, Any], module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Return objective, seed and stage, followed by the settings that differ from their defaults."""
    defaults: dict[str, Any] = dict(TRAINER_DEFAULTS)
    for prefix, part in (("model", module), ("data", attached_datamodule(trainer))):
        for kind in reversed(type(part).__mro__):
            signature = inspect.signature(kind).parameters.values() if "__init__" in vars(kind) else ()
            named = {one.name: one.default for one in signature if one.default is not inspect.Parameter.empty}
            defaults |= _flat(prefix, named)
    defaults |= {"model.seed": flat["seed"], "data.seed": flat["seed"]}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in defaults.items()}
    changed = {name: value for name, value in flat.items() if name not in plain or plain[name] != value}
    return {name: changed[name] for name in (*ALWAYS, *changed) if name in changed}


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names, without Lightning's own entries (``_class_path``)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, Mapping) and value:
            flat.update(_flat(f"{prefix}.{key}", value))
        else:
            flat[f"{prefix}.{key}"] = value
    return flat


class RunHparams(Callback):
    """Fill TensorBoard's HPARAMS tab.

    Lightning either adds a meaningless ``hp_metric`` or plots an invented first value of every metric. This callback
    writes the settings and the names of the module's ``headline_metrics`` at the start, without values. Validation
    logs the values, and the final values are written when training ends.

    Args:
        data_settings: arguments of the DataModule, which does not store them itself.
    """

    def __init__(self, data_settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.data_settings = data_settings
        self._earlier: dict[str, float] = {}
        self._ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pin the curves that compare objectives; in a resumed run they are already pinned."""
        for logger in trainer.loggers if trainer.is_global_zero and not trainer.global_step else []:
            if isinstance(logger, TensorBoardLogger):
                own = {"losses": {name: ["Multiline", [f"loss/{name}$"]] for name in [type(pl_module).__name__]}}
                logger.experiment.add_custom_scalars(CHARTS | own)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings and the names of the metrics."""
        self._write_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark a run that only validates."""
        if trainer.state.fn == "validate":
            self._write_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark a run that only tests."""
        self._write_start(trainer, pl_module)

    def _write_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the settings that differ from the defaults to TensorBoard, and all settings to other loggers."""
        self._ended = False
        if not trainer.is_global_zero:
            return
        flat = flat_hparams(module, trainer, self.data_settings)
        shown = differing_hparams(flat, module, trainer)
        tags = dict.fromkeys((*aligned(module).headline_metrics, *HEADLINES), 0.0)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(flat)
                experiment, start, _ = hparams_summary(shown, tags)
                for summary in (experiment, start):
                    event_writer(logger).add_summary(summary)
            else:
                _log_settings(logger, flat)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Mark the run as finished."""
        self._write_end(trainer, Status.STATUS_SUCCESS)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Mark the run as failed. If that cannot be written, only the run's own error is reported."""
        with contextlib.suppress(OSError):
            self._write_end(trainer, Status.STATUS_FAILURE)

    def _write_end(self, trainer: Trainer, status: int) -> None:
        """Write once how the run ended."""
        for logger in trainer.loggers if trainer.is_global_zero and not self._ended else []:
            if isinstance(logger, TensorBoardLogger):
                data = HParamsPluginData(session_end_info=SessionEndInfo(status=status))
                value = Summary.Value(tag=SESSION_END_INFO_TAG, metadata=create_summary_metadata(data))
                event_writer(logger).add_summary(Summary(value=[value]))
                logger.experiment.flush()
        self._ended = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final value of each headline metric."""
        final = self._headlines(trainer, pl_module)
        if trainer.is_global_zero and final:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # other loggers use the last value of a metric
                    logger.log_metrics(final, updates_of(pl_module))

    def _headlines(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the latest value of each headline metric, including earlier sessions."""
        values, tags = trainer.callback_metrics, aligned(module).headline_metrics
        return self._earlier | {tag: float(values[tag]) for tag in tags if tag in values}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the latest values, because a run may be resumed after its last validation."""
        checkpoint["headlines"] = self._headlines(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the latest values."""
        self._earlier = checkpoint.get("headlines", {})
