"""Scorer on a server: a reward model or a judge on another machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

from rlhf_lightning.errors import check_range
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, each, finite
from rlhf_lightning.scoring.scorer import BadScoresError, Scorer, Scores
from rlhf_lightning.types import Judgement, Prompt


class RemoteScorer(Scorer):
    """Request scores from a server, in batches.

    A request is a POST of ``{"prompts": [...], "completions": [...], "columns": {name: [...]}}``, with one entry per
    completion in each list (a prompt is text or a list of messages). The response is ``{"scores": [...]}``. Each score
    is a number, null if the server cannot judge, or an object with the fields of a `Judgement` (``score``, ``parts``,
    ``token_rewards`` ...). Requests to an unreachable or busy server are retried. A call takes at most (retries + 1) *
    timeout plus the waits, which double from ``wait`` up to a minute each. Use `FaultTolerant` to continue without
    scores after that.

    Args:
        url: address of the requests, such as ``http://host:8000/score``.
        batch_size: completions per request.
        requests: number of concurrent requests.
        timeout: time limit of one request, seconds.
        retries: retries of a request after a lost connection, a timeout or a busy server.
        wait: wait before the first retry, seconds.
        api_key: name of the environment variable with the server's API key; null sends none.

    Raises:
        SettingError: the address is invalid, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        requests: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        api_key: str | None = None,
    ) -> None:
        check_range(min(batch_size, requests) >= 1, "both must be at least 1", batch_size=batch_size, requests=requests)
        self.batch_size, self.requests = batch_size, requests
        self.server = JSONServer(url, timeout, retries, wait, api_key)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return the server's scores.

        Raises:
            ServerError: the server cannot be reached, refuses, or its response has no scores.
            BadScoresError: the number of scores is wrong, or a score is neither a finite number, null nor a judgement.
        """
        rows = range(0, len(completions), self.batch_size)
        bodies = [
            {
                "prompts": list(prompts[start : start + self.batch_size]),
                "completions": list(completions[start : start + self.batch_size]),
                "columns": {name: list(values[start : start + self.batch_size]) for name, values in columns.items()},
            }
            for start in rows
        ]
        return [score for scores in each(self._scores, bodies, self.requests) for score in scores]

    def _scores(self, body: dict[str, Any]) -> list[float | None | Judgement]:
        answer, count = self.server.post("", body), len(body["completions"])
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ServerError(
                "server-answer-unusable",
                f'{self.server.url} answered without {{"scores": [...]}}: {self.server.shown(answer)}',
            )
        if len(scores) != count:
            raise BadScoresError(
                "number-of-scores",
                f"{self.server.url} returned {len(scores)} scores for {count} completions; it must return one for each",
            )
        try:
            return [_score(score) for score in scores]
        except (ValueError, TypeError) as error:
            raise BadScoresError(
                "not-numbers", f"{self.server.url} must return finite numbers, null or judgements; it returned {error}"
            ) from None


FIELDS: dict[str, Callable[[Any], Any]] = {
    "score": lambda value: None if value is None else finite(value),
    "parts": lambda value: {name: math.nan if number is None else finite(number) for name, number in value.items()},
    "token_rewards": lambda value: None if value is None else [finite(number) for number in value],
    "feedback": lambda value: value,
    "span_rewards": lambda value: [(index(start), index(end), finite(number)) for start, end, number in value or ()],
}


def _score(value: Any) -> float | None | Judgement:
    """Read a number, null or an object with the fields of a `Judgement`; errors never quote the server's text."""
    if not isinstance(value, dict):
        return None if value is None else finite(value)
    if not value.keys() <= FIELDS.keys() or "score" not in value:
        raise ValueError(f"an object with other fields than {', '.join(FIELDS)}, or without a score")
    if not isinstance(value.get("parts", {}), dict) or not isinstance(value.get("token_rewards") or [], list):
        raise ValueError("parts that are not an object, or token_rewards that are not a list")
    if not isinstance(value.get("feedback"), str | None):
        raise ValueError("feedback that is not text")
    return Judgement(**{name: FIELDS[name](given) for name, given in value.items()})
