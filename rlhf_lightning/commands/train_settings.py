"""Parse, complete and check the settings of a training command before anything is loaded."""

from __future__ import annotations

import inspect
import os
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

import rlhf_lightning.modules  # noqa: F401  short class names (`--model DPOModule`) work for what is imported
from rlhf_lightning import working_directory
from rlhf_lightning.commands.flag_index import REFUSED
from rlhf_lightning.commands.flags import config_settings, configs_first, flags, option_pairs, put_nested, split_nested
from rlhf_lightning.commands.messages import defaults_of, own_settings, parameters_of, subclasses_of
from rlhf_lightning.commands.parsing import PlainParser, class_doc, usage_error, written_secret
from rlhf_lightning.compat import parser_actions, setting_of, subcommand_parsers
from rlhf_lightning.data import AlignmentDataModule
from rlhf_lightning.data.sources import at_snapshot
from rlhf_lightning.loading import import_path, read_config
from rlhf_lightning.runs import ModelExport, PredictionWriter, RunCheckpoint, SampleTable
from rlhf_lightning.runs.checkpoint_files import damage
from rlhf_lightning.runs.checkpoint_metadata import (
    as_plain,
    checkpoint_hparams,
    is_same_class,
    merged,
    own_code,
    refused_checkpoint,
)
from rlhf_lightning.runs.loggers import PLACES
from rlhf_lightning.runs.run import CONFIG_FILE, find_run
from rlhf_lightning.training.compatibility import SHARDED, refused_precision, refused_strategy
from rlhf_lightning.training.module import AlignmentModule

CALLBACK_GROUPS: dict[str, type[Callback]] = {
    "checkpoint": RunCheckpoint,
    "samples": SampleTable,
    "export": ModelExport,
    "predictions": PredictionWriter,
}

TRAINER_DEFAULTS: dict[str, Any] = {
    # The DataModules already distribute each step over ranks; Lightning's sampler would do so again.
    "use_distributed_sampler": False,
    # Lightning's default is 1000 epochs; most stages need one.
    "max_epochs": 1,
    # Logging is cheap compared with an optimizer step of a language model.
    "log_every_n_steps": 1,
    # Bad rows are detected when they are read, so a sanity check would only cost time.
    "num_sanity_val_steps": 0,
    # RunManifest prints the number of parameters in one line.
    "enable_model_summary": False,
    # Use deterministic kernels where they exist, so that the same seed gives the same numbers.
    "deterministic": "warn",
    # RunHparams logs them together with the headline metrics.
    "enable_autolog_hparams": False,
}

DESCRIPTIONS = {
    "fit": "Train a module on data. Example: rlhf fit --config recipe:dpo --data.source pairs.jsonl",
    "validate": "Compute the metrics of the held-out rows, as val/.",
    "test": "Compute the metrics of the held-out rows, as test/.",
    "predict": "Write completions (policies) or scores (reward models) of the held-out prompts to predictions.jsonl.",
    "plan": "Estimate memory and compute of `rlhf fit` on each rank, and suggest settings that fit.",
}

CHECKPOINT_REMEDY = "give the path of a checkpoint, or continue a run with --resume RUN"


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formats help and keeps the line breaks of the description, for example in equations."""


class TrainParser(PlainParser, LightningArgumentParser):
    """Lightning's parser with one-sentence errors; a logger's folder and name are optional."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; a logger's folder and name default to null."""
        if not (isinstance(theclass, type) and issubclass(theclass, Logger)):
            added = super().add_class_arguments(theclass, *args, **kwargs)
            if str(self.description).startswith("Help for --model.help"):
                self.describe_objective(theclass)
            return added
        open_ones = [name for name in PLACES if name in inspect.signature(theclass).parameters]
        kwargs["skip"] = {*(kwargs.get("skip") or ()), *open_ones}
        added = super().add_class_arguments(theclass, *args, **kwargs)
        for name in open_ones:
            kind = int | str | None if name == "version" else str | None
            self.add_argument(f"--{name}", type=kind, default=None, help="null: from the run folder")
        return [*added, *open_ones]

    def describe_objective(self, kind: type) -> None:
        """Make ``--model.help CLASS`` print usage, paper, equation and target above the settings."""
        title = ": ".join(filter(None, [kind.__name__, getattr(kind, "paper", "")]))
        self.formatter_class = HelpFormatter
        needed = "".join(sorted(f" --{action.dest} VALUE" for action in parser_actions(self) if action.required))
        self.usage = f"rlhf fit --model {kind.__name__}{needed} [--model.SETTING VALUE ...] --data CLASS ..."
        self.description = f"{title}\n\n{class_doc(kind)}"
        assert self.groups is not None
        self.groups["model"].title = "settings"


class SettingsCLI(LightningCLI):
    """Parses a training command and builds module, data and strategy. `train.RlhfCLI` builds and runs the trainer.

    Args:
        args: the command line, which starts with the command's name.
        callbacks: callbacks that every run has.
        save_config: callback that writes the settings.
    """

    shown: ClassVar[str | None] = None
    """Displayed name of the command, if it differs: `rlhf plan` reads the settings of `fit`."""

    def __init__(
        self,
        args: Sequence[str],
        callbacks: Sequence[Callback] = (),
        save_config: type[SaveConfigCallback] | None = None,
    ) -> None:
        self.argv, self.nested_flags = split_nested(configs_first(args))
        working_directory.allow_names_in(typed_texts(self.argv))
        name, shown = args[0], self.shown or args[0]
        super().__init__(
            AlignmentModule,
            AlignmentDataModule,
            save_config_callback=save_config,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [*callbacks]},
            seed_everything_default=0,
            parser_class=TrainParser,
            parser_kwargs=cast(
                Any, {"prog": "rlhf", name: {"description": DESCRIPTIONS[shown], "usage": usage_of(shown)}}
            ),
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=self.argv,
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parser under the displayed name of the command."""
        super().setup_parser(*args, **kwargs)
        for name, parser in subcommand_parsers(self).items():
            parser.prog = f"rlhf {self.shown or name}"
            for action in parser_actions(parser):
                action.help = SUPPRESS if action.dest in REFUSED else action.help

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the given command, with the arguments of the trainer's method that are not options.

        Building the parsers of all commands would take another second.
        """
        loaders = {"train_dataloaders", "val_dataloaders"} if self.argv[0] == "fit" else {"dataloaders"}
        return {self.argv[0]: loaders | {"model", "datamodule", "weights_only", "verbose", "return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder, the same for all commands: each can read a run's config.yaml."""
        for name, default, text in (
            ("run_name", None, "name of the run; null: the name of the config file or module"),
            ("runs_folder", "runs", "folder of all runs"),
            ("resume", None, "fit: continue this run (runs/NAME or one version) in its folder"),
        ):
            parser.add_argument(f"--{name}", type=str if default else str | None, default=default, help=text)
        for group, callback in CALLBACK_GROUPS.items():
            parser.add_lightning_class_args(callback, group)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, and run all checks that need no models and data."""
        # The parser would print the settings without the nested flags.
        prints = bool(self.nested_flags) and any(argument.startswith("--print_config") for argument in self.argv)
        if prints:
            self.argv = [argument for argument in self.argv if not argument.startswith("--print_config")]
        self.config = parser.parse_args(self.argv)
        config = self.config[self.config.subcommand]
        self.leave_settings_of_others(config.model)
        self.put_nested_flags(config.model)
        if prints:
            print(subcommand_parsers(self)[self.argv[0]].dump(config, skip_none=False, skip_validation=True), end="")
            raise SystemExit(0)
        self.announce_dropped(config)
        data = config.data.get("init_args") or {}
        # config.yaml records the row count of a feedback store, so that a repeated or resumed run has the same data.
        for name in ("source", "eval_source"):
            if data.get(name) is not None:
                data[name] = at_snapshot(data[name])
        self.refuse_clashes(self.shown or self.config.subcommand, self.config[self.config.subcommand])

    def leave_settings_of_others(self, model: Namespace) -> None:
        """Drop settings of another objective's config file, so that the chosen class uses its own defaults.

        Settings that both classes inherit with the same default, such as ``lora``, are kept. Others, such as DPO's
        ``beta`` for SimPO, are dropped, because they mean something else there.
        """
        given = {
            name.removeprefix("--model.").removeprefix("init_args.").partition(".")[0] for name in flags(self.argv)
        }
        given |= {flag.setting for flag in self.nested_flags}
        changed: dict[str, tuple[str, str, str]] = {}
        for file, kind, names in config_settings(self.argv, "model"):
            if kind.rpartition(".")[2] == model.class_path.rpartition(".")[2]:
                changed = {name: found for name, found in changed.items() if name not in names}
                continue
            for name in own_settings(kind, model.class_path).intersection(names) - given:
                changed[name] = (Path(file).name, kind.rpartition(".")[2], name)
        defaults = defaults_of(model.class_path)
        kept: dict[tuple[str, str], list[str]] = {}
        for file, kind, name in changed.values():
            if name in defaults and model.init_args.get(name) != defaults[name]:
                kept.setdefault((file, kind), []).append(f"--model.{name} {model.init_args[name]}")
                model.init_args[name] = defaults[name]
        for (file, kind), settings in kept.items():
            announce(
                f"{file} is for {kind}: {model.class_path.rpartition('.')[2]} takes its own defaults; to keep the "
                f"file's values, add {' '.join(sorted(settings))}"
            )

    def put_nested_flags(self, model: Namespace) -> None:
        """Apply flags such as ``--model.scorer.init_args.limit``, which set a key inside an open setting."""
        for flag in self.nested_flags:
            settings = model.init_args
            if flag.setting not in settings:
                short = model.class_path.rpartition(".")[2]
                usage_error(f"rlhf {self.shown or self.argv[0]}", f"model.{flag.setting} is not an argument of {short}")
            settings[flag.setting] = put_nested(as_plain(settings[flag.setting]), flag)

    def announce_dropped(self, config: Namespace) -> None:
        """Print the settings of a config file that were dropped because another class is chosen."""
        for part in ("model", "data"):
            chosen = config[part].class_path.rpartition(".")[2]
            for file, kind, names in config_settings(self.argv, part):
                known = config[part].get("init_args") or {}
                dropped = [f"{part}.{name}" for name in names if name not in known]
                if dropped and kind.rpartition(".")[2] != chosen:
                    announce(f"{Path(file).name} is for {kind}: {', '.join(dropped)} do not apply to {chosen}")

    def refuse_clashes(self, command: str, config: Namespace) -> None:
        """Refuse settings that Lightning would refuse later, or that would silently give wrong training."""

        def refuse(sentence: str) -> None:
            usage_error(f"rlhf {command}", sentence)

        trainer, model = config.trainer, config.model
        secret = written_secret(as_plain(config))
        if secret is not None:
            refuse(secret)
        if trainer.gradient_clip_val is not None:
            refuse("trainer.gradient_clip_val does not work with manual optimization; set model.max_grad_norm")
        if trainer.accumulate_grad_batches != 1:
            refuse(
                "trainer.accumulate_grad_batches does not apply: data.batch_size rows are one optimizer step, split "
                "into micro-batches by data.micro_batch_size or data.max_tokens"
            )
        for reason in (refused_precision(str(trainer.precision)), refused_strategy(str(trainer.strategy))):
            if reason is not None:
                refuse(reason)
        if not hasattr(import_path(model.class_path), "batch_type"):
            known = ", ".join(sorted(subclasses_of(AlignmentModule)))
            refuse(f"model is an abstract base class; choose an objective with --model CLASS: {known}")
        if config.resume and (changed := self.changed_seed(config)) is not None:
            refuse(changed)
        if config.ckpt_path in ("last", "best"):
            refuse(f"--ckpt_path {config.ckpt_path} does not exist in a new run folder; {CHECKPOINT_REMEDY}")
        if config.ckpt_path not in (None, "hpc") and not Path(config.ckpt_path).exists():
            refuse(f"there is no checkpoint {config.ckpt_path}; {CHECKPOINT_REMEDY}")
        if config.ckpt_path is not None and Path(config.ckpt_path).exists():
            if not config.resume and (reason := damage(Path(config.ckpt_path))) is not None:
                refuse(f"{config.ckpt_path} is damaged: {reason}; `--resume RUN` finds the newest undamaged one")
            reason = refused_checkpoint(Path(config.ckpt_path), SHARDED in str(trainer.strategy), command == "fit")
            if reason is not None:
                refuse(reason)

    def changed_seed(self, config: Namespace) -> str | None:
        """Return why a resumed run cannot have the given seed; print a message about a seed without effect."""
        before = read_config(find_run(config.resume, config.runs_folder) / CONFIG_FILE)
        for part in ("model", "data"):
            now = (config[part].get("init_args") or {}).get("seed")
            then = ((before.get(part) or {}).get("init_args") or {}).get("seed")
            if now != then:
                return (
                    f"{part}.seed is {now}, and the run that is resumed was started with {then}: a run keeps its row "
                    "order and its random numbers; leave the seed out, or start a new run"
                )
        if config.seed_everything != before.get("seed_everything"):
            announce(
                f"seed_everything {config.seed_everything} has no effect on a resumed run: its seeds and random "
                "states are those of the checkpoint"
            )
        return None

    def _parse_ckpt_path(self) -> None:
        """Read only settings that were not given from the checkpoint; in Lightning the checkpoint overrides all."""
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        path = config.get("ckpt_path")
        if not path or not Path(path).exists():
            return
        hparams = checkpoint_hparams(Path(path))
        trained, asked = hparams.pop("_class_path", None), config.model.class_path
        if trained is not None and not is_same_class(str(trained), asked):
            usage_error(
                f"rlhf {command}",
                f"{path} was written by {trained}, but the model is {asked}; give the same class, or start {asked} "
                "from exported weights with --model.init_from",
            )
        given = as_plain(self.parser.parse_args(self.argv, defaults=False)[command].get("model", {}))
        given = given.get("init_args", {}) if isinstance(given, Mapping) else {}
        known = set(parameters_of(asked))
        kept = {name: value for name, value in hparams.items() if name in known}
        for name, code in own_code({name: value for name, value in kept.items() if name not in given}, asked):
            usage_error(
                f"rlhf {command}",
                f"{path} names the code {code} as model.{name}, which is not run from a checkpoint: give "
                f"--model.{name} again",
            )
        for name, value in given.items():
            if name in kept and as_plain(kept[name]) != value and not isinstance(value, Mapping):
                announce(f"model.{name} is {value} as given; the checkpoint was trained with {kept[name]}")
        model = {"class_path": asked, "init_args": merged(kept, given)}
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)
        self.put_nested_flags(self.config[command].model)

    def before_instantiate_classes(self) -> None:
        """Set seeds that are null to ``seed_everything``, so that config.yaml records them."""
        config = self.config[self.subcommand]
        everything = config.seed_everything
        seed = 0 if isinstance(everything, bool) else everything
        for part in ("model", "data"):
            settings = config[part].get("init_args") or {}
            if "seed" in settings and settings["seed"] is None:
                settings["seed"] = seed
            elif settings.get("seed", seed) != seed and "--seed_everything" in flags(self.argv):
                announce(f"{part}.seed is {settings['seed']} as given, which overrides seed_everything {seed}")

    def instantiate_classes(self) -> None:
        """Build module, data and strategy, but no trainer."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = setting_of(self, self.config_init, "data")
        self.model = setting_of(self, self.config_init, "model")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; Lightning calls this after instantiation."""
        self.start(subcommand)

    def start(self, subcommand: str) -> None:
        """Run nothing."""


def training_parser() -> LightningArgumentParser:
    """Return the parser of `rlhf fit`."""

    class ParserOnly(SettingsCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            self.config = Namespace(subcommand=None)

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

    return subcommand_parsers(ParserOnly(["fit"]))["fit"]


def typed_texts(argv: Sequence[str]) -> Iterator[str]:
    """Yield the values of options that may hold import paths, and the texts of the config files."""
    for name, value in option_pairs(argv):
        if name not in ("--config", "--ckpt_path", "--resume", "--run_name", "--runs_folder"):
            yield value
        elif name == "--config" and os.path.isfile(value):
            yield Path(value).read_text(encoding="utf-8", errors="replace")


def usage_of(command: str) -> str:
    """Return a short usage line; the parser's own usage lists a hundred options."""
    resume = " [--resume RUN]" if command == "fit" else ""
    if command in ("validate", "test", "predict"):
        resume = f"\n       rlhf {command} RUN [--ckpt_path CHECKPOINT]"
    return (
        f"rlhf {command} [--config FILE.yaml ...] [--model CLASS] [--model.ARGUMENT VALUE ...] [--data CLASS] "
        f"[--data.ARGUMENT VALUE ...] [--trainer.ARGUMENT VALUE ...] [--run_name NAME]{resume}"
    )


@rank_zero_only
def announce(text: str) -> None:
    """Print a line on rank zero only."""
    print(text, flush=True)
