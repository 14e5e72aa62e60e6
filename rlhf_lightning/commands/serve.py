"""``rlhf serve``: an OpenAI-compatible server for a policy, with continuous batching of requests."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.commands.completion_api import Api

DEFAULTS = SamplingArguments()


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf serve``."""
    return run_function(serve, argv, "rlhf serve", positional=["model"], without=["engine"])


def serve(
    model: str,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    timeout: float = 600.0,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Serve a policy over the OpenAI API: completions, chat, and the list of models.

    Concurrent requests are decoded in one batch. A request with a seed gives the completions that `SlotEngine` samples
    with this seed. The flags for temperature, top_p, top_k and max_new_tokens are defaults of requests.

    Args:
        model: run, folder of a policy (weights or adapter), .gguf file or hub id.
        name: name of the model in requests; by default the value of model.
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free port.
        api_key: name of the environment variable with the key that requests must send. Required if --host admits other
            machines.
        timeout: time limit of a request, seconds.
        sampling: sampling settings; batch_size is the number of completions decoded at a time.
    """
    from rlhf_lightning.commands.web_server import base_url, listen, make_server, require_web_server

    require_web_server("rlhf serve", "serve")
    key = access_key(host, api_key)
    check_range(timeout > 0, "it must be positive", timeout=timeout)
    from rlhf_lightning.commands.completion_api import make_app

    with closing(listen(host, port)) as listening, policy_api(model, name, sampling, timeout) as api:
        base = base_url(listening, host)
        print(f"{api.name} at {base}/v1   Ctrl+C stops", flush=True)
        make_server(make_app(api, key), timeout + 30).run(sockets=[listening])
    return 0


def access_key(host: str, api_key: str | None) -> str | None:
    """Return the key that requests must send; None if no key is needed (loopback address only)."""
    from rlhf_lightning.commands.web_server import is_loopback
    from rlhf_lightning.sampling.json_server import key_in

    if api_key is None and not is_loopback(host):
        raise SettingError(
            "no-key",
            f"host {host} accepts connections from other machines: put a key into an environment variable and name "
            "it with --api_key",
        )
    return None if api_key is None else key_in(api_key)


@contextmanager
def policy_api(model: str, name: str | None, sampling: SamplingArguments, timeout: float) -> "Iterator[Api]":
    """Load a policy and answer requests from it while the block runs."""
    import torch

    from rlhf_lightning import tokenization
    from rlhf_lightning.commands.completion_api import Api
    from rlhf_lightning.commands.completion_requests import RequestLimits, Text
    from rlhf_lightning.models.limits import limits_of
    from rlhf_lightning.models.resolving import newest_export
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.sampling.live_batch import LiveBatch
    from rlhf_lightning.sampling.slot_engine import sample

    folder = newest_export(Path(model).expanduser()) if Path(model).expanduser().is_dir() else None
    settings = sampling.settings()
    policy, tokenizer = sampling.load(str(folder or model))
    ends = tokenization.end_token_ids(tokenizer)
    # The first completion selects and checks the decoding path, before the first request arrives.
    sample(policy, [torch.tensor([ends[0]])], torch.tensor([0]), SamplingSettings(4), sampling.seed, ends)
    found = limits_of(policy.model)
    longest = min(
        (limit for limit in (found.positions, found.trained, found.switch) if limit is not None), default=None
    )
    text = Text(tokenizer, policy.model.get_input_embeddings().weight.shape[0])
    batch = LiveBatch(policy, sampling.batch_size)
    thread = threading.Thread(target=batch.run, name="sampling", daemon=True)
    thread.start()
    try:
        yield Api(batch, text, name or model.rstrip("/"), RequestLimits(settings, longest), sampling.seed, timeout)
    finally:
        batch.close()
        thread.join(timeout=30)
