"""Load environments, and continue a run if an environment raises, hangs or dies."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.errors import RlhfError, check_choice, check_range
from rlhf_lightning.loading import load, shipped_classes
from rlhf_lightning.types import Environment, Episode, MultiTurn, Prompt, Reply
from rlhf_lightning.workers import Outcome, Threads, WorkerPool, with_retries


def load_environment(spec: Any) -> Environment:
    """Return the environment that ``spec`` describes; any spec of `loading.load` works.

    Raises:
        SettingError: see `loading.load`.
    """
    return load(spec, Environment, shipped_classes("rlhf_lightning.environments", Environment), "environment")


def conversing(spec: Any, max_turns: int = 8, max_tokens: int | None = None) -> MultiTurn:
    """Return an environment with the limits of its episodes.

    Raises:
        SettingError: a limit is below 1, or see `load_environment`.
    """
    limits = {"max_turns": max_turns, "max_episode_tokens": max_tokens}
    check_range(all(limit is None or limit >= 1 for limit in limits.values()), "each must be at least 1", **limits)
    return MultiTurn(load_environment(spec), max_turns, max_tokens)


def fingerprint_of(environment: Environment) -> str:
    """Return a hash of all that determines an environment's first prompts: class, file, plain settings, tools."""
    kind = type(environment)
    source = ""
    with suppress(OSError, TypeError):
        source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    opening: Any = None
    with suppress(Exception):  # reset may need columns, or change with its state
        opening = environment.reset({"prompt": [{"role": "user", "content": ""}]})
    settings = {name: value for name, value in vars(environment).items() if _is_plain(value)}
    said = json.dumps([kind.__qualname__, source, opening, settings], sort_keys=True, default=str)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | dict | None)


class EnvironmentFailedError(RlhfError, RuntimeError):
    """An environment has given no reply after all attempts."""


class FaultTolerantEnvironment:
    """Wrap an environment and retry its faults; after the last attempt the run ends or the episode is dropped.

    A fault is an exception, a process that dies, a timeout, or a return value that is not a valid `Reply`. A dropped
    episode has no score, so it is not trained on; ``rollout/score_missing`` counts it.

    With ``seconds`` each reply comes from another process, which is killed at the time limit; the environment must be
    importable there, and its state must be in the episode. Without ``seconds``, replies come from ``threads`` threads;
    a single thread calls the environment in order. A `SlotEngine` decodes other episodes in the meantime.

    Args:
        environment: a spec for `load_environment`.
        on_fault: "raise" ends the run with the environment's own message; "drop" drops the episode.
        retries: further attempts for an episode without a reply.
        wait: wait before the first retry, seconds; doubles each time.
        seconds: time limit of one reply, without the start of its process; null sets none.
        workers: number of processes, with ``seconds``.
        threads: number of concurrent replies, without ``seconds``.
        most_in_a_row: with "drop", number of consecutive faults that ends the run, since the environment has failed.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        environment: Any,
        on_fault: Literal["raise", "drop"] = "raise",
        retries: int = 0,
        wait: float = 1.0,
        seconds: float | None = None,
        workers: int = 2,
        threads: int = 1,
        most_in_a_row: int = 256,
    ) -> None:
        check_choice(("raise", "drop"), on_fault=on_fault)
        given = {"seconds": seconds, "workers": workers, "threads": threads, "most_in_a_row": most_in_a_row}
        check_range(all(value is None or value > 0 for value in given.values()), "each must be positive", **given)
        check_range(min(retries, wait) >= 0, "each must be at least 0", retries=retries, wait=wait)
        self.environment = load_environment(environment)
        self.on_fault, self.retries, self.wait, self.most_in_a_row = on_fault, retries, wait, most_in_a_row
        self._asker, self._threads = Threads(1), Threads(threads)
        self._pool = None if seconds is None else WorkerPool(replier, environment, seconds, workers)
        self._in_a_row = 0

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the environment's first prompt."""
        return self.environment.reset(row)

    def reply(self, episode: Episode) -> Reply | None:
        """Return the reply to one episode; None drops it."""
        return self.reply_all([episode])[0]

    def reply_all(self, episodes: Sequence[Episode]) -> list[Reply | None]:
        """Return a reply to each episode; None drops it.

        Raises:
            EnvironmentFailedError: an episode has no reply and ``on_fault`` is "raise", or too many faults in a row.
        """
        return self.start_replies(episodes).result()

    def start_replies(self, episodes: Sequence[Episode]) -> Future[list[Reply | None]]:
        """Begin to reply, after all episodes of earlier calls; return the future of what `reply_all` returns."""
        return self._asker.submit(partial(self._replies, episodes))

    def _replies(self, episodes: Sequence[Episode]) -> list[Reply | None]:
        outcomes, _ = with_retries(self._attempt, episodes, self.retries, self.wait)
        return [self._checked(episode, *outcome) for episode, outcome in zip(episodes, outcomes, strict=True)]

    def _attempt(self, episodes: Sequence[Episode]) -> list[Outcome]:
        if self._pool is not None:
            return self._pool.outcomes(episodes)
        answer = _replier(self.environment)
        pending = [self._threads.submit(partial(answer, episode)) for episode in episodes]
        return [outcome.result() for outcome in pending]

    def _checked(self, episode: Episode, kind: str, value: Any) -> Reply | None:
        self._in_a_row = 0 if kind == "done" else self._in_a_row + 1
        if kind == "done":
            return value
        name = type(self.environment).__name__
        if self.on_fault == "raise":
            raise EnvironmentFailedError(
                "no-reply",
                f"{name} did not reply in episode {episode.number}, turn {episode.turn}: {value}; on_fault: drop "
                "continues without the episode",
            )
        if self._in_a_row >= self.most_in_a_row:
            raise EnvironmentFailedError(
                "environment-keeps-failing",
                f"{name} did not reply {self._in_a_row} times in a row, the last because: {value}; repair the "
                "environment, and resume the run",
            )
        return None

    def close(self) -> None:
        """End the processes; the next reply starts new ones."""
        if self._pool is not None:
            self._pool.close()


def replier(spec: Any) -> Callable[[Episode], Outcome]:
    """Return a function that replies to one episode, for use in a worker process."""
    return _replier(load_environment(spec))


def _replier(environment: Environment) -> Callable[[Episode], Outcome]:
    def answer(episode: Episode) -> Outcome:
        try:
            reply = environment.reply(episode)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's class may raise anything
            return "failed", f"{type(error).__name__}: {error}"
        if not isinstance(reply, Reply):
            return "failed", f"it returned {reply!r:.200}"
        return ("failed", f"it {reply.fault}") if reply.fault else ("done", reply)

    return answer
