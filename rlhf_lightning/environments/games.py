"""Small games in several turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from rlhf_lightning.errors import DataError
from rlhf_lightning.types import Episode, Prompt, Reply

NUMBER = re.compile(r"-?\d+")


class GuessTheNumber:
    """The policy guesses a number and hears "higher", "lower" or "right"; a reply without a number is told so.

    Args:
        most: the number lies in 1 to ``most``.
        column: column of the data that holds the secret number.
        reward: "turn" pays 1 for the right guess, and ``step`` for a guess that lies within what is known; "final"
            pays the same sum at the last turn.
        step: reward of a guess that uses what was heard.
    """

    def __init__(
        self, most: int = 16, column: str = "secret", reward: Literal["turn", "final"] = "turn", step: float = 0.1
    ) -> None:
        self.most, self.column, self.when, self.step = most, column, reward, step

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the data's prompt; write the rules there."""
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        """Return what the policy hears of its last guess."""
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
            return Reply(f"say a number from 1 to {self.most}", reward=reward)
        return Reply("right" if done else "higher" if told[-1] < secret else "lower", reward=reward, done=done)

    @staticmethod
    def _heard(text: str) -> int | None:
        found = NUMBER.findall(text)
        return int(found[-1][:18]) if found else None
