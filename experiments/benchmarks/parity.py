"""Check that SFT, reward model and DPO compute the same as another library: tokens, updates and losses.

    python experiments/benchmarks/parity.py --model MODEL --data PAIRS.jsonl \
        --peer-python PEER/bin/python --peer-script trl_stages.py [--out experiments/benchmarks/parity.md]

Both sides train for a few updates on the same rows in file order, from the same weights, with the same learning rate,
schedule and clipping, in full precision on the CPU. The peer runs its own script in a separate environment; our side
runs `rlhf fit`. Each loss is recorded before its update, so losses from the second one on also compare gradients,
clipping, optimizer and schedule. The tokens that each loss covers are compared one by one.

The peer's script is called as ``SCRIPT STAGE --model DIR --data FILE --steps N --batch N --lr X --max-length N
--rows N --in-order`` and prints one line ``PEER {"loss": [...]}``. SFT learns the chosen completions. The reward models
start from one folder that already has a score head, and whose pad token ends no completion, so that both read the
score at the end token.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from folders import written
from lightning.pytorch import Callback, LightningModule, Trainer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-3
MODULES = {
    "sft": ("SFTModule", "SFTDataModule"),
    "reward": ("RewardModule", "PreferenceDataModule"),
    "dpo": ("DPOModule", "PreferenceDataModule"),
}
Rows = list[dict[str, Any]]


class StepRecorder(Callback):
    """Records the token rows and the logged loss of each training step.

    Args:
        out: JSON file to write when training ends: ``{"loss": [...], "steps": [rows of step 1, ...]}``.
    """

    def __init__(self, out: str) -> None:
        self.out, self.losses, self.steps = Path(out), [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the token ids of every row of the step, and which tokens its loss covers."""
        rows = []
        for sequences in (micro_batch.sequences for micro_batch in batch.micro_batches):
            for parent, completion, seen in zip(
                sequences.parents, sequences.completions, sequences.supervised, strict=True
            ):
                prompt = sequences.prompts[parent].tolist()
                rows.append({"ids": prompt + completion.tolist(), "supervised": [False] * len(prompt) + seen.tolist()})
        self.steps.append(rows)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Record the logged loss."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self.out.write_text(json.dumps({"loss": self.losses, "steps": self.steps}))


def peer_record(stage: str, model: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run the peer's side; return its losses, token rows of each step and settings."""
    out = scratch / f"peer_{stage}.json"
    if out.exists():
        return json.loads(out.read_text())
    batches = scratch / f"peer_{stage}_batches.json"
    command = [args.peer_python, HERE / "peer_batches.py", batches, args.peer_script, stage]
    command += ["--model", model, "--data", args.data, "--steps", args.steps, "--batch", args.batch]
    command += ["--lr", args.learning_rate, "--max-length", args.max_length, "--rows", rows_needed(args), "--in-order"]
    output = completed(command, f"the peer's {stage}")
    line = next((line for line in output.splitlines() if line.startswith("PEER ")), None)
    if line is None:
        raise SystemExit(f"{args.peer_script} printed no line that starts with PEER:\n{output[-2000:]}")
    record = {"loss": json.loads(line.removeprefix("PEER "))["loss"], **json.loads(batches.read_text())}
    out.write_text(json.dumps(record))
    return record


def our_record(stage: str, model: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run `rlhf fit` on the same rows; return losses and token rows of each step."""
    out, data = scratch / f"ours_{stage}.json", args.data
    if out.exists():
        return json.loads(out.read_text())
    if stage == "sft":
        data = scratch / "demonstrations.jsonl"
        rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()[: rows_needed(args)]]
        pairs = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        data.write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
    recorder = {"class_path": "parity.StepRecorder", "init_args": {"out": str(out)}}
    settings = {
        **fit_settings(args),
        "model.init_from": model,
        "data.source": data,
        "trainer.callbacks": json.dumps([recorder]),
        "trainer.enable_checkpointing": "false",
        "samples.prompts": 0,
        "export.enabled": "false",
        "trainer.accelerator": "cpu",
        "runs_folder": scratch / "runs",
    }
    module, datamodule = MODULES[stage]
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "--model", module, "--data", datamodule]
    completed(command + [part for name, value in settings.items() for part in (f"--{name}", value)], f"our {stage}")
    return json.loads(out.read_text())


def fit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags with which `rlhf fit` takes the peer's steps. Defaults that agree on both sides are left out."""
    return {
        "model.learning_rate": args.learning_rate,
        "model.lr_schedule": "linear",
        "model.warmup": 0,
        "model.max_grad_norm": 1.0,
        "model.adam_eps": 1e-8,
        "data.rows": rows_needed(args),
        "data.batch_size": args.batch,
        "data.max_length": args.max_length,
        "data.shuffle": "false",
        "trainer.max_steps": args.steps,
    }


def rows_needed(args: argparse.Namespace) -> int:
    """Return the number of rows that both sides read: enough for all steps even if some rows are
    dropped as too long.
    """
    return 2 * args.steps * args.batch


def completed(command: list[Any], what: str) -> str:
    """Run a command and return its output. An error shows the end of the output."""
    print(f"running {what} ...", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed with exit status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def same_tokens(ours: list[Rows], peers: list[Rows]) -> bool:
    """Return whether every step had the same rows and the same supervised tokens, in any order within the step.

    A reward model reads whole sequences, so for that stage the peer reports no supervised tokens.
    """

    def comparable(rows: Rows, unmasked: bool) -> list[tuple[Any, ...]]:
        return sorted((row["ids"], None if unmasked else row["supervised"]) for row in rows)

    if len(ours) != len(peers):
        return False
    whole = any(row["supervised"] is None for rows in peers for row in rows)
    return all(comparable(a, whole) == comparable(b, whole) for a, b in zip(ours, peers, strict=True))


def report(records: dict[str, tuple[dict, dict]], args: argparse.Namespace) -> tuple[str, bool]:
    """Return the Markdown table, and whether every stage agrees."""
    lines = ["| stage | update | peer | ours | difference |", "|---|---|---|---|---|"]
    notes, agreed = [], True
    for stage, (ours, peers) in records.items():
        gaps = [abs(a - b) for a, b in zip(ours["loss"], peers["loss"], strict=False)]
        for update, (a, b, gap) in enumerate(zip(ours["loss"], peers["loss"], gaps, strict=False), start=1):
            lines.append(f"| {stage} | {update} | {b:.6f} | {a:.6f} | {gap:.1e} |")
        same = same_tokens(ours["steps"], peers["steps"])
        complete = len(ours["loss"]) == len(peers["loss"]) == args.steps
        agreed &= same and complete and all(gap <= TOLERANCE for gap in gaps)
        counts = [len(row["ids"]) for rows in ours["steps"] for row in rows]
        verdict = "the same" if same else "NOT the same"
        notes.append(f"- {stage}: {verdict} tokens on both sides ({len(counts)} sequences, {sum(counts)} tokens)")
    outcome = "All differences are" if agreed else "NOT all differences are"
    return "\n".join([*lines, "", f"{outcome} within {TOLERANCE:g}.", "", *notes, ""]), agreed


def document(table: str, args: argparse.Namespace, peer_version: str) -> str:
    """Return the whole page: what was compared, the method, and the table."""
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers", "lightning"))
    return "\n".join(
        [
            f"# Parity with {peer_version}",
            "",
            f"The first {args.steps} losses of each stage on `{args.data.name}`,",
            f"from {args.model.name}, both sides in full precision on the CPU.",
            f"Batches of {args.batch} rows in file order, at most {args.max_length} tokens; AdamW (betas 0.9, 0.999,",
            f"epsilon 1e-8, no weight decay) at {args.learning_rate:g} falling linearly to 0 in {args.steps} updates,",
            "gradient norm clipped at 1. Each loss is the one before its update, so later rows also compare",
            "gradients, clipping, optimizer and schedule.",
            "",
            "```",
            "python experiments/benchmarks/parity.py --model MODEL --data DATA/" + args.data.name + " \\",
            "    --peer-python PEER/bin/python --peer-script " + args.peer_script.name,
            "```",
            "",
            f"Made with {versions}; the peer runs in an environment of its own.",
            "",
            table,
        ]
    )


def peer_name(args: argparse.Namespace) -> str:
    """Return the name and version of the peer, as installed in its environment."""
    program = "import importlib.metadata as m; print('TRL', m.version('trl'))"
    return completed([args.peer_python, "-c", program], "the peer's version check").strip()


def main() -> int:
    """Compare, print the table and write it. The exit status is 1 if a stage disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="model folder or .gguf file that both sides start from"
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of the peer's environment")
    parser.add_argument("--peer-script", type=Path, required=True, help="the peer's stages as one script")
    parser.add_argument("--stages", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the table")
    parser.add_argument(
        "--records", type=Path, default=None, help="folder that keeps each side; what it has is not rerun"
    )
    args = parser.parse_args()
    for path in (args.model, args.data, args.peer_python, args.peer_script):
        if not path.exists():
            parser.error(f"there is no {path}")

    from rlhf_lightning.models.resolving import resolve_folder

    folder, records = Path(resolve_folder(str(args.model))), {}
    name = peer_name(args)
    with contextlib.ExitStack() as stack:
        scratch = (args.records or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        for stage in args.stages:
            start = written("scored", scratch / "scored", folder) if stage == "reward" else folder
            peers = peer_record(stage, start, args, scratch)
            records[stage] = (our_record(stage, start, args, scratch), peers)
            print(report({stage: records[stage]}, args)[0], flush=True)
    table, agreed = report(records, args)
    if args.out is not None:
        args.out.write_text(document(table, args, name), encoding="utf-8")
    return 0 if agreed else 1


if __name__ == "__main__":
    raise SystemExit(main())
