"""``rlhf rollout-worker``: a process that samples rollouts for training runs on other GPUs or hosts."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from rlhf_lightning.sampling.worker_process import JobRunner

HOLD_SECONDS = 5.0
"""Time after which a request for a job that is not finished is answered, seconds; the trainer then asks again."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf rollout-worker``."""
    return run_function(rollout_worker, argv, "rlhf rollout-worker", positional=["folder"])


def rollout_worker(
    folder: str,
    host: str = "127.0.0.1",
    port: int = 8100,
    api_key: str | None = None,
    device: str | None = None,
    trust_remote_code: list[str] | None = None,
) -> int:
    """Sample rollouts for training runs whose engine is WorkerEngine with this worker's address.

    The worker loads the policy of a run with the run's first job, and takes its weights and prompts from the folder. It
    keeps nothing that a run needs: it may be killed and started again at any time.

    Args:
        folder: folder that trainer and worker access under the same path, WorkerEngine's shared_folder. Files elsewhere
            are neither read nor written, except models, which runs name.
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free port.
        api_key: name of the environment variable with the key that trainers must send. Required if --host admits other
            machines.
        device: device of the policy; null uses the GPU, or the CPU without one.
        trust_remote_code: hub ids or folders of models whose own Python code may be run; by default none.
    """
    from rlhf_lightning.commands.serve import access_key
    from rlhf_lightning.commands.web_server import base_url, listen, make_server, require_web_server

    require_web_server("rlhf rollout-worker", "serve")
    key = access_key(host, api_key)
    import torch

    from rlhf_lightning.sampling.worker_process import JobRunner

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    refuse_device(place)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SettingError("not-a-folder", f"{folder} is a file: name the folder that trainer and worker share")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with closing(listen(host, port)) as listening:
        app = make_app(JobRunner(Path(folder), place, trust_remote_code or ()), key)
        print(f"rollout worker on {place} at {base_url(listening, host)}   Ctrl+C stops", flush=True)
        make_server(app).run(sockets=[listening])
    return 0


def refuse_device(device: str) -> None:
    """Refuse a device that this machine does not have, before a run sends the first job.

    Raises:
        SettingError: ``unknown-device``.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's classes depend on how it was built
        reason = str(error).partition("\n")[0]
        raise SettingError(
            "unknown-device", f"device {device!r} cannot be used ({reason}); give cpu, cuda or cuda:1, or leave it out"
        ) from error


def make_app(runner: "JobRunner", key: str | None = None) -> "ASGIApp":
    """Return the web application, which runs one job at a time.

    A request for a job that already runs waits for the same result. So a trainer may repeat any request.

    Args:
        runner: samples the jobs.
        key: key that requests must send; None if no key is needed.
    """
    import asyncio
    from concurrent.futures import Future
    from typing import Any

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from rlhf_lightning.commands.web_server import Guard, json_object, requiring_key
    from rlhf_lightning.workers import Threads

    thread, running = Threads(1), dict[str, Future[dict[str, Any]]]()

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def sample(request: Request) -> JSONResponse:
        job = await json_object(request)
        name = str(job.get("result"))
        future = running[name] = running.get(name) or thread.submit(partial(runner.answer, job))
        done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=HOLD_SECONDS)
        if not done:
            return JSONResponse({"done": False})
        running.pop(name, None)
        return JSONResponse(future.result())

    routes = [Route("/health", health), Route("/sample", requiring_key(sample, key), methods=["POST"])]
    return Guard(Starlette(routes=routes), any_host=key is not None)
