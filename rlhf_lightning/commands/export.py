"""``rlhf export``: write a checkpoint or an adapter as a Hugging Face folder, and push it to the Hub."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, MissingError, ModelError, SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_lightning.training.module import AlignmentModule

PROBE_TEXTS, PROBE_TOKENS = 4, 64
"""Number and length of the random texts on which a merged model is compared with its adapter."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf export``."""
    # `import` is a Python keyword and cannot name a parameter.
    renamed = ["--import_module" + a.removeprefix("--import") if a.partition("=")[0] == "--import" else a for a in argv]
    return run_function(export, renamed, "rlhf export", positional=["source"])


def export(
    source: str,
    out: str | None = None,
    merge: bool = False,
    best: bool = False,
    new_tokens: list[str] | None = None,
    import_module: str | None = None,
    push: str | None = None,
    public: bool = False,
    results: Sequence[str] = (),
) -> int:
    """Write the weights of a run as a Hugging Face folder, and push it to the Hub.

    The model card records how the run was trained: objective, seed, numeric settings, versions, commit, and the
    fingerprint and counts of the data. It contains no paths and no command line.

    Args:
        source: a run (runs/dpo or runs/dpo/version_0), a checkpoint (.ckpt), or an adapter's folder to merge; with
            --push also an exported folder.
        out: folder to write; it must not exist.
        merge: merge a LoRA adapter into its backbone in fp32, print the largest difference to the logits of the trained
            model (large for a quantised backbone), and keep the adapter in OUT.adapter.
        best: use the best checkpoint of a run instead of the last.
        new_tokens: copy a model's folder and add an embedding row for each of these texts, so that an adapter can train
            them.
        import_module: also --import: your module or .py file with the class that wrote the checkpoint. Other modules
            named in a checkpoint are never imported.
        push: Hub repository to upload the folder to, as in me/my-dpo; a new one is private unless --public is given.
        public: make the new repository public.
        results: Markdown reports of `rlhf evaluate`, `evaluate-reward` or `verify` to put into the model card.
    """
    if public and push is None:
        raise SettingError("missing-setting", "public is set, but no repository is given: name one with --push")
    reports = [read_result(file) for file in results]
    folder = Path(source)
    if out is not None:
        folder = write_folder(source, Path(out), merge, best, new_tokens, import_module)
    elif push is None or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SettingError(
            "missing-setting", f"{source} is not an exported folder: name the folder to write with --out"
        )
    run = run_of(Path(source), best)
    if run is not None or reports:
        complete_card(folder, run, reports)
    if push is not None:
        from rlhf_lightning.models.export import push_folder

        if (local := local_backbone(folder)) is not None:
            print(f"the repository lacks the adapter's backbone, the folder {local}: --merge writes all weights")
        print(f"{folder} -> {push_folder(folder, push, private=not public)}")
    return 0


def write_folder(
    source: str, target: Path, merge: bool, best: bool, new_tokens: list[str] | None, import_module: str | None
) -> Path:
    """Write the folder and return it; the arguments are those of `export`."""
    from rlhf_lightning.loading import import_user_module

    path = Path(source)
    if target.exists():
        raise SettingError("output-exists", f"{target} exists already and is not overwritten: give a new folder")
    own = None if import_module is None else import_user_module(import_module)
    if new_tokens:
        rows = write_with_tokens(source, target, new_tokens)
        print(f"{source} -> {target}, with {rows} embeddings")
        return target
    if (path / "adapter_config.json").is_file():
        if not merge:
            raise SettingError(
                "already-exported", f"{source} is already an adapter folder; --merge merges it into its backbone"
            )
        _report(merge_adapter(path, target), target, path)
        return target
    if (path / "config.json").is_file():
        raise SettingError("already-exported", f"{source} is already a Hugging Face folder")
    checkpoint = find_checkpoint(path, best)
    module = module_from(checkpoint, own)
    if not merge or module.lora is None:
        if merge:
            print(f"{checkpoint} has no adapter to merge: all its weights were trained")
        module.export(target)
        print(f"{checkpoint} -> {target}")
        return target
    adapter = target.with_name(f"{target.name}.adapter")
    if adapter.exists():
        raise SettingError("output-exists", f"the adapter's folder {adapter} exists already: give another --out")
    module.export(adapter)
    _report(merge_adapter(adapter, target), target, adapter)
    return target


def run_of(path: Path, best: bool = False) -> Path | None:
    """Return the run folder that a run, a checkpoint or an exported folder belongs to; None if there is none."""
    from rlhf_lightning.errors import RlhfError
    from rlhf_lightning.runs.run import CONFIG_FILE, MANIFEST_FILE

    found = path
    if not (path / "backbone.json").is_file():
        try:
            found = find_checkpoint(path, best)
        except RlhfError:
            return None
    above = found.resolve().parents[:3]
    return next((one for one in above if (one / MANIFEST_FILE).is_file() and (one / CONFIG_FILE).is_file()), None)


def local_backbone(folder: Path) -> str | None:
    """Return the folder of an adapter's backbone; None for whole models and for backbones of the Hub."""
    from rlhf_lightning.models.resolving import adapter_settings

    if not (folder / "adapter_config.json").is_file():
        return None
    source = str(adapter_settings(folder)["base_model_name_or_path"])
    return source if Path(source).is_dir() or Path(source).is_absolute() else None


def read_result(file: str) -> str:
    """Return a Markdown report with headings one level lower and without images, which are not uploaded."""
    if not Path(file).is_file():
        raise MissingError("unknown-file", f"there is no report {file}; name a Markdown file of results")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    kept = (f"#{line}" if line.startswith("#") else line for line in lines if not line.startswith("!["))
    return "\n".join(kept).strip()


RUN_HEADING, RESULTS_HEADING = "## How it was trained", "## Results"


def complete_card(folder: Path, run: Path | None, reports: Sequence[str]) -> None:
    """Add the training record of the run and the reports to a folder's model card, replacing earlier ones."""
    from rlhf_lightning.evaluation.report import markdown_table, write_markdown
    from rlhf_lightning.loading import flat_settings, read_config, read_record
    from rlhf_lightning.models.export import CARD_FILE
    from rlhf_lightning.runs.run import CONFIG_FILE, MANIFEST_FILE

    parts = []
    if run is not None:
        manifest, settings = read_record(run / MANIFEST_FILE), flat_settings(read_config(run / CONFIG_FILE))
        data, git, counted, packages = (_part(manifest, name) for name in ("data", "git", "parameters", "packages"))
        sessions = manifest.get("sessions")
        last = sessions[-1] if isinstance(sessions, list) and sessions else None
        rows: list[list[Any]] = [
            ["objective", str(manifest.get("model", "")).rpartition(".")[2]],
            ["seed", manifest.get("seed")],
            ["updates", last.get("updates") if isinstance(last, dict) else None],
            ["parameters", _listed(counted)],
            ["data", f"{str(data.get('class', '')).rpartition('.')[2]}, fingerprint {data.get('fingerprint')}"],
            ["rows", _listed(_part(data, "report"))],
            ["chat template", manifest.get("chat_template")],
            ["commit", f"{git.get('commit')}, {git.get('changed_files')} changed files" if git else None],
            ["versions", _listed(packages)],
        ]
        numbers = [
            [name, str(value)] for name, value in settings.items()
            if name.startswith(("model.", "data.", "trainer.")) and isinstance(value, int | float)
        ]  # fmt: skip
        parts = [RUN_HEADING, markdown_table(["", "run"], [row for row in rows if row[1] is not None])]
        parts += [markdown_table(["setting", "value"], numbers)]
    parts += [RESULTS_HEADING, *reports] if reports else []
    card = folder / CARD_FILE
    own = card.read_text(encoding="utf-8").partition(f"\n{parts[0]}\n")[0].rstrip() if card.is_file() else ""
    write_markdown(card, "\n\n".join([own, *parts]) + "\n")


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a record; empty if a user has changed it to something other than a mapping."""
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _listed(part: Mapping[str, Any]) -> str | None:
    """Return names and values as one text; None if there are none."""
    texts = (f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in part.items())
    return ", ".join(texts) or None


def write_with_tokens(source: str, target: Path, new_tokens: Sequence[str]) -> int:
    """Write a causal language model and its tokenizer with further tokens; return the number of embedding rows."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import LoadSettings
    from rlhf_lightning.models.resolving import resolve_folder
    from rlhf_lightning.models.roles import load_policy, refuse_reward_model
    from rlhf_lightning.models.scalar_head import vocabulary_rows
    from rlhf_lightning.tokenization import load_tokenizer

    refuse_reward_model(resolve_folder(source))
    tokenizer = load_tokenizer(resolve_folder(source), new_tokens=new_tokens)
    policy = load_policy(source, LoadSettings(embeddings=len(tokenizer)))
    export_policy(policy, tokenizer, target)
    return vocabulary_rows(policy.model)


def _report(difference: float, target: Path, adapter: Path) -> None:
    print(f"merged into {target}; largest difference from the logits of the unmerged adapter: {difference:.2e}")
    print(f"the adapter is in {adapter}")


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """Return the checkpoint at ``path``, or the last or best checkpoint of the run there."""
    from rlhf_lightning.runs.checkpoint_files import BEST_CHECKPOINT, last_checkpoint
    from rlhf_lightning.runs.checkpoint_metadata import SHARDED_META, inside_run
    from rlhf_lightning.runs.run import CHECKPOINTS_FOLDER, find_run

    if path.is_file() or (path / SHARDED_META).is_file():
        return path
    if path.suffix == ".ckpt":
        raise MissingError("no-checkpoint", f"there is no checkpoint {path}")
    run = find_run(str(path))
    if not best:
        return inside_run(last_checkpoint(run), run)
    if not (run / CHECKPOINTS_FOLDER / BEST_CHECKPOINT).exists():
        raise MissingError(
            "no-checkpoint", f"{run} has no best checkpoint, since it was not validated; omit --best to export the last"
        )
    return inside_run(run / CHECKPOINTS_FOLDER / BEST_CHECKPOINT, run)


def module_from(checkpoint: Path, own: str | None = None) -> "AlignmentModule":
    """Build the module that wrote a checkpoint and load its weights. Foreign code that the file names is not run.

    Args:
        checkpoint: the file, or the folder of shards.
        own: module named by the user, whose classes are allowed too.
    """
    import rlhf_lightning.modules  # noqa: F401
    from rlhf_lightning.loading import load_class
    from rlhf_lightning.runs.checkpoint_metadata import PACKAGE, check_contents, checkpoint_hparams, refuse_misfit
    from rlhf_lightning.training.module import AlignmentModule

    settings = checkpoint_hparams(checkpoint)
    name = settings.get("_class_path")
    if not isinstance(name, str):
        raise DataError(
            "checkpoint-without-class",
            f"{checkpoint} does not name the class that wrote it: export a checkpoint of `rlhf fit`",
        )
    if name.partition(".")[0] not in (PACKAGE, (own or "").partition(".")[0]):
        raise SettingError(
            "foreign-code", f"{checkpoint} was written by {name}: add --import {name.rpartition('.')[0]} to export it"
        )
    load_class(name, AlignmentModule, {}, f"class in {checkpoint}")
    check_contents(checkpoint, resumes=False)
    try:
        return _restored(checkpoint, without_code(settings, own or PACKAGE))
    except Exception as error:
        refuse_misfit(error, checkpoint)
        raise


def _restored(checkpoint: Path, settings: dict[str, Any]) -> "AlignmentModule":
    """Build the module with the settings and the weights of a checkpoint."""
    from lightning.pytorch.cli import instantiate_module

    from rlhf_lightning.runs.checkpoint_metadata import read_checkpoint, weights_in
    from rlhf_lightning.training.module import AlignmentModule

    module = instantiate_module(AlignmentModule, settings)
    # The frozen reference would need memory and is not exported.
    module.needs_reference = False  # type: ignore[misc]
    module.configure_model()
    module.on_load_checkpoint(read_checkpoint(checkpoint))
    module.load_state_dict(weights_in(checkpoint))
    return module


def without_code(settings: dict[str, Any], named: str) -> dict[str, Any]:
    """Return a checkpoint's settings without scorer, engine, optimizer and schedule, which an export does not need."""
    from rlhf_lightning.runs.checkpoint_metadata import PACKAGE, own_code

    kept = {name: value for name, value in settings.items() if name not in ("engine", "optimizer", "lr_scheduler")}
    coded = {setting for setting, _ in own_code({k: v for k, v in kept.items() if not k.startswith("_")}, named)}
    if "scorer" in coded:
        kept["scorer"] = {"class_path": f"{PACKAGE}.scoring.scorer.ZeroScorer"}
    unknown = sorted(coded - {"scorer"})
    if unknown:
        raise DataError(
            "foreign-code",
            f"the checkpoint cannot be exported: its settings {', '.join(unknown)} name code outside this package",
        )
    return kept


def merge_adapter(adapter: Path, target: Path) -> float:
    """Merge an adapter into its full-precision backbone in fp32 and write the result.

    Returns:
        The largest difference of a logit between the adapter on its (quantised) backbone as trained and the written
        folder.
    """
    import shutil

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.models.export import export_policy, export_reward_model
    from rlhf_lightning.models.loading import LoadSettings, load_weights
    from rlhf_lightning.models.resolving import SCORE_BIAS, adapter_settings, backbone_record, load_base_of_adapter
    from rlhf_lightning.models.scalar_head import ScalarModel
    from rlhf_lightning.tokenization import load_tokenizer

    scores = adapter_settings(adapter).get("task_type") == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    tokenizer, record = load_tokenizer(adapter), backbone_record(adapter)
    changes = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} if scores else {}
    before = probe(trained(adapter, kind, record.get("quantization"), changes))
    merged = load_weights(str(adapter), kind, LoadSettings(), **changes)
    base = load_base_of_adapter(str(adapter))
    if scores:
        export_reward_model(ScalarModel(merged, bias=record.get(SCORE_BIAS, 0.0)), tokenizer, target, base)
    else:
        export_policy(CausalLM(merged, source=base), tokenizer, target)
    after = probe(load_weights(str(target), kind, LoadSettings(), **changes))
    quantized = record.get("quantization") is not None  # then the adapter was trained on the quantized backbone
    expected = probe(trained(adapter, kind, None, changes)) if quantized else before
    difference, bound = _largest(expected, after), max(1e-2 * float(before.std()), 1e-3)
    if difference > bound:
        shutil.rmtree(target)
        raise ModelError(
            "merge-differs",
            f"merged into {target}, the adapter gives logits that differ by {difference:.2g} (bound {bound:.2g}) from "
            f"those of the unmerged adapter; use the adapter unmerged, from {adapter}",
        )
    return _largest(before, after)


def _largest(one: "Tensor", other: "Tensor") -> float:
    """Return the largest difference of logits, ignoring the row of an added pad token."""
    return float((one - other[..., : one.shape[-1]]).abs().max())


def trained(adapter: Path, kind: Any, quantization: Any, changes: dict[str, Any]) -> Any:
    """Load the unmerged adapter on its backbone, as it was trained."""
    from peft import PeftModel

    from rlhf_lightning.models.loading import LoadSettings, load_hf_model
    from rlhf_lightning.models.resolving import load_base_of_adapter

    base = load_hf_model(load_base_of_adapter(str(adapter)), kind, LoadSettings(quantization=quantization), **changes)
    return PeftModel.from_pretrained(base, str(adapter))


def probe(model: Any) -> "Tensor":
    """Return a model's logits on a few fixed random token sequences."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (PROBE_TEXTS, PROBE_TOKENS), generator=generator)
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=row.unsqueeze(0)).logits.float() for row in ids])
