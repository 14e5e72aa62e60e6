"""Test tasks of reasoning-gym as rows and as an environment; skipped if the package is missing."""

import json
from pathlib import Path

import pytest
from conftest import refused
from tiny_models import quiet_trainer, save_policy

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.environments import ReasoningGym
from rlhf_lightning.environments.games import may_run_code, reasoning_rows, tasks_of
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.types import Episode

SPEC = "chain_sum?size=5&seed=3&min_terms=2&max_terms=2"


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    tasks_of.cache_clear()
    with refused("missing-package", "rlhf-lightning[gym]"):
        ReasoningGym()
    with refused("missing-package", "rlhf-lightning[gym]"):
        reasoning_rows(f"reasoning_gym:{SPEC}")


@pytest.mark.parametrize(
    ("answer", "refused_"),
    [
        ("exec(chr(105))", True), ("__import__('os').system('true')", True), ("exit()", True), ("(exit)()", True),
        ("[exit][0]()", True), ("x.diff(x)", True), ("sin (open(3))", True), ("().__class__()", True),
        ("sin(x)*exp(-2*x) + C", False), ("(3 + 4) * 2", False), ("['A', 'B']", False), ("_ Q _\n_ _ Q", False),
        ("the answer is 7", False), ("3*(x+1)**2", False), ("a few words (as said)", True),
    ],
)  # fmt: skip
def test_answers_that_may_run_code_are_not_passed_to_verifiers(answer: str, refused_: bool) -> None:
    assert may_run_code(answer) == refused_


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (the extra gym)")

    def test_rows_equal_those_of_the_task(self) -> None:
        import reasoning_gym

        rows = reasoning_rows(f"reasoning_gym:{SPEC}")
        tasks = reasoning_gym.create_dataset("chain_sum", size=5, seed=3, min_terms=2, max_terms=2)
        assert [row["prompt"] for row in rows] == [tasks[index]["question"] for index in range(5)]
        assert [row["index"] for row in rows] == [0, 1, 2, 3, 4] and {row["task"] for row in rows} == {SPEC}
        assert reasoning_rows(f"reasoning_gym:{SPEC}") == rows

    def test_the_verifier_scores_the_last_answer(self) -> None:
        row, environment = reasoning_rows(SPEC)[2], ReasoningGym(instruction="Go.")
        assert environment.reset(row) == f"{row['prompt']}\n\nGo."
        turns = [{"role": "user", "content": "Q"}]
        assert environment.reset({"prompt": turns}) == [{"role": "user", "content": "Q\n\nGo."}]

        def reward(text: str) -> float:
            said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            reply = environment.reply(Episode(row, said, [1], [True], 0, 0, False))
            assert reply.done
            return reply.reward

        right = row["answer"]
        assert reward(right) == reward(f"<answer>1</answer> no, <answer> {right} </answer>") == 1.0
        assert reward("nothing") < 1.0

    def test_invalid_tasks_are_refused(self) -> None:
        with refused("wrong-task", "no_such_task"):
            reasoning_rows("reasoning_gym:no_such_task")
        with refused("wrong-task", "chain_sum"):
            reasoning_rows("reasoning_gym:chain_sum?colour=3")
        with refused("missing-data-column", "task and index"):
            ReasoningGym().reply(
                Episode({"prompt": "Q"}, [{"role": "assistant", "content": "a"}], [1], [True], 0, 0, True)
            )

    def test_a_task_trains_end_to_end(self, tmp_path: Path) -> None:
        folder = save_policy(tmp_path / "policy")
        data = PromptDataModule(
            f"reasoning_gym:{SPEC}", batch_size=4, samples_per_prompt=2, rollouts=2, environment="ReasoningGym",
            max_turns=1, cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        module = GRPOModule(init_from=folder, scorer="ZeroScorer", max_new_tokens=4)
        quiet_trainer(limit_val_batches=0).fit(module, data)
        assert module.rollouts == 2

    @pytest.mark.parametrize("task", ["leg_counting", "word_sorting", "countdown", "simple_equations", "maze"])
    def test_any_task_works_as_data_and_environment(self, task: str) -> None:
        rows, environment = reasoning_rows(f"{task}?size=3"), ReasoningGym()
        json.dumps(rows)
        for row in rows:
            said = [{"role": "assistant", "content": str(row["answer"])}]
            assert environment.reply(Episode(row, said, [1], [True], 0, 0, True)).reward > 0.9
