"""Faults for `faults.py`: misbehaving scorers, a NaN loss, an update that runs out of memory.

Run as a script with a port, it serves scores and completions and can be killed and restarted.
"""

import json
import math
import os
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("raises", "hangs", "dies", "returns NaN", "returns too many")


def length(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score a completion by its number of words."""
    return [float(len(text.split())) for text in completions]


def misbehaving(fault: str) -> Any:
    """Return a scorer that applies a fault to a fifth of the completions, always to the same ones."""

    def score(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        spoilt = [sum(text.encode()) % 5 == 0 for text in completions]
        if any(spoilt):
            if fault == "raises":
                raise RuntimeError("the judge had a bad day")
            if fault == "hangs":
                time.sleep(3600)
            if fault == "dies":
                os._exit(9)
            if fault == "returns too many":
                return [*length(prompts, completions), 1.0]
        return [math.nan if bad else score for bad, score in zip(spoilt, length(prompts, completions), strict=True)]

    return score


raises, hangs, dies, returns_nan, returns_too_many = (misbehaving(fault) for fault in FAULTS)


class Handler(BaseHTTPRequestHandler):
    """Scores by length; completes with random bytes, each reported as one of 256."""

    def do_POST(self) -> None:  # noqa: N802
        """Answer a request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sent = json.dumps(self.answer(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def answer(self, body: dict[str, Any]) -> Any:
        """Return scores, a completion, or a confirmation that an adapter is loaded."""
        if self.path == "/score":
            return {"scores": length(body["prompts"], body["completions"])}
        if self.path != "/v1/completions":
            return "Success"
        rng = random.Random(body["seed"])
        tokens = [rng.randrange(256) for _ in range(body["max_tokens"])]
        tokens = [token for token in tokens if token not in body["stop_token_ids"]] or [0]
        table = {"tokens": [], "token_logprobs": [-math.log(256)] * len(tokens)}
        return {"choices": [{"token_ids": tokens, "logprobs": table, "finish_reason": "length"}]}

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
else:  # as a server it starts without the training stack
    import torch
    from torch import Tensor

    from rlhf_lightning.modules import SFTModule
    from rlhf_lightning.types import TokenLogprobs

    class SpoiltModule(SFTModule):
        """SFT with a NaN loss at some updates.

        Args:
            spoilt: indices of these updates, from 0.
            on_rank: the only rank with a NaN loss; None for all ranks.
        """

        def __init__(self, spoilt: list[int], on_rank: int | None = None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.spoilt, self.on_rank = spoilt, on_rank

        def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
            """Return the usual loss, or NaN."""
            loss = -logprobs.logprobs
            here = self.on_rank is None or self.on_rank == self.global_rank
            return loss * math.nan if here and self.updates in self.spoilt else loss

    class HungryModule(SFTModule):
        """SFT whose third update runs out of memory."""

        def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
            """Return the usual loss."""
            if self.updates == 2:
                torch.empty(2**31).fill_(1.0)
            return -logprobs.logprobs

    class MortalModule(SFTModule):
        """SFT whose second rank is killed at the third update."""

        def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
            """Return the usual loss, or kill the process."""
            if self.updates == 2 and self.global_rank == 1:
                os.kill(os.getpid(), 9)
            return -logprobs.logprobs
