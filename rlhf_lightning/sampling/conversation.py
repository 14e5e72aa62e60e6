"""Multi-turn episodes: requests to an environment, and transcripts of the episodes.

An engine samples a turn, passes it to `Turns`, and prefills the tokens of the reply before it samples the next turn.
The policy's tokens are never encoded again: each reply is rendered and encoded alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ContractError
from rlhf_lightning.types import Environment, Episode, Message, MultiTurn, Prompt, PromptBatch, Reply


class Transcript(NamedTuple):
    """A complete episode.

    Attributes:
        messages: the turns after the first prompt.
        starts: index of the first token of each turn of the policy, among the tokens after the first prompt.
        ends: index of the last token of each turn of the policy.
        rewards: the environment's reward of each turn of the policy.
        learned: bool, True on the policy's tokens, shape (tokens,).
        finished: whether the environment ended the episode after a complete turn; False if a limit ended it.
        failed: whether the environment failed, so that the episode cannot be judged.
        feedback: the environment's feedback on turns, one line each; None if there is none.
    """

    messages: tuple[Message, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    rewards: tuple[float, ...]
    learned: Tensor
    finished: bool
    failed: bool
    feedback: str | None = None

    @property
    def reward(self) -> float:
        """Sum of the environment's rewards; NaN if it failed."""
        return math.nan if self.failed else math.fsum(self.rewards)

    def asked(self, prompt: Prompt) -> Prompt:
        """Return the context of the policy's last turn: the first prompt and the turns between."""
        return context_of(prompt, self.messages[:-1])

    def token_rewards(self) -> Tensor:
        """Return the rewards on the last tokens of their turns, and minus their sum on the last learned token.

        A score on the last learned token already includes the sum. Adding these values moves each reward to its turn.
        """
        rewards = torch.zeros(len(self.learned), dtype=torch.float64)
        rewards[list(self.ends)] = torch.tensor(self.rewards, dtype=torch.float64)
        rewards[self.ends[-1]] -= math.fsum(self.rewards)
        return rewards.float()


def context_of(prompt: Prompt, turns: Sequence[Message]) -> Prompt:
    """Return a prompt followed by turns."""
    return prompt + "".join(str(turn["content"]) for turn in turns) if isinstance(prompt, str) else [*prompt, *turns]


class _Open:
    """An episode during sampling."""

    def __init__(self, prompt: Prompt, row: Mapping[str, Any], number: int) -> None:
        self.row, self.number, self.is_text = row, number, isinstance(prompt, str)
        self.messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        self.first = len(self.messages)
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.rewards: list[float] = []
        self.feedback: list[str] = []
        self.finished = self.failed = False

    def say(self, ids: Sequence[int], text: str) -> None:
        """Append a turn of the policy."""
        self.starts.append(len(self.ids))
        self.ids += ids
        self.learned += [True] * len(ids)
        self.ends.append(len(self.ids) - 1)
        self.messages.append({"role": "assistant", "content": text})

    def hear(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Append a reply of the environment."""
        self.ids += ids
        self.learned += [False] * len(ids)
        self.messages += messages

    def transcript(self) -> Transcript:
        """Return the complete episode."""
        places = tuple(self.starts), tuple(self.ends), tuple(self.rewards)
        learned = torch.tensor(self.learned, dtype=torch.bool)
        said = "\n".join(self.feedback) or None
        return Transcript(tuple(self.messages[self.first :]), *places, learned, self.finished, self.failed, said)


class PendingReplies(NamedTuple):
    """A request for replies.

    Attributes:
        rows: the episodes.
        ended: whether the turn of each episode is complete.
        episodes: the episodes as the environment sees them.
        pending: the replies; None if the environment has not been called yet.
    """

    rows: list[int]
    ended: list[bool]
    episodes: list[Episode]
    pending: Future[list[Reply | None]] | None

    def cancel(self) -> None:
        """Drop the request if the environment has not begun with it."""
        if self.pending is not None:
            self.pending.cancel()


class Turns:
    """The conversations of one call to an engine.

    Args:
        rules: the environment, and the limits of an episode.
        tokenizer: the policy's tokenizer.
        prompts: first prompt of each episode, in the form of the data.
        columns: other columns of the data, each a list with one value per episode.
        numbers: number of each episode in the run.
    """

    def __init__(
        self,
        rules: MultiTurn,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        numbers: Sequence[int],
    ) -> None:
        self.rules, self.tokenizer = rules, tokenizer
        self.name = type(rules.environment).__name__
        self._open = [
            _Open(prompt, {**{name: values[row] for name, values in columns.items()}, "prompt": prompt}, int(number))
            for row, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        ]
        self._budgets = [rules.max_tokens] * len(self._open)

    def limit(self, most: Sequence[int | None]) -> None:
        """Limit the tokens of each episode after its first prompt, in addition to ``rules.max_tokens``."""
        self._budgets = [
            min((one for one in pair if one is not None), default=None)
            for pair in zip(self._budgets, most, strict=True)
        ]

    def ids(self, row: int) -> list[int]:
        """Return the tokens of an episode after its first prompt: the policy's turns and the replies."""
        return self._open[row].ids

    def room(self, row: int, most: int) -> int:
        """Return the maximum length of an episode's next turn in tokens, at most ``most``."""
        budget = self._budgets[row]
        return most if budget is None else min(most, budget - len(self._open[row].ids))

    @property
    def overlap(self) -> bool:
        """Whether the environment computes replies while other episodes are decoded."""
        return hasattr(self.rules.environment, "start_replies")

    def replies(self, rows: Sequence[int], turns: Sequence[Sequence[int]], ended: Sequence[bool]) -> list[bool]:
        """Pass sampled turns to the environment, and wait for the replies; see `ask` and `hear`."""
        return self.hear(self.ask(rows, turns, ended))

    def ask(self, rows: Sequence[int], turns: Sequence[Sequence[int]], ended: Sequence[bool]) -> PendingReplies:
        """Pass sampled turns to an environment that overlaps; to others, `hear` passes them.

        Args:
            rows: the episodes.
            turns: tokens of the policy's turn in each episode.
            ended: whether the turn has an end token or a stop string.

        Raises:
            ContractError: ``bad-reply``: ``start_replies`` did not return a Future.
        """
        episodes = []
        for row, ids, whole in zip(rows, turns, ended, strict=True):
            one = self._open[row]
            one.say(list(ids), tokenization.turn_text(self.tokenizer, ids))
            last = not whole or len(one.ends) >= self.rules.max_turns or self.room(row, 1) < 1
            episodes.append(
                Episode(one.row, [*one.messages], [*one.ids], [*one.learned], one.number, len(one.ends) - 1, last)
            )
        environment: Any = self.rules.environment
        pending = environment.start_replies(episodes) if self.overlap else None
        if self.overlap and not isinstance(pending, Future):
            raise ContractError(
                "bad-reply", f"{self.name} returned {pending!r:.200} from start_replies; return a Future"
            )
        return PendingReplies(list(rows), list(ended), episodes, pending)

    def hear(self, asked: PendingReplies) -> list[bool]:
        """Wait for the replies to a request; return which of its episodes continue.

        An episode ends if the environment returns ``done``, after ``max_turns`` turns, if a turn has no end token, or
        if the reply leaves no room for another turn. Otherwise the tokens of the reply are appended to `ids`.

        Raises:
            ContractError: the environment did not return a `Reply` for each episode.
        """
        given = replies_of(self.rules.environment, asked.episodes, self.name, asked.pending)
        return [
            self._goes_on(row, reply, whole, episode.last)
            for row, reply, whole, episode in zip(asked.rows, given, asked.ended, asked.episodes, strict=True)
        ]

    def _goes_on(self, row: int, reply: Reply | None, whole: bool, last: bool) -> bool:
        one = self._open[row]
        if reply is None:
            one.failed = True
            one.rewards.append(0.0)
            return False
        one.rewards.append(float(reply.reward))
        one.feedback += [reply.feedback] if reply.feedback else []
        if reply.turn is not None:
            one.messages[-1] = {**reply.turn}
        one.finished = reply.done and whole
        if reply.done or last:
            return False
        messages, ids = self._encoded(one, reply)
        if self.room(row, len(ids) + 1) <= len(ids):
            return False
        one.hear(ids, messages)
        return True

    def _encoded(self, one: _Open, reply: Reply) -> tuple[list[Message], list[int]]:
        """Return a reply as messages and as tokens."""
        messages: list[Message] = [*reply.messages] or [{"role": "user", "content": reply.text or ""}]
        turn = {**one.messages[-1], "template_args": one.messages[0].get("template_args")}
        if reply.ids is not None:
            ids = [int(index) for index in reply.ids]
            if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
                raise ContractError(
                    "bad-reply", f"{self.name} replied with the token ids {ids[:20]}; each must lie from 0 to "
                                 f"{len(self.tokenizer) - 1}")  # fmt: skip
            messages = [{"role": "user", "content": self.tokenizer.decode(ids)}]
        elif one.is_text and not reply.messages:
            ids = tokenization.encode_reply(self.tokenizer, one.messages[-1], reply.text or "")
        else:
            ended = one.ids[-1] in tokenization.end_token_ids(self.tokenizer)
            ids = tokenization.encode_reply(self.tokenizer, turn, messages, ended)
        if ids and max(ids) >= len(self.tokenizer):
            known = len(self.tokenizer)
            raise ContractError("bad-reply", f"{self.name} replied with token id {max(ids)}; the tokenizer has {known}")
        if not ids:
            raise ContractError(
                "empty-reply",
                f"{self.name} replied without a token: return Reply(done=True) to end the episode, or a text",
            )
        return messages, ids

    def transcripts(self) -> tuple[Transcript, ...]:
        """Return the finished episodes."""
        return tuple(one.transcript() for one in self._open)


def turns_of(batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Return the conversations of a batch; None if each episode is a single completion."""
    if batch.multi_turn is None:
        return None
    return Turns(batch.multi_turn, tokenizer, batch.texts, batch.columns, batch.episodes.tolist())


def replies_of(
    environment: Environment, episodes: Sequence[Episode], name: str, pending: Future[list[Reply | None]] | None = None
) -> list[Reply | None]:
    """Return an environment's replies to a batch of episodes, from one call if it has ``reply_all``.

    Args:
        environment: the environment.
        episodes: the episodes.
        name: name of the environment in errors.
        pending: the replies that it already computes; None calls it.

    Raises:
        ContractError: ``bad-reply``: it did not return a valid `Reply` for each episode; ``environment-exits``: it
            called sys.exit, which must not end a run as a success.
    """
    reply_all = getattr(environment, "reply_all", None)
    single = pending is None and reply_all is None  # only a call for a whole batch may drop episodes
    try:
        if pending is not None:
            found: Any = pending.result()
        else:
            found = [environment.reply(one) for one in episodes] if reply_all is None else reply_all(episodes)
    except SystemExit as error:
        raise ContractError(
            "environment-exits", f"{name} called sys.exit({error.code!r}); raise an exception instead"
        ) from error
    given: list[Any] = list(found) if isinstance(found, Iterable) else [found] * len(episodes)
    wrong = ""
    if len(given) != len(episodes):
        wrong = f"returned {len(given)} replies to {len(episodes)} episodes"
    if not isinstance(found, Iterable):
        wrong = f"returned {found!r:.200} in place of a list of replies"
    for reply in given:
        if isinstance(reply, Reply) and reply.fault:
            wrong = reply.fault
        elif not isinstance(reply, Reply) and (reply is not None or single):
            wrong = f"returned {reply!r:.200} in place of a Reply"
    if wrong:
        raise ContractError("bad-reply", f"{name} {wrong}; return rlhf_lightning.types.Reply for each episode")
    return given
