"""Judges of single completions: rubrics by row or by file, a second judge, and win rates against references."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from test_scorers_of_users import Rollouts
from tiny_folders import one_thread, policy_folder
from tiny_models import CHAT_TEMPLATE, SPECIAL, VOCABULARY, MetricsLog, quiet_trainer, save_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.scoring import RubricScorer, WinRateScorer, load_scorer
from rlhf_lightning.scoring.judges.judge import JudgeAnswer, SimulatedJudge
from rlhf_lightning.scoring.scorer import learning
from scoring.judges.chat_server import place, said, serving

__all__ = ["one_thread", "policy_folder"]


def train(folder: str, tmp_path: Path, rows: list[dict[str, Any]], scorer: Any, rollouts: int = 2) -> Any:
    """Fit GRPO on rows of a file; return its rollouts and their metrics."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptDataModule(
        str(file), batch_size=12, samples_per_prompt=3, rollouts=rollouts, cache_dir=str(tmp_path / "cache")
    )
    kept, log = Rollouts(), MetricsLog()
    module = GRPOModule(
        scorer=scorer, init_from=folder, learning_rate=6e-3, lr_schedule="constant", max_new_tokens=4, kl_coef=0.0
    )
    quiet_trainer(callbacks=[kept, log], limit_val_batches=0).fit(module, data)
    return kept.kept, log.rows


@pytest.fixture(scope="module")
def judge_folder(policy_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A judge whose vocabulary contains the words of a rubric and both letters."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    save_policy(folder, seed=3, max_position_embeddings=512)
    words = [*SPECIAL, "A", "B", "short", "kind", *(f"w{n}" for n in range(10, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<|pad|>", "unk_token": "<|unk|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE, **names,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


RUBRICS = ["kind", [{"criterion": "short", "weight": 3.0}, {"criterion": "kind"}], "short", "kind short"]


def probability_met(model: Any, tokenizer: Any, prompt: str, completion: str, criterion: str) -> float:
    """Return p(A) / (p(A) + p(B)) of the full forward pass after the question and the start of the answer."""
    text = (
        f"Human: {prompt}\n\nAssistant: {completion}\n\nCriterion: {criterion}\n\n(A) The last answer meets the "
        "criterion.\n\n(B) It does not.\n\nName the right verdict by its letter alone: (A) or (B)."
    )
    ids = tokenizer(f"<|bos|><|user|>{text}<|assistant|>The right verdict is (", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float(logits[[6, 7]].softmax(-1)[0])


def test_a_local_judge_scores_with_each_rows_rubric(policy_folder: str, judge_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{20 + n} w9", "rubric": rubric} for n, rubric in enumerate(RUBRICS)]
    spec = {"class_path": "RubricScorer", "init_args": {"judge": judge_folder}}
    rollouts, logged = train(policy_folder, tmp_path, rows, spec)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(judge_folder), AutoTokenizer.from_pretrained(judge_folder)
    for rollout in rollouts:
        for row, text, score in zip(rollout.row_ids, rollout.texts, rollout.scores.tolist(), strict=True):
            met = {one: probability_met(model, tokenizer, rows[row]["prompt"], text, one) for one in
                   ("kind", "short", "kind short")}  # fmt: skip
            both = (3.0 * met["short"] + met["kind"]) / 4.0
            assert score == pytest.approx([met["kind"], both, met["short"], met["kind short"]][row], abs=1e-5)
        assert len(set(rollout.scores.tolist())) > 3
    assert all(math.isfinite(means["train/loss"]) for means in logged)


def test_a_remote_judge_scores_with_each_rows_rubric(policy_folder: str, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        """Answer as a judge: kind completions have an even number of words, short ones at most two."""
        text = body["messages"][-1]["content"]
        completion = text.split("Assistant:")[1].split("Criterion:")[0].split()
        met = len(completion) % 2 == 0 if "Criterion: kind" in text else len(completion) <= 2
        return said("A", [place("A", -0.1, A=math.log(0.8 if met else 0.2), B=math.log(0.2 if met else 0.8))])

    rows = [{"prompt": f"w{20 + n} w9", "rubric": rubric} for n, rubric in enumerate(RUBRICS[:3])]
    rows.append({"prompt": "w30", "rubric": RUBRICS[1]})
    with serving(reply) as server:
        arguments = {"judge": server.url, "judge_args": {"model": "m"}}
        spec = {"class_path": "RubricScorer", "init_args": arguments}
        rollouts, _ = train(policy_folder, tmp_path, rows, spec)
    for rollout in rollouts:
        for row, text, score, feedback in zip(
            rollout.row_ids, rollout.texts, rollout.scores.tolist(), rollout.feedback, strict=True
        ):
            kind, short = len(text.split()) % 2 == 0, len(text.split()) <= 2
            p = {"kind": 0.8 if kind else 0.2, "short": 0.8 if short else 0.2}
            both = (3.0 * p["short"] + p["kind"]) / 4.0
            assert score == pytest.approx([p["kind"], both, p["short"], both][row], abs=1e-6)
            missed = [name for name, share in (("short", p["short"]), ("kind", p["kind"])) if share < 0.5]
            asked = [{"kind"}, {"short", "kind"}, {"short"}, {"short", "kind"}][row]
            assert (feedback or "").split() == [name for name in missed if name in asked]


def test_a_completion_without_a_verdict_has_no_score() -> None:
    with serving(lambda body: said("Well.")) as server:
        arguments = {"judge": server.url, "judge_args": {"model": "m", "read": "text"}}
        scorer = load_scorer({"class_path": "RubricScorer", "init_args": arguments})
        assert [one.score for one in scorer(["Hi"], ["Go."], rubric=["kind"])] == [None]
        with refused("missing-data-column", "rubric"):
            scorer(["Hi"], ["Go."])


class Fixed:
    """A judge that gives the same probability of (A) to every question, and counts the questions."""

    def __init__(self, probability: float, name: str = "fixed") -> None:
        self.probability, self.name, self.asked = probability, name, 0

    def __call__(self, questions: Any) -> list[JudgeAnswer]:
        self.asked += len(questions)
        return [JudgeAnswer(math.log(self.probability), math.log(1 - self.probability)) for _ in questions]


def test_a_rubric_file_names_parts_and_negative_criteria(tmp_path: Path) -> None:
    file = tmp_path / "rubric.json"
    criteria = [{"criterion": "kind", "name": "kind"}, {"criterion": "rude", "weight": -3.0, "name": "rude"}, "short"]
    file.write_text(json.dumps(criteria))
    gold = Fixed(0.25, "gold")
    scorer = RubricScorer(Fixed(0.75), criteria=str(file), gold=gold)
    (found,) = scorer(["Hi"], ["Go."])
    assert found.score == pytest.approx((0.75 - 3 * 0.75 + 0.75) / 5)
    assert found.parts["kind"] == pytest.approx(0.75) and found.parts["rude"] == pytest.approx(0.75)
    assert found.parts["gold"] == pytest.approx((0.25 - 3 * 0.25 + 0.25) / 5)
    assert found.feedback == "rude" and gold.asked == 3


class ByCriterion:
    """A judge whose probability of (A) depends on the length of the criterion."""

    name = "length"

    def __call__(self, questions: Any) -> list[JudgeAnswer]:
        self.asked = [one.principle.question for one in questions]
        chances = [len(text) / 100 for text in self.asked]
        return [JudgeAnswer(math.log(chance), math.log(1 - chance)) for chance in chances]


def test_implicit_aggregation_asks_one_question_per_rubric() -> None:
    judge = ByCriterion()
    criteria = [{"criterion": "kind", "weight": 2.0, "name": "kind"}, {"criterion": "rude", "weight": -1}]
    scorer = RubricScorer(judge, criteria=criteria, aggregation="implicit")
    (found,) = scorer(["Hi"], ["Go."])
    (asked,) = judge.asked
    assert asked.splitlines()[1:] == ["- kind (weight 2)", "- avoid: rude (weight 1)"]
    assert found.score == pytest.approx(len(asked) / 100) and not found.parts and found.feedback is None
    with refused("unknown-choice", "aggregation"):
        RubricScorer(judge, aggregation="both")  # type: ignore[arg-type]


def test_criteria_dropout_applies_only_to_training_rollouts() -> None:
    judge, gold = ByCriterion(), Fixed(0.25, "gold")
    criteria = [{"criterion": letter * size, "name": letter} for size, letter in enumerate("abcdef", 10)]
    scorer = RubricScorer(judge, criteria=criteria, gold=gold, dropout=0.5, seed=3)
    prompts, texts = ["Hi", "Hi", "Ho"], ["Go.", "Stay.", "Go."]
    whole = scorer(prompts, texts)
    assert all(len(one.parts) == 7 for one in whole), "six criteria and the second judge"

    def kept() -> list[set[str]]:
        with learning():
            found = scorer(prompts, texts)
        for one in found:
            shares = [value for name, value in one.parts.items() if name != "gold"]
            assert one.score == pytest.approx(sum(shares) / len(shares)) and one.parts["gold"] == pytest.approx(0.25)
        return [set(one.parts) - {"gold"} for one in found]

    first = kept()
    assert first == kept() and first[0] == first[1] != first[2], "by rollout and prompt"
    rollouts = []
    for _ in range(60):
        rollouts.append(kept())
        scorer.on_rollout_end(None, {})  # type: ignore[arg-type]
    assert rollouts[0] == first and any(one != first for one in rollouts)
    assert all(names for one in rollouts for names in one), "a rubric keeps a criterion"
    share = sum(len(names) for one in rollouts for names in (one[0], one[2])) / (2 * 6 * len(rollouts))
    assert share == pytest.approx(0.5, abs=0.1)
    again = RubricScorer(judge, criteria=criteria, gold=gold, dropout=0.5, seed=3)
    again.load_state_dict(scorer.state_dict())
    with learning():
        assert again(prompts, texts) == scorer(prompts, texts)
    with refused("setting-out-of-range", "dropout"):
        RubricScorer(judge, dropout=1.0)


def test_a_judge_reads_tool_calls_and_their_results() -> None:
    class Reads(ByCriterion):
        def __call__(self, questions: Any) -> list[JudgeAnswer]:
            self.read = questions[0].messages[-1]["content"]
            return super().__call__(questions)

    judge = Reads()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    turns = [
        {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]  # fmt: skip
    RubricScorer(judge, criteria=["kind"])([turns], ["It is 3."])
    said = 'Human: 1 + 2?\n\nAssistant: add({"a": 1, "b": 2})\n\nTool: 3\n\nAssistant: It is 3.'
    assert judge.read.startswith(said)


def test_invalid_rubrics_are_refused(tmp_path: Path) -> None:
    for wrong in ([], [{"weight": 1.0}], [{"criterion": "kind", "weight": "high"}], [{"criterion": "a", "weight": 0}]):
        with refused("wrong-rubric"):
            RubricScorer(Fixed(0.5), criteria=wrong)
        with refused("wrong-rubric"):
            RubricScorer(Fixed(0.5))(["Hi"], ["Go."], rubric=[wrong])
    with refused("wrong-rubric", "cannot be read"):
        RubricScorer(Fixed(0.5), criteria=str(tmp_path / "none.json"))


def test_win_rates_average_both_orders() -> None:
    judge = SimulatedJudge(lambda prompt, text: float(len(text)), scale=0.5, position_bias=1.0)
    scorer = WinRateScorer(judge)
    found = scorer(["p", "p"], ["abcd", "ab"], reference=["ab", "ab"])
    sides = [1 / (1 + math.exp(-(0.5 * 2 + 1.0))), 1 / (1 + math.exp(-(-0.5 * 2 + 1.0)))]
    assert found == [pytest.approx((sides[0] + 1 - sides[1]) / 2), pytest.approx(0.5)]
    with refused("missing-data-column", "reference"):
        scorer(["p"], ["a"])
