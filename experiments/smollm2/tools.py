"""Train SmolLM2-135M-Instruct to use a calculator on word problems: SFT on generated traces, then GRPO.

    python experiments/smollm2/tools.py --model SmolLM2.gguf --data ../shared/data [--smoke] [--page tools.md]

SVAMP's training problems are split: 400 for training, 200 held out. A trace calls the calculator with a problem's
equation. Accuracy is measured with greedy decoding on the 200 and on svamp_test, before training, after SFT and after
GRPO, with Wilson's 95 % intervals. The change through GRPO has a paired bootstrap interval. Run again with the same
--out to continue.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _folder in (str(HERE), str(HERE.parents[1])):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import lightning.pytorch as pl  # noqa: E402 - like the next, found through the lines above
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from real import parser as real_parser  # noqa: E402
from real_stages import read_rows  # noqa: E402

from rlhf_lightning.data import PromptDataModule, SFTDataModule  # noqa: E402
from rlhf_lightning.environments import ToolEnvironment  # noqa: E402
from rlhf_lightning.functional.statistics import bootstrap_interval, wilson_interval  # noqa: E402
from rlhf_lightning.models.resolving import resolve_folder  # noqa: E402
from rlhf_lightning.modules import GRPOModule, SFTModule  # noqa: E402
from rlhf_lightning.sampling.engines import SamplingSettings  # noqa: E402
from rlhf_lightning.scoring import MathAnswerScorer  # noqa: E402
from rlhf_lightning.types import MultiTurn  # noqa: E402

FILES = ("svamp_train.jsonl", "svamp_test.jsonl")
TOOLS: dict[str, Any] = {"tools": ["calculator"], "call_format": "plain", "describe": "system"}
TURNS, TURN_TOKENS = 3, 40
SET_ASIDE = 200
BUDGET = {"traces": 320, "train": 400, "test": 100, "rollouts": 40, "prompts": 8, "samples": 8}
SMOKE = {"traces": 16, "train": 16, "test": 4, "rollouts": 2, "prompts": 2, "samples": 4}
LORA = {"r": 16, "alpha": 32}


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything that is missing, and write report.json and the page."""
    arguments = parser().parse_args(argv)
    missing = [name for name in FILES if not (arguments.data / name).is_file()]
    if missing:
        print(f"skipped: this needs {missing[0]}, and {arguments.data} has none; name its folder with --data")
        return 0
    run = Run(arguments)
    folders = {"before": resolve_folder(arguments.model)}
    run.evaluate("before", folders["before"])
    folders["sft"] = run.sft(folders["before"])
    run.evaluate("sft", folders["sft"])
    folders["grpo"] = run.grpo(folders["sft"])
    run.evaluate("grpo", folders["grpo"])
    text = page(run.report, arguments.smoke)
    print(text)
    if arguments.page is not None:
        arguments.page.write_text(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = real_parser()
    result.description = __doc__
    result.set_defaults(out=Path("runs/real-tools"))
    result.add_argument("--minutes", type=float, default=60.0, help="GRPO ends when the whole run has taken this long")
    result.add_argument("--page", type=Path, help="also write the report here")
    return result


class Run:
    """The stages in one folder; finished stages are skipped."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.seed, self.minutes = arguments.out, arguments.seed, arguments.minutes
        self.budget = SMOKE if arguments.smoke else BUDGET
        self.out.mkdir(parents=True, exist_ok=True)
        rows, test = (read_rows(arguments.data / name) for name in FILES)
        count = self.budget["test"]
        self.held_out = {"svamp_test": test[:count], "set aside": rows[-SET_ASIDE:][: 2 * count]}
        self.train = rows[:-SET_ASIDE][: self.budget["train"]]
        self.file = self.out / "report.json"
        self.report: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"seconds": {}}

    def keep(self, name: str, value: Any, started: float) -> None:
        """Save a part of the report, and its duration."""
        self.report[name] = value
        self.report["seconds"][name] = round(time.perf_counter() - started + self.report["seconds"].get(name, 0.0), 1)
        self.file.write_text(json.dumps(self.report, indent=1))
        print(f"{name}: {self.report['seconds'][name]:.0f} s", flush=True)

    def evaluate(self, stage: str, folder: str) -> None:
        """Answer all held-out problems greedily; save which answers are right and how many used the calculator."""
        environment = ToolEnvironment(**TOOLS)
        for name, rows in self.held_out.items():
            key, started = f"{stage}, {name}", time.perf_counter()
            if len(self.report.get(key, {"right": ()})["right"]) == len(rows):  # otherwise it has another budget
                continue
            module = SFTModule(init_from=folder, self_check=False)
            module.configure_model()
            module.eval()
            columns = {"answer": [row["answer"] for row in rows]}
            prompts = [environment.reset(row) for row in rows]
            sampling = SamplingSettings(TURN_TOKENS, 0.0, batch_size=32)
            with torch.no_grad():
                found = module.answer(prompts, sampling, multi_turn=MultiTurn(environment, TURNS), columns=columns)
            right = MathAnswerScorer(last_number=True)(prompts, found.texts, **columns)
            calls = [sum(turn["role"] == "user" for turn in one.messages) for one in found.transcripts]
            wrong = [any("error:" in turn["content"] for turn in one.messages) for one in found.transcripts]
            self.keep(key, {"right": right, "calls": calls, "wrong": wrong, "shown": found.transcripts[0].messages},
                      started)  # fmt: skip

    def sft(self, start: str) -> str:
        """Run SFT on the traces; return the folder."""
        folder, started = self.out / "sft", time.perf_counter()
        if not (folder / "done").exists():
            traces = [trace(row) for row in self.train[: self.budget["traces"]]]
            module = SFTModule(
                init_from=start, learning_rate=5e-4, lora=LORA, lr_schedule="linear", warmup=0.1, seed=self.seed
            )
            data = SFTDataModule(self.file_of("traces", traces), batch_size=16, max_tokens=2048, seed=self.seed)
            self.fit("sft_run", module, data, every=5)
            module.export(folder)
            (folder / "done").touch()
            self.keep("SFT", {"traces": len(traces), "updates": module.updates}, started)
        return str(folder)

    def grpo(self, start: str) -> str:
        """Run GRPO with the calculator; return the folder."""
        folder, started = self.out / "grpo", time.perf_counter()
        if not (folder / "done").exists():
            budget = self.budget
            rows = [{name: row[name] for name in ("prompt", "answer")} for row in self.train]
            module = GRPOModule(
                init_from=start, scorer="MathAnswerScorer", learning_rate=2e-4, lora=LORA, lr_schedule="constant",
                kl_coef=0.0, max_new_tokens=TURN_TOKENS, sampling_batch_size=32, seed=self.seed,
            )  # fmt: skip
            environment = {"class_path": "ToolEnvironment", "init_args": TOOLS}
            data = PromptDataModule(
                self.file_of("prompts", rows), batch_size=budget["prompts"] * budget["samples"],
                samples_per_prompt=budget["samples"], rollouts=budget["rollouts"], max_tokens=2048, seed=self.seed,
                environment=environment, max_turns=TURNS,
            )  # fmt: skip
            spent = self.report["seconds"]
            evaluation = sum(value for name, value in spent.items() if name.startswith("sft, "))  # repeated at the end
            curve = Curve(self.out / "curve.jsonl", 60 * self.minutes - sum(spent.values()) - evaluation)
            self.fit("grpo_run", module, data, every=2, callbacks=[curve])
            module.export(folder)
            (folder / "done").touch()
            self.keep("GRPO", {"rollouts": module.rollouts, "curve": curve.rows()}, started)
        return str(folder)

    def fit(self, name: str, module: Any, data: Any, every: int, callbacks: Sequence[Callback] = ()) -> None:
        """Train for an epoch, from the last checkpoint if there is one."""
        saves = ModelCheckpoint(self.out / name, save_last=True, every_n_train_steps=every, save_top_k=0)
        last = self.out / name / "last.ckpt"
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
            callbacks=[saves, *callbacks],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)

    def file_of(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        """Write rows to a file and return its path."""
        path = self.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


class Curve(Callback):
    """Record the score of each rollout, and stop training at a time limit."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self.started = path, seconds, time.perf_counter()

    def rows(self) -> list[dict[str, float]]:
        """Return the recorded rollouts without duplicates: a resumed run repeats rollouts after its checkpoint."""
        rows = read_rows(self.path) if self.path.exists() else []
        return [*{row["rollout"]: row for row in rows}.values()]

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        """Append the logged metrics."""
        found = {name: float(trainer.callback_metrics[f"rollout/{name}"]) for name in ("score", "turns", "eos_rate")}
        with self.path.open("a") as file:
            file.write(json.dumps({"rollout": module.rollouts, **found}) + "\n")
        print(module.rollouts, found, flush=True)
        if time.perf_counter() - self.started > self.seconds:
            trainer.should_stop = True


def expression(equation: str) -> str:
    """Return an equation of the data in plain notation: ( 51.0 - 44.0 ) becomes 51 - 44."""
    text = re.sub(r"(\d)\.0\b", r"\1", equation.strip()).replace("( ", "(").replace(" )", ")")
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def trace(row: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation in which the calculator computes the row's equation."""
    environment = ToolEnvironment(**TOOLS)
    asked, value = expression(row["equation"]), environment.tools["calculator"](expression(row["equation"]))
    turns = [f'call: calculator(expression="{asked}")', value, f"The answer is {value}."]
    roles = ("assistant", "user", "assistant")
    said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return {"messages": [*environment.reset(row), *said]}


def page(report: dict[str, Any], smoke: bool) -> str:
    """Return the report as Markdown."""
    lines = [
        "# SmolLM2-135M with a calculator",
        "",
        "`make real-tools`: SFT on generated traces, then GRPO, on SVAMP's word problems; greedy answers to held-out",
        "problems, Wilson's 95 % intervals in brackets."
        + (" A shortened run: it shows that it runs." if smoke else ""),
        "",
        "| held-out problems | stage | right | answers that called | calls with an error |",
        "|---|---|---|---|---|",
    ]
    stages = {"before": "before training", "sft": "after SFT", "grpo": "after GRPO"}
    for name in ("svamp_test", "set aside"):
        for stage, words in stages.items():
            found = report[f"{stage}, {name}"]
            count, right = len(found["right"]), sum(found["right"])
            low, high = wilson_interval(right / count, count)
            called, wrong = (sum(map(bool, found[part])) / count for part in ("calls", "wrong"))
            cells = f"{right:.0f} of {count}, {right / count:.2f} [{float(low):.2f}, {float(high):.2f}]"
            lines.append(f"| {name} | {words} | {cells} | {called:.2f} | {wrong:.2f} |")
    both = {
        stage: torch.tensor(
            [value for name in ("svamp_test", "set aside") for value in report[f"{stage}, {name}"]["right"]]
        )
        for stage in stages
    }
    change = (both["grpo"] - both["sft"]).double()
    low, high = (float(end) for end in bootstrap_interval(change))
    verdict = "more" if low > 0 else "fewer" if high < 0 else "no more and no fewer, within the interval,"
    curve = [row["score"] for row in report["GRPO"]["curve"]]
    fifth = max(len(curve) // 5, 1)
    seconds = report["seconds"]
    lines += [
        "",
        f"After GRPO {verdict} problems are right than after SFT: {float(change.mean()):+.3f}",
        f"[{low:+.3f}, {high:+.3f}] of all {len(change)} (paired bootstrap). The mean score of a rollout went from "
        f"{sum(curve[:fifth]) / fifth:.2f} in the first {fifth}",
        f"to {sum(curve[-fifth:]) / fifth:.2f} in the last {fifth} of {len(curve)}.",
        "",
        f"{report['SFT']['traces']} traces, {report['SFT']['updates']} updates of SFT; {len(curve)} rollouts. "
        f"{sum(seconds.values()) / 60:.0f} minutes on {torch.get_num_threads()} threads: "
        + ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
        + ".",
        "",
        "An answer of the trained policy, turn by turn:",
        "",
        *(f"> {turn['role']}: {turn['content']}" for turn in report["grpo, svamp_test"]["shown"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
