"""The worker's side of `WorkerEngine`: load the policy of a job, set the job's weights, and sample its prompts.

A job is JSON that names safetensors files with weights and prompts, and the file for the result. The result depends
only on the job, so any worker may repeat it.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_lightning.errors import DataError, ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.resolving import fingerprint
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingRequest, SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.tokenization import Ends


class JobRunner:
    """Sample job after job; the policy is loaded again only for another policy or other trained weights.

    Args:
        folder: folder of all files that a job may name.
        device: device of the policy; None takes the job's.
        trusted: models whose own Python code may be run; None takes the job's.
    """

    def __init__(self, folder: Path, device: str | None = None, trusted: Sequence[str] | None = None) -> None:
        self.folder, self.device, self.trusted = folder.resolve(), device, trusted
        self._loading: Mapping[str, Any] | None = None
        self._model: CausalLM | None = None
        self._changed: set[str] = set()  # weights of the loaded policy that jobs have set

    def answer(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result of a job; return ``{"done": True}``, or the error for the trainer."""
        try:
            self._sample(job)
        except Exception as error:  # noqa: BLE001 - the trainer raises it
            return {"error": f"{type(error).__name__}: {error}"}
        return {"done": True}

    def _policy(self, job: Mapping[str, Any]) -> CausalLM:
        """Return the policy of a job with the job's weights.

        Runs and ranks with the same policy share it. A job that does not set all weights that earlier jobs have set,
        such as one of a run that trains fewer weights, needs the policy as it was loaded.
        """
        with safe_open(self._file(job["weights"]), "pt") as file, torch.no_grad():
            names = set(file.keys())
            if self._model is None or job["loading"] != self._loading or not self._changed <= names:
                self._model = None  # frees its memory before the next policy is loaded
                self._model, self._loading = self._loaded(job["loading"]), job["loading"]
            self._changed = names
            weights = dict(self._model.model.named_parameters())
            for name in names:
                weights[name].copy_(file.get_tensor(name))
        return self._model

    def _loaded(self, loading: Mapping[str, Any]) -> CausalLM:
        device = self.device or loading["device"]
        trusted = loading["settings"]["trust_remote_code"] if self.trusted is None else self.trusted
        own = {"self_check": False, "device": device, "trust_remote_code": tuple(trusted)}
        lora = None if loading["lora"] is None else LoraSettings(**loading["lora"])
        model = load_policy(loading["init_from"], LoadSettings(**{**loading["settings"], **own}), lora)
        if fingerprint(model.source) != loading["fingerprint"]:
            raise ModelError(
                "another-model",
                f"{loading['init_from']} has other weights on the worker's host than on the trainer's; copy the "
                "trainer's model to the same path there",
            )
        return model.to(device)

    def _file(self, name: str) -> Path:
        path = Path(name).resolve()
        if not path.is_relative_to(self.folder):
            raise DataError(
                "file-outside-folder",
                f"a job names {name!r}, which is outside of the worker's folder {self.folder}; start worker and "
                "trainer with the same folder",
            )
        return path

    def _sample(self, job: Mapping[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        model = self._policy(job)
        given, result = load_file(self._file(job["prompts"])), self._file(job["result"])
        prompts = given["ids"].split(given["counts"].tolist())
        device = next(model.parameters()).device.type
        low = job["autocast"]
        context = nullcontext() if low is None else torch.autocast(device, getattr(torch, low.removeprefix("torch.")))
        asked = SamplingRequest(
            prompts, given["episodes"], SamplingSettings(**job["settings"]), job["seed"], Ends(job["ends"]), None, None,
            starts=given["starts"],
        )  # fmt: skip
        with context:
            drawn = SlotEngine().complete(model, asked)
        assert drawn.entropies is not None
        # Another worker may write the same result: the trainer must never read a partial file.
        partial = result.with_name(f".{result.name}.{secrets.token_hex(4)}")
        save_file(
            {
                "ids": torch.cat(drawn.ids), "counts": torch.tensor([len(ids) for ids in drawn.ids]),
                "logprobs": torch.cat(drawn.logprobs), "entropies": torch.cat(drawn.entropies),
                "finished": drawn.finished.cpu(),
            },
            partial,
        )  # fmt: skip
        os.replace(partial, result)


def main() -> None:
    """Answer the jobs on standard input, one a line, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be read as a response
    runner = JobRunner(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(runner.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
