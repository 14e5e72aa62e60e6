"""Small multi-turn games, and the tasks of reasoning-gym."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal
from urllib.parse import parse_qsl

from rlhf_lightning.errors import DataError, PackageError, SettingError
from rlhf_lightning.types import Episode, Prompt, Reply

NUMBER = re.compile(r"-?\d+")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MATHS = {"sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "pi", "Abs"}
EVALUATES = re.compile(r"(eval|parse_expr)\((answer|user_answer)")
GYM = "reasoning_gym:"
"""Prefix of a data source that reasoning-gym generates."""


class GuessTheNumber:
    """Guessing game: the policy guesses a number and reads "higher", "lower" or "right".

    After a turn without a number, the reply asks for a number.

    Args:
        most: the number lies in 1 to ``most``.
        column: data column with the secret number.
        reward: "turn" pays 1 for the right guess, and ``step`` for a guess consistent with the earlier replies; "final"
            pays the same sum at the last turn.
        step: reward of a wrong guess that is consistent with the earlier replies.
    """

    def __init__(
        self, most: int = 16, column: str = "secret", reward: Literal["turn", "final"] = "turn", step: float = 0.1
    ) -> None:
        self.most, self.column, self.when, self.step = most, column, reward, step

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the data's prompt, which should explain the rules."""
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        """Return the reply to the policy's last guess."""
        if self.column not in episode.row:
            found = ", ".join(map(str, episode.row))
            raise DataError(
                "missing-data-column", f"GuessTheNumber needs the data column {self.column}; the row has {found}"
            )
        secret = int(episode.row[self.column])
        told = [self._heard(str(turn["content"])) for turn in episode.messages if turn["role"] == "assistant"]
        rewards, low, high = [], 1, self.most
        for guess in told:
            useful = guess is not None and low <= guess <= high
            rewards.append(float(guess == secret) + self.step * useful * (guess != secret))
            if guess is not None and useful:
                low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
        done = told[-1] == secret
        last = done or episode.last
        reward = rewards[-1] if self.when == "turn" else sum(rewards) * last
        if told[-1] is None:
            return Reply(f"answer with a number from 1 to {self.most}", reward=reward)
        return Reply("right" if done else "higher" if told[-1] < secret else "lower", reward=reward, done=done)

    @staticmethod
    def _heard(text: str) -> int | None:
        found = NUMBER.findall(text)
        return int(found[-1][:18]) if found else None


class ReasoningGym:
    """Score the answer to a task of reasoning-gym by the task's own verifier, in one turn.

    The answer is the text in the last ``<answer>...</answer>``, or the whole turn. The data comes from a source such as
    ``reasoning_gym:chain_sum?size=1000&seed=0&max_terms=4``, see `reasoning_rows`. Some verifiers evaluate the answer
    as Python. An answer that calls anything but the usual mathematical functions is not passed to them and scores 0.
    Use `FaultTolerantEnvironment` with ``seconds`` to limit the time of the other answers.

    Args:
        instruction: text appended to each question; null appends nothing.

    Raises:
        PackageError: reasoning-gym is not installed.
    """

    def __init__(self, instruction: str | None = None) -> None:
        _reasoning_gym()
        self.instruction = instruction

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the question as a user turn, or as text if the data has text prompts."""
        prompt = row["prompt"]
        if self.instruction is None:
            return prompt
        if isinstance(prompt, str):
            return f"{prompt}\n\n{self.instruction}"
        return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{self.instruction}"}]

    def reply(self, episode: Episode) -> Reply:
        """Return the verifier's score, in [0, 1]."""
        row = episode.row
        if not {"task", "index"} <= set(row):
            raise DataError(
                "missing-data-column",
                f"ReasoningGym needs the data columns task and index; the row has {', '.join(map(str, row))}: take "
                f"{GYM}TASK as the source",
            )
        tasks, said = tasks_of(str(row["task"])), str(episode.messages[-1]["content"])
        closed = said[: said.rfind("</answer>") + len("</answer>")]  # ignore an answer that is not closed
        answer = (ANSWER.findall(closed) or [said])[-1].strip()
        if may_run_code(answer) and EVALUATES.search(inspect.getsource(inspect.getmodule(type(tasks)))):  # type: ignore[arg-type]
            return Reply(reward=0.0, done=True)
        return Reply(reward=float(tasks.score_answer(answer=answer, entry=tasks[int(row["index"])])), done=True)


def may_run_code(answer: str) -> bool:
    """Whether an answer, evaluated as Python, could call anything other than a mathematical function."""
    calls = "(" in answer and re.search(r"[\w)\]\"'`]\s*\(", answer) is not None
    names = set(re.findall(r"[^\W\d]\w+", answer))
    return calls and bool(names - MATHS or re.search(r"[^\W\d]\s*\.|[\"'`\[{:]", answer))


def reasoning_rows(source: str) -> list[dict[str, Any]]:
    """Return the rows of a source ``reasoning_gym:TASK?size=N&seed=S&SETTING=VALUE``: question, answer, task, index.

    Raises:
        PackageError: reasoning-gym is not installed.
        SettingError: the task is unknown, or it refuses its settings.
    """
    spec = source.removeprefix(GYM)
    tasks = tasks_of(spec)
    return [
        {"prompt": one["question"], "answer": one["answer"], "task": spec, "index": index}
        for index, one in enumerate(tasks[place] for place in range(len(tasks)))
    ]


@cache
def tasks_of(spec: str) -> Any:
    """Return reasoning-gym's data set for ``TASK?SETTING=VALUE&...``; the same text gives the same tasks."""
    name, _, settings = spec.partition("?")
    given: dict[str, Any] = {"size": 1000, "seed": 0}
    for key, value in parse_qsl(settings):
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    gym = _reasoning_gym()
    try:
        return gym.create_dataset(name, **given)
    except (ValueError, TypeError, AssertionError) as error:
        raise SettingError("wrong-task", f"reasoning-gym makes no {spec!r}: {error}") from error


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise PackageError(
            "missing-package", f"this needs reasoning-gym ({error}): pip install 'rlhf-lightning[gym]'"
        ) from error
    return reasoning_gym
