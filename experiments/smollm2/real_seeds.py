"""Run the real run over several seeds, and judge it with a second reward model trained on other rows.

    python experiments/smollm2/real_seeds.py --model SmolLM2.gguf --data ../shared/data [--seeds 0 1 2] [--smoke]

Each seed runs real.py. Then a judge is trained from its SFT policy, on pairs that no other stage uses. The judge scores
answers of the SFT, DPO and PPO policies to held-out prompts. The same command resumes: finished seeds, judges and
scores are kept. Writes report.json and the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import real  # noqa: E402 - found through the line above
import real_stages  # noqa: E402

from rlhf_lightning.evaluation.differences import mean_interval  # noqa: E402
from rlhf_lightning.evaluation.policies import mean_with_interval, sample_and_score  # noqa: E402
from rlhf_lightning.evaluation.report import interval, markdown_table, rewrite_markdown, write_json  # noqa: E402

POLICIES = ("sft", "dpo", "ppo")
JUDGE_ROWS = {"truthful": 180, "harmless": 180}
PROMPTS = {"truthful": "truthful_test", "harmless": "harmless_test"}


def judge_rows(data: Path, budget: real_stages.Budget, rows: dict[str, int]) -> list[dict[str, Any]]:
    """Return pairs that no stage trains on, and whose prompts are not used to judge a policy."""
    held_out = real_stages.read_rows(data / real_stages.FILES["truthful"])[-budget.reward_eval_rows :]
    asked = [row["prompt"] for row in held_out[: budget.ppo_eval_rows]]
    others = [row for row in held_out if row["prompt"] not in asked]
    harmless = real_stages.first_short(
        real_stages.read_rows(data / real_stages.FILES["harmless"]),
        budget.dpo_rows + rows["harmless"],
        budget.dpo_characters,
    )
    return [*others[: rows["truthful"]], *harmless[budget.dpo_rows :]]


def run_seed(arguments: argparse.Namespace, seed: int) -> Path:
    """Run real.py for a seed if its report does not exist, and return its folder."""
    folder = arguments.out / f"seed_{seed}"
    if not (folder / "report.json").is_file():
        command = [sys.executable, str(HERE / "real.py"), "--model", arguments.model, "--data", str(arguments.data)]
        command += ["--out", str(folder), "--seed", str(seed), *(["--smoke"] if arguments.smoke else [])]
        done = subprocess.run(command, check=False)  # status 1: the run is complete, but misses a check
        if not (folder / "report.json").is_file():
            raise SystemExit(f"seed {seed} did not finish (exit status {done.returncode})")
    return folder


def train_judge(arguments: argparse.Namespace, folder: Path, seed: int, budget: real_stages.Budget) -> Path:
    """Train the judge of a seed if it does not exist, and return its folder."""
    model = folder / "judge" / "version_0" / "model"
    if not model.is_dir():
        from rlhf_lightning.loading import cache_folder

        source = cache_folder() / "real" / "judge.jsonl"  # contains offensive prompts, so it is kept out of reports
        rows = {name: 16 for name in JUDGE_ROWS} if arguments.smoke else JUDGE_ROWS
        found = judge_rows(arguments.data, budget, rows)
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        flags = {
            "config": "recipe:reward", "seed_everything": 1000 + seed, "runs_folder": folder, "run_name": "judge",
            "model.init_from": folder / "sft/version_0/model", "data.source": source, "data.eval_rows": 0,
            "data.batch_size": budget.batch_size, "trainer.max_epochs": budget.reward_epochs, "samples.prompts": 0,
            "trainer.accelerator": "cpu",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "rlhf_lightning",
            "fit",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        subprocess.run(command, check=True)
    return model


def judged(arguments: argparse.Namespace, folder: Path, seed: int, budget: real_stages.Budget) -> dict[str, Any]:
    """Return the judge's scores of each policy's answers by set of prompts; cached in a file."""
    kept = folder / "judged.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    from rlhf_lightning.loading import cache_folder
    from rlhf_lightning.models.loading import LoadSettings
    from rlhf_lightning.models.roles import load_policy
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.scoring import load_scorer
    from rlhf_lightning.tokenization import load_tokenizer

    judge = load_scorer(str(train_judge(arguments, folder, seed, budget)))
    found: dict[str, Any] = {}
    for name, stem in PROMPTS.items():
        place = cache_folder() / "real" if name == "harmless" else folder / "data"
        prompts = [row["prompt"] for row in real_stages.read_rows(place / f"{stem}.jsonl")][: budget.ppo_eval_rows]
        for policy in POLICIES:
            path = str(folder / policy / "version_0" / "model")
            samples = sample_and_score(
                load_policy(path, LoadSettings()).eval(), load_tokenizer(path), prompts,
                SamplingSettings(budget.max_new_tokens, 1.0), seed, scorer=judge,
            )  # fmt: skip
            assert samples.scores is not None
            found.setdefault(name, {})[policy] = samples.scores.tolist()
    write_json(kept, found)
    return found


def page(found: dict[int, dict[str, Any]], smoke: bool) -> str:
    """Return the page: the judge's mean score by prompts and policy, and the difference from SFT by seed."""
    import torch

    rows = []
    for name in PROMPTS:
        for policy in POLICIES:
            gaps, cells = [], []
            for scores in found.values():
                gap = torch.tensor(scores[name][policy]) - torch.tensor(scores[name]["sft"])
                gaps.append(float(gap.mean()))
                cells.append(f"{gaps[-1]:.3f} {interval(mean_with_interval(gap)['ci'])}")
            mean, *ends = mean_interval(gaps)
            level = sum(sum(s[name][policy]) / len(s[name][policy]) for s in found.values()) / len(found)
            rows.append([name, policy, level, *cells, f"{mean:.3f} {interval(ends)}" if len(gaps) > 1 else ""])
    header = ["prompts", "policy", "score", *(f"seed {seed}, minus sft" for seed in found), "over seeds"]
    note = "**Shortened run (`--smoke`): it shows that the steps work, not what they gain.**\n\n" if smoke else ""
    return (
        "# SmolLM2 on human data, over seeds\n\n"
        f"{note}`make real-seeds` writes this page: SFT, reward model, DPO and PPO of SmolLM2-135M-Instruct for each "
        "seed (real.py), judged by a second reward model. The judge starts from the same SFT policy, and was trained "
        "on TruthfulQA and harmlessness pairs that no other stage trained on, with other prompts than those answered "
        "here. DPO learns harmlessness, PPO truthfulness. "
        "Intervals of a seed resample prompts; those over seeds are Student's.\n\n"
        f"{markdown_table(header, rows)}\n"
    )


def main() -> int:
    """Run everything that is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=real.MODEL)
    parser.add_argument("--data", type=Path, required=True, help="folder of the human data")
    parser.add_argument("--out", type=Path, default=Path("runs/real_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--page", type=Path, help="default: report.md in the folder of --out")
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: shows that it runs, not that it learns")
    arguments = parser.parse_args()
    budget = real_stages.SMOKE if arguments.smoke else real_stages.FULL
    found = {seed: judged(arguments, run_seed(arguments, seed), seed, budget) for seed in arguments.seeds}
    write_json(arguments.out / "report.json", {str(seed): scores for seed, scores in found.items()})
    print(rewrite_markdown(arguments.page or arguments.out / "report.md", page(found, arguments.smoke)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
