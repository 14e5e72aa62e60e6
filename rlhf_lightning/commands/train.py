"""``rlhf fit``, ``validate``, ``test`` and ``predict``: LightningCLI with one folder per run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.commands.flags import flags, with_underscores
from rlhf_lightning.commands.parsing import in_copied_context, usage_error
from rlhf_lightning.commands.train_settings import SettingsCLI, announce
from rlhf_lightning.compat import run_subcommand, setting_of
from rlhf_lightning.errors import MissingError, RlhfError
from rlhf_lightning.loading import import_path, read_config
from rlhf_lightning.quiet import silence_libraries
from rlhf_lightning.runs import RankWatch, RunFolder, RunHparams, RunManifest, RunProgress, RunRecords, SkippedUpdates
from rlhf_lightning.runs.checkpoint_files import last_checkpoint
from rlhf_lightning.runs.checkpoint_metadata import as_plain, check_contents, inside_run, refuse_misfit
from rlhf_lightning.runs.loggers import logger_arguments
from rlhf_lightning.runs.manifest import earlier_record
from rlhf_lightning.runs.run import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MANIFEST_FILE,
    acquire_lock,
    checked_run_name,
    find_run,
    module_run_name,
    release_lock,
    reserve_version,
    run_folder,
)
from rlhf_lightning.runs.run_records import keep_earlier_rows, wait_for_a_later_name
from rlhf_lightning.training.checkpoint_state import random_state, set_random_state
from rlhf_lightning.training.compatibility import check


class RunConfig(SaveConfigCallback):
    """Write config.yaml with all settings, including defaults.

    If a resumed run changes settings, the earlier file is renamed to config.<n>.yaml.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file on rank zero."""
        folder = run_folder(trainer)
        if self.already_saved or not folder.writes:
            return
        path = folder.config
        self.already_saved = True
        config = self.config.clone()
        config.pop("resume", None)
        # A run with this file must start from the beginning, not from this run's checkpoint.
        if config.ckpt_path and run_of(config.ckpt_path) == path.parent.absolute():
            config.ckpt_path = None
        # Nulls are kept; without them, a setting that was turned off would get its default again.
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            number = 1
            while (earlier := path.with_name(f"config.{number}.yaml")).exists():
                number += 1
            path.rename(earlier)
        write_text(path, text)


class RlhfCLI(SettingsCLI):
    """The training commands. Instantiating the class runs the command line ``args``, which starts with the command."""

    def __init__(self, args: Sequence[str]) -> None:
        self.run_folder: RunFolder | None = None
        self.is_new_folder = False
        self.lock: IO[bytes] | None = None
        command = RunManifest(["rlhf", *args])
        always = [RankWatch(), command, RunRecords(), RunHparams(), RunProgress(), SkippedUpdates()]
        super().__init__(args, always, RunConfig)

    @property
    def folder(self) -> Path | None:
        """The run folder, ``runs/<name>/version_<n>``; None on ranks other than zero and with fast_dev_run."""
        return None if self.run_folder is None else self.run_folder.path

    def instantiate_classes(self) -> None:
        """Create the run folder first, then loggers, model, data and trainer."""
        rehearses = self.config[self.subcommand].trainer.fast_dev_run
        self.run_folder = None if rehearses else self.choose_folder()
        with self.cleanup_on_failure():
            self.config_init = self.parser.instantiate(self.with_placed_loggers())
            self.datamodule = setting_of(self, self.config_init, "data")
            self.model = setting_of(self, self.config_init, "model")
            self.trainer = self.instantiate_trainer()
            if self.run_folder is not None:
                self.run_folder.attach(self.trainer)
                keep_earlier_rows(self.trainer)

    def with_placed_loggers(self) -> Namespace:
        """Return the settings with loggers placed in the run folder; config.yaml keeps the loggers as given."""
        config = self.config.clone()
        trainer, folder = config[self.subcommand].trainer, self.folder
        runs = Path(config[self.subcommand].runs_folder)
        if folder is None:  # another rank, on which loggers write nothing, or fast_dev_run
            folder = runs / "run" / "version_0"
        if not folder.is_relative_to(runs):  # resumed by its path
            runs = folder.parent.parent
        continued = self.lock is not None and not self.is_new_folder
        earlier = earlier_record(folder / MANIFEST_FILE).get("tracked_runs") if continued else None
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if isinstance(logger, Namespace):
                given = logger.get("init_args") or Namespace()
                placed = logger_arguments(import_path(logger.class_path), vars(given), folder, runs, earlier)
                logger.init_args = Namespace(placed)
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run folder and its logger."""
        for callback in self.trainer_defaults["callbacks"]:
            if isinstance(callback, RunHparams):
                callback.data_settings = as_plain(self.config[self.subcommand].data).get("init_args", {})
        config = setting_of(self, self.config_init, "trainer")
        if not config.get("fast_dev_run"):
            if config.get("default_root_dir") is None and self.folder is not None:
                kwargs["default_root_dir"] = str(self.folder)
            if config.get("logger") in (None, True):
                kwargs["logger"] = self.run_logger()
        return super().instantiate_trainer(**kwargs)

    def choose_folder(self) -> RunFolder | None:
        """Return the resumed run folder or a new version. Rank zero chooses and broadcasts it later."""
        config = self.config[self.subcommand]
        continued = self.continued_run()
        if continued is not None:
            if getattr(rank_zero_only, "rank", 0) == 0:
                self.lock = acquire_lock(continued)
            announce(f"continuing {continued} from {config.ckpt_path}")
            return RunFolder(continued)
        name = checked_run_name(config.run_name or default_run_name(self.argv, config))
        runs, config.run_name = Path(config.runs_folder), name
        if self.subcommand != "fit" and "--run_name" not in flags(self.argv):
            # Evaluations are kept out of the training runs: inside the evaluated run, or in a separate folder.
            evaluated = run_of(config.ckpt_path) if config.ckpt_path else None
            runs = runs / name if evaluated is None else Path(os.path.relpath(evaluated))
            name = str(self.subcommand)
        if getattr(rank_zero_only, "rank", 0) != 0:
            return None
        self.is_new_folder = True
        folder = reserve_version(runs, name)
        if self.subcommand == "fit":
            self.lock = acquire_lock(folder)
        announce(f"run: {folder}")
        return RunFolder(folder)

    def continued_run(self) -> Path | None:
        """Return the run to continue in its own folder; None for a new run."""
        config = self.config[self.subcommand]
        if config.resume:
            return find_run(config.resume, config.runs_folder)
        given = flags(self.argv)
        if self.subcommand == "fit" and "--ckpt_path" in given and "--run_name" not in given:
            run = run_of(config.ckpt_path)
            if run is not None and (config.run_name is None or config.run_name.split("/")[-1] == run.parent.name):
                return Path(os.path.relpath(run))
        return None

    def run_logger(self) -> TensorBoardLogger:
        """Return a TensorBoard logger that writes into the run folder."""
        config = self.config[self.subcommand]
        if self.folder is None:
            return TensorBoardLogger(config.runs_folder, config.run_name, default_hp_metric=False)
        wait_for_a_later_name(self.folder)
        return TensorBoardLogger(
            self.folder.parent.parent, self.folder.parent.name, version=self.folder.name, default_hp_metric=False
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Remove callbacks that the trainer's switches turn off."""
        unwanted: list[type[Callback]] = []
        if config.get("enable_checkpointing") is False:
            unwanted.append(Checkpoint)
        if config.get("enable_progress_bar") is False:
            unwanted.append(ProgressBar)
        always = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [c for c in always if not isinstance(c, tuple(unwanted))]
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, tuple(unwanted))])

    # -- running ------------------------------------------------------------------------------------------------------

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints without running code from them; keep no predictions in memory."""
        further: dict[str, Any] = {"return_predictions": False} if subcommand == "predict" else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True, **further}

    def start(self, subcommand: str) -> None:
        """Check the combination of settings and run the command."""
        with self.cleanup_on_failure():
            check(self.trainer, self.model, self.datamodule, fits=subcommand == "fit")
            given = self.config[subcommand].get("ckpt_path")
            checkpoint = Path(given) if given and Path(given).exists() else None
            if checkpoint is not None:
                check_contents(checkpoint, resumes=subcommand == "fit")
            try:
                run_subcommand(self, subcommand)
            except Exception as error:
                if checkpoint is not None:
                    refuse_misfit(error, checkpoint)
                # A logger that fails while it records the failure would hide the original error.
                hidden = next((one for one in contexts(error) if isinstance(one, RlhfError)), None)
                if hidden is not None and isinstance(error, OSError):
                    error = hidden
                    raise error from None
                raise
        self.unlock()

    @contextlib.contextmanager
    def cleanup_on_failure(self) -> Iterator[None]:
        """On failure release the lock, and delete the new folder of a run that did not start."""
        try:
            yield
        except BaseException:
            if self.is_new_folder and self.run_folder is not None and not self.run_folder.manifest.exists():
                shutil.rmtree(self.run_folder.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # the folder of the run's other versions
                    self.run_folder.path.parent.rmdir()
            self.unlock()
            raise

    def unlock(self) -> None:
        """Release the lock of the run folder."""
        if self.lock is not None:
            release_lock(self.lock)
            self.lock = None


def contexts(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that were being handled when an error was raised, latest first."""
    while error.__context__ is not None:
        error = error.__context__
        yield error


def main(argv: Sequence[str]) -> int:
    """Run a training command; ``argv`` starts with its name."""
    run(argv)
    return 0


def run(argv: Sequence[str]) -> RlhfCLI:
    """Run a training command in this process; the result has ``.trainer``, ``.model`` and ``.folder``."""
    silence_libraries()
    with callers_random_state():
        return in_copied_context(RlhfCLI, resumed(with_underscores(argv)))


@contextlib.contextmanager
def callers_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch, and Lightning's seed, after a run."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    state, seeds = random_state(device), {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        yield
    finally:
        set_random_state(state, device)
        for name, value in seeds.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def resumed(argv: Sequence[str]) -> list[str]:
    """Insert config and last checkpoint of the run named by ``--resume``, or by `rlhf validate RUN` and similar."""
    given, command = flags(argv), argv[0]
    named = argv[1] if command != "fit" and argv[1:] and not argv[1].startswith("-") else None
    if command != "fit" and "--resume" in given:
        run_name = given["--resume"]
        usage_error(f"rlhf {command}", f"--resume continues training; to evaluate, write `rlhf {command} {run_name}`")
    if "--resume" not in given and named is None:
        return list(argv)
    run = find_run(named or given["--resume"], given.get("--runs_folder", "runs"))
    checkpoint = given.get("--ckpt_path") or str(inside_run(last_checkpoint(run), run))
    if not (run / CONFIG_FILE).is_file():
        raise MissingError("no-config", f"{run} cannot be resumed or evaluated: it has no {CONFIG_FILE}")
    if named is not None:
        return [command, "--config", str(run / CONFIG_FILE), "--ckpt_path", checkpoint, *argv[2:]]
    raised = raised_bound(given, read_config(run / CONFIG_FILE).get("trainer") or {})
    return ["fit", "--config", str(run / CONFIG_FILE), "--ckpt_path", checkpoint, *raised, *argv[1:]]


def raised_bound(given: Mapping[str, str], trainer: Mapping[str, Any]) -> list[str]:
    """If the user raised ``max_steps`` or ``max_epochs``, return the flag that removes the run's other limit.

    Args:
        given: the flags of the command line.
        trainer: the trainer's settings in the run's config file.
    """
    for name, other in (("max_steps", "max_epochs"), ("max_epochs", "max_steps")):
        asked, before, bound = given.get(f"--trainer.{name}", ""), trainer.get(name) or -1, trainer.get(other) or -1
        raised = asked.isdecimal() and 0 < before < int(asked)
        if raised and bound > 0 and f"--trainer.{other}" not in given:
            announce(f"{name} was raised from {before} to {asked}, so {other} {bound} of the run no longer applies")
            return [f"--trainer.{other}", "-1"]
    return []


def run_of(checkpoint: str) -> Path | None:
    """Return the run folder that contains a checkpoint; None if there is none."""
    path = Path(checkpoint).absolute()
    run = path.parent.parent
    return run if path.parent.name == CHECKPOINTS_FOLDER and (run / MANIFEST_FILE).is_file() else None


def default_run_name(argv: Sequence[str], config: Namespace) -> str:
    """Return the name of the first config file, or of the module: ``dpo`` for dpo.yaml and for DPOModule."""
    path = flags(argv).get("--config", "")
    if path and os.path.isfile(path) and Path(path).stem != Path(CONFIG_FILE).stem:
        return Path(path).stem
    return module_run_name(str(config.model.class_path).rpartition(".")[2])
