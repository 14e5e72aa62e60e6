"""Run Constitutional AI end to end in a world with known harmlessness and helpfulness, and in small on a real model.

    make constitution
    python experiments/constitution/run.py [--seed 0] [--out runs/constitution] [--model SmolLM2.gguf --data DIR]

The hazard world starts from a helpful model that gives in to risky requests. The model criticises and revises its own
answers and imitates the revisions (SL-CAI). A judge of known quality labels pairs of its answers to risky requests;
these labels are mixed with people's comparisons of helpfulness. A reward model is trained on both, followed by PPO
(RL-CAI). With --model, `smollm2.py` runs too. Measurements are stored in the out folder, and the page in this folder is
written from them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page import page  # in this folder
from smollm2 import smollm2  # in this folder

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands import train
from rlhf_lightning.commands.quickstart import fresh_folder
from rlhf_lightning.evaluation.policies import sample_and_score
from rlhf_lightning.evaluation.report import write_json, write_markdown
from rlhf_lightning.functional.statistics import bootstrap_interval
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.types import Prompt
from rlhf_lightning.worlds.hazards import harmlessness, helpfulness, write_hazards

HERE = Path(__file__).resolve().parent
JUDGE = {"gold_reward": "rlhf_lightning.worlds.hazards.harmlessness", "scale": 4.0, "position_bias": 1.0, "noise": 1.0}
"""Judge that is right about nearly all pairs with a harmlessness difference of 1, and about a share Phi(2) of those
with a difference of 1/2. Its position bias adds log-odds of 1 to the first answer.
"""


class Sizes(NamedTuple):
    """Sizes of the experiment.

    Attributes:
        world: arguments of `write_hazards`.
        risky: risky prompts to revise and to label; None takes all.
        repeats: answers per risky prompt.
        rounds: rounds of critique and revision.
        samples: answers to each held-out risky prompt.
        flags: additional flags of each stage, by its name.
    """

    world: dict[str, int] = {}
    risky: int | None = None
    repeats: int = 4
    rounds: int = 4
    samples: int = 4
    flags: dict[str, list[str]] = {}


def main() -> None:
    """Run the requested parts, then write the page from all stored measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/constitution"))
    parser.add_argument("--page", type=Path, default=HERE / "results.md")
    parser.add_argument("--model", type=Path, default=None, help="SmolLM2's .gguf file or folder")
    parser.add_argument("--data", type=Path, default=None, help="folder of the human data")
    parser.add_argument("--only", choices=("hazards", "smollm2"), default=None)
    arguments = parser.parse_args()
    if arguments.only != "smollm2":
        folder = fresh_folder(arguments.out / "hazards")
        write_json(arguments.out / "hazards.json", hazards(folder, arguments.seed, Sizes()))
    if arguments.model is not None and arguments.data is not None and arguments.only != "hazards":
        report = smollm2(str(arguments.model), arguments.data, arguments.out / "smollm2", arguments.seed)
        write_json(arguments.out / "smollm2.json", report)
    measured = {name: _read(arguments.out / f"{name}.json") for name in ("hazards", "smollm2")}
    write_markdown(arguments.page, page(measured["hazards"], measured["smollm2"]))
    print(f"wrote {arguments.page}")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def hazards(out: Path, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Run all stages in the hazard world; return the figures of each policy and of the judge."""
    started, world = time.perf_counter(), out / "world"
    write_hazards(world, seed, **sizes.world)
    risky = _repeated(world / "risky_train.jsonl", out / "risky.jsonl", sizes)
    stage = _stages(out, seed, sizes)
    demonstrations = [f"{world}/{name}.jsonl" for name in ("demonstrations", "risky_demonstrations", "dialogues")]
    models = {"sft": stage("sft", world / "model", demonstrations)}
    revisions, labels = out / "revisions.jsonl", out / "labels.jsonl"
    rules = str(world / "constitution.yaml")
    _rlhf(
        "critique", model=models["sft"], prompts=risky, constitution=rules, out=revisions, rounds=sizes.rounds,
        max_new_tokens=36, batch_size=64, seed=seed,
    )  # fmt: skip
    mixed = [str(revisions), {"path": demonstrations[0], "weight": 0.5}]
    models["sl_cai"] = stage("sl_cai", models["sft"], mixed)
    _rlhf(
        "label", judge="SimulatedJudge", judge_args=json.dumps(JUDGE | {"seed": seed}), prompts=risky,
        model=models["sl_cai"], constitution=rules, principles=2, average="logit", out=labels, max_new_tokens=48,
        batch_size=64, seed=seed,
    )  # fmt: skip
    reward = stage("reward", models["sl_cai"], [str(labels), f"{world}/pairs_train.jsonl"], f"{world}/pairs_test.jsonl")
    prompts = [f"{world}/prompts_train.jsonl", {"path": f"{world}/risky_train.jsonl", "weight": 2}]
    models["rl_cai"] = stage("ppo", models["sl_cai"], prompts, f"{world}/prompts_test.jsonl", scorer=reward)
    return {
        "seed": seed,
        "policies": measured(models, world, seed, sizes.samples),
        "revisions": _read(revisions.with_suffix(".report.json")),
        "judge": _read(labels.with_suffix(".report.json")),
        "judge_arguments": JUDGE,
        "seconds": round(time.perf_counter() - started),
    }


def _repeated(path: Path, target: Path, sizes: Sizes) -> Path:
    """Write the prompts several times; each copy is answered anew."""
    lines = path.read_text(encoding="utf-8").splitlines()[: sizes.risky]
    target.write_text("\n".join(lines * sizes.repeats) + "\n", encoding="utf-8")
    return target


def _stages(out: Path, seed: int, sizes: Sizes) -> Callable[..., str]:
    """Return a function that trains a stage through `rlhf fit` and its YAML file and returns its model folder."""

    def stage(name: str, start: Any, source: list[Any], eval_source: str | None = None, scorer: str = "") -> str:
        print(f"\nconstitution: rlhf fit --config recipe:hazards/{name}", flush=True)
        flags = ["--seed_everything", str(seed), "--model.seed", str(seed), "--data.seed", str(seed)]
        flags += ["--runs_folder", str(out), "--run_name", name, "--model.init_from", str(start)]
        flags += ["--data.source", json.dumps(source)]
        flags += ["--data.eval_source", eval_source] if eval_source else []
        flags += ["--model.scorer", scorer] if scorer else []
        done = train.run(["fit", "--config", f"recipe:hazards/{name}", *flags, *sizes.flags.get(name, [])])
        return str(Path(done.trainer.log_dir or done.folder or out) / "model")

    return stage


def _rlhf(command: str, **flags: Any) -> None:
    status = rlhf([command, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)


def measured(models: dict[str, str], world: Path, seed: int, samples: int) -> dict[str, Any]:
    """Answer the held-out requests with every policy, using the same random numbers, and score the answers with the
    gold reward.
    """
    found: dict[str, Any] = {}
    reference, first = load_reference(models["sft"]), dict[str, torch.Tensor]()
    for name, folder in models.items():
        policy, tokenizer, values = load_policy(folder), load_tokenizer(folder), {}
        for what, file, gold, each in (
            ("helpfulness", "prompts_test", helpfulness, 1),
            ("harmlessness", "risky_test", harmlessness, samples),
        ):
            prompts = _prompts(world / f"{file}.jsonl")
            drawn = sample_and_score(
                policy, tokenizer, prompts, SamplingSettings(max_new_tokens=48), seed + 1, each, reference, None, gold
            )
            assert drawn.gold is not None and drawn.kl is not None
            gain = drawn.gold - first.setdefault(what, drawn.gold)
            values[what] = _with_interval(drawn.gold, each)
            values[f"{what}_gain"] = _with_interval(gain, each)
            values[f"{what}_kl"] = float(drawn.kl.mean())
            values[f"{what}_length"] = float(drawn.lengths.double().mean())
        found[name] = values
    return found


def _prompts(path: Path) -> list[Prompt]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def _with_interval(values: torch.Tensor, each: int) -> dict[str, Any]:
    """Return the mean with its 95 % interval; the bootstrap resamples answers to one prompt together."""
    clusters = torch.arange(len(values)) // each
    low, high = bootstrap_interval(values.double(), clusters=clusters)
    return {"mean": float(values.double().mean()), "ci": [float(low), float(high)]}


if __name__ == "__main__":
    main()
