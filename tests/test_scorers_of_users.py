"""Scorers, teachers and data as users write them, in files of their own: each trains, its values are checked."""

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused
from lightning.pytorch.callbacks import ModelCheckpoint
from scoring.judges.chat_server import place, said, serving
from tiny_folders import one_thread, policy_folder
from tiny_models import (
    CHAT_TEMPLATE,
    SPECIAL,
    VOCABULARY,
    MetricsLog,
    assert_same,
    demonstration_step,
    fit,
    gradients_of_step,
    quiet_trainer,
    random_rows,
    save_policy,
    weights_of,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.scoring import load_scorer
from rlhf_lightning.scoring.scorer import MissingColumnError
from rlhf_lightning.types import Rollout

__all__ = ["one_thread", "policy_folder"]

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"
FILES = ["rubric_judge", "context_distillation", "success_curriculum"]


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


class Rollouts(pl.Callback):
    """Keeps every training rollout."""

    def __init__(self) -> None:
        self.kept: list[Rollout] = []

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Rollout, means: Any) -> None:
        self.kept.append(rollout)


def train(folder: str, tmp_path: Path, rows: list[dict[str, Any]], scorer: Any, rollouts: int = 2) -> Any:
    """Fit GRPO on rows of a file; return its rollouts and the metrics of each."""
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


# -- a judge with rubrics ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge_folder(policy_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A judge whose vocabulary has the words of a rubric and both letters."""
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
    """p(A) / (p(A) + p(B)) of the whole forward after the question, with the answer begun."""
    text = (
        f"Human: {prompt}\n\nAssistant: {completion}\n\nCriterion: {criterion}\n\n(A) The last answer meets the "
        "criterion.\n\n(B) It does not.\n\nName the right verdict by its letter alone: (A) or (B)."
    )
    ids = tokenizer(f"<|bos|><|user|>{text}<|assistant|>The right verdict is (", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float(logits[[6, 7]].softmax(-1)[0])


def test_a_local_judge_scores_by_each_rows_rubric(policy_folder: str, judge_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{20 + n} w9", "rubric": rubric} for n, rubric in enumerate(RUBRICS)]
    spec = {"class_path": "rubric_judge.RubricScorer", "init_args": {"judge": judge_folder}}
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


def test_a_judge_behind_a_server_scores_by_each_rows_rubric(policy_folder: str, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        """Kind completions have an even number of words, short ones at most two."""
        text = body["messages"][-1]["content"]
        completion = text.split("Assistant:")[1].split("Criterion:")[0].split()
        met = len(completion) % 2 == 0 if "Criterion: kind" in text else len(completion) <= 2
        return said("A", [place("A", -0.1, A=math.log(0.8 if met else 0.2), B=math.log(0.2 if met else 0.8))])

    rows = [{"prompt": f"w{20 + n} w9", "rubric": rubric} for n, rubric in enumerate(RUBRICS[:3])]
    rows.append({"prompt": "w30", "rubric": RUBRICS[1]})
    with serving(reply) as server:
        arguments = {"judge": server.url, "judge_args": {"model": "m"}}
        spec = {"class_path": "rubric_judge.RubricScorer", "init_args": arguments}
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


def test_a_completion_without_a_verdict_cannot_be_judged() -> None:
    with serving(lambda body: said("Well.")) as server:
        arguments = {"judge": server.url, "judge_args": {"model": "m", "read": "text"}}
        scorer = load_scorer({"class_path": "rubric_judge.RubricScorer", "init_args": arguments})
        assert [one.score for one in scorer(["Hi"], ["Go."], rubric=["kind"])] == [None]
        with pytest.raises(MissingColumnError, match="rubric"):
            scorer(["Hi"], ["Go."])


# -- context distillation ---------------------------------------------------------------------------------------------

CONTEXT = "w40 w41 w42"


def instructed(prompt: Any) -> list[int]:
    """The ids of a prompt with the system turn before it, written by hand: this tokenizer has no token for its role."""
    begin, *rest = prompt
    return [begin, 1, 41, 42, *rest]


def distributions(model: Any, prompt: Any, completion: Any) -> Tensor:
    """Log-probabilities over the vocabulary before each completion token, of one unpadded sequence."""
    logits = model(torch.tensor([[*map(int, prompt), *map(int, completion)]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def context_module(folder: str, **settings: Any) -> Any:
    kind = __import__("context_distillation").ContextDistillationModule
    return kind(init_from=folder, context=CONTEXT, max_new_tokens=6, lr_schedule="constant", warmup=0.0, **settings)


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize(("beta", "on_policy"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_the_student_learns_from_a_teacher_that_reads_the_context(
    policy_folder: str, beta: float, on_policy: float, micro: int | None
) -> None:
    rows = [([2, 4, *prompt, 5], completion) for prompt, completion in random_rows(4, seed=8)]
    module = context_module(policy_folder, beta=beta, on_policy_fraction=on_policy, max_grad_norm=None)
    load, draw, learned = module.load_models, module.with_samples, []

    def load_in_double() -> None:
        load()
        module.double()
        module.teacher.model.double()

    def with_samples(step: Any) -> Any:
        drawn = draw(step)
        for batch in drawn.micro_batches:
            learned.extend(zip(batch.sequences.prompts, batch.sequences.completions, strict=True))
        return drawn

    module.load_models, module.with_samples = load_in_double, with_samples
    found = gradients_of_step(module, demonstration_step(rows, micro))
    assert bool(learned) == bool(on_policy)
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for prompt, completion in learned or rows:
        student = distributions(model, prompt, completion)
        teacher = distributions(model, instructed(prompt), completion).detach()
        p, q = (student, teacher) if beta else (teacher, student)
        total, tokens = total + (p.exp() * (p - q)).sum(), tokens + len(completion)
    (total / tokens).backward()
    expected = {f"policy.model.{name}": w.grad for name, w in model.named_parameters() if w.grad is not None}
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-11)


def test_the_student_comes_to_answer_as_if_it_had_read_the_context(policy_folder: str) -> None:
    rows = [([2, 4, *prompt, 5], completion) for prompt, completion in random_rows(6, seed=9)]
    log, step = MetricsLog(), demonstration_step(rows)
    fit(context_module(policy_folder, learning_rate=3e-3), [step] * 30, callbacks=[log])
    kl = log.column("distill/kl_reverse")
    assert sum(kl[-5:]) / 5 < 0.7 * kl[0], kl


def test_a_prompt_that_the_context_cannot_stand_before_is_refused(policy_folder: str) -> None:
    with refused("no-place-for-context", "begins"):
        fit(context_module(policy_folder), [demonstration_step([([9, 10], [11, 3])])])


# -- a curriculum -----------------------------------------------------------------------------------------------------


def solved(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
    """The kind of a prompt says whether it is always, never or sometimes solved; a few completions are not judged."""
    by_text = [sum(map(ord, text)) for text in completions]
    chance = {"always": lambda n: 1.0, "never": lambda n: 0.0, "sometimes": lambda n: None if n % 7 == 0 else n % 2}
    return [chance[kind](n) for kind, n in zip(columns["kind"], by_text, strict=True)]


KINDS = ["always", "never", "never", "sometimes"] * 4


def curriculum(
    folder: str, tmp_path: Path, rollouts: int, resume: str | None = None, callbacks: Any = (), **trainer: Any
) -> Any:
    """Return the rollouts, the weights and the DataModule of a run."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"w{20 + n} w9", "kind": kind}) + "\n" for n, kind in enumerate(KINDS)]
    file.write_text("".join(lines))
    kind = __import__("success_curriculum").SuccessCurriculum
    data = kind(
        str(file), decay=0.25, floor=0.02, batch_size=16, samples_per_prompt=4, rollouts=rollouts,
        cache_dir=str(tmp_path / "cache"), seed=3,
    )  # fmt: skip
    kept = Rollouts()
    module = GRPOModule(
        scorer=solved, init_from=folder, learning_rate=1e-3, lr_schedule="constant", max_new_tokens=4, kl_coef=0.0
    )
    trained = quiet_trainer(callbacks=[kept, *callbacks], limit_val_batches=0, **trainer)
    trained.fit(module, data, ckpt_path=resume)
    return kept.kept, weights_of(module), data


def test_prompts_that_are_sometimes_solved_are_sampled_more(policy_folder: str, tmp_path: Path) -> None:
    rollouts, _, data = curriculum(policy_folder, tmp_path, 40)
    rates = [0.5] * len(KINDS)
    for rollout in rollouts:
        judged = [(row, s) for row, s in zip(rollout.row_ids, rollout.scores.tolist(), strict=True) if s == s]
        for row in {row for row, _ in judged}:
            own = [score for other, score in judged if other == row]
            rates[row] = 0.25 * rates[row] + 0.75 * sum(own) / len(own)
    assert [data.rates.get(row, 0.5) for row in range(len(KINDS))] == pytest.approx(rates, abs=1e-6)
    taken = [KINDS[row] for rollout in rollouts[10:] for row in rollout.row_ids[::4]]
    assert len(taken) == 30 * 4
    assert taken.count("sometimes") > 0.5 * len(taken), "a quarter of the prompts"
    assert all(kind in taken for kind in KINDS), "no prompt is given up"


def test_the_choice_is_proportional_to_learnability(policy_folder: str, tmp_path: Path) -> None:
    _, _, data = curriculum(policy_folder, tmp_path, 1)
    data.rates = {row: row / 15 for row in range(16)}
    weights = [row / 15 * (1 - row / 15) + 0.02 for row in range(16)]
    drawn = [int(data.choose_rows(n, 1)[0]) for n in range(4000)]
    for row, weight in enumerate(weights):
        expected = weight / sum(weights)
        assert drawn.count(row) / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000)), row


def test_a_resumed_curriculum_goes_on_bit_for_bit(policy_folder: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole, weights, data = curriculum(policy_folder, tmp_path, 8, callbacks=[saves], enable_checkpointing=True)
    rest, resumed, again = curriculum(policy_folder, tmp_path, 8, resume=str(tmp_path / "step=5.ckpt"))
    assert len(rest) == 3
    assert [rollout.row_ids for rollout in rest] == [rollout.row_ids for rollout in whole[5:]]
    assert_same(resumed, weights, rtol=0, atol=0)
    assert again.rates == data.rates


# -- how much a user writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_users_write_little_and_use_public_names_alone(file: str) -> None:
    tree = ast.parse((USERS / f"{file}.py").read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in names if name.startswith("_") and name not in ("__init__", "__call__", "_replace")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    own = [line for line in ast.unparse(tree).splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(own) <= 40, len(own)
