"""A scorer behind an address: a reward model or a judge that another machine serves."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_lightning.errors import SettingError
from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.scoring.scorer import Scorer, Scores
from rlhf_lightning.types import Judgement, Prompt


class RemoteScorer(Scorer):
    """Asks a server for scores, some completions at a time.

    A request is a POST of ``{"prompts": [...], "completions": [...], "columns": {name: [...]}}``, with one entry per
    completion in each list (a prompt is text or a list of messages); the answer is ``{"scores": [...]}``: for each a
    number, null where the server cannot judge, or an object with the fields of a `Judgement` (``score``, ``parts``,
    ``token_rewards``, ``feedback``). A server that is away or busy is asked again, as long as the retries
    last: (retries + 1) * timeout and the waits, doubling from ``wait`` up to a minute each, are the longest that a call
    can take. Wrap it in `FaultTolerant` to go on without scores after that.

    Args:
        url: where requests go, such as ``http://host:8000/score``.
        batch_size: completions of one request.
        requests: requests in flight at a time.
        timeout: of one request, seconds.
        retries: how often a request is made again after a lost connection, a time-out or a busy server.
        wait: before the first repetition, seconds.
        api_key: name of the environment variable that holds the server's key; None sends none.

    Raises:
        SettingError: the address is none, or a number is out of range.
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
        if batch_size < 1 or requests < 1:
            raise SettingError(
                "setting-out-of-range", f"batch_size is {batch_size} and requests {requests}: both must be at least 1"
            )
        self.batch_size, self.requests = batch_size, requests
        self.server = JSONServer(url, timeout, retries, wait, api_key)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return the server's scores.

        Raises:
            ServerError: it cannot be reached, refuses, or its answer holds no scores.
        """
        parts = [slice(start, start + self.batch_size) for start in range(0, len(completions), self.batch_size)]
        bodies = [
            {
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                "columns": {name: list(values[part]) for name, values in columns.items()},
            }
            for part in parts
        ]
        with ThreadPoolExecutor(max_workers=self.requests) as pool:
            answers = [pool.submit(self.server.post, "", body) for body in bodies]
            try:
                return [score for answer in answers for score in self._scores(answer.result())]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is not on its way yet would wait in vain
                raise

    def _scores(self, answer: Any) -> list[Any]:
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ServerError(
                "server-answer-unusable",
                f'{self.server.url} answered without {{"scores": [...]}}: {self.server.shown(answer)}',
            )
        try:
            return [Judgement(**score) if isinstance(score, dict) else score for score in scores]
        except TypeError as error:
            raise ServerError(
                "server-answer-unusable", f"{self.server.url} answered with a judgement of unknown fields: {error}"
            ) from error
