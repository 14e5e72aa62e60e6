"""A local server over a tiny model with vLLM's routes, or with those of a server that supports only text; and a rollout
worker.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from gloo_link import Receiver
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.commands.rollout_worker import make_app
from rlhf_lightning.commands.web_server import listen, served
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.sampling.worker_process import JobRunner
from rlhf_lightning.tokenization import Ends

BASE = "base"
"""Name of the backbone on the server."""


class SmallServer:
    """Answers completion requests with its own tiny model.

    Args:
        folder: folder of the model.
        noise: standard deviation of noise added to its weights, so that its log-probabilities differ from the
            trainer's.
        text: accept and return only text.
    """

    def __init__(self, folder: str, noise: float = 0.0, text: bool = False) -> None:
        self.folder, self.noise, self.text = folder, noise, text
        self.models = {BASE: CausalLM(self.backbone())}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.busy = 0  # number of requests to reject before the next answer
        self.knows_stops = True  # whether completions end at the texts in a request's ``stop``
        self.deaf = False  # whether it reports new weights as loaded but keeps the old weights
        self.receiver, self.asleep = Receiver(), False
        self.after: Callable[[str, int], bool] = lambda route, count: True  # False drops the response
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.lock = threading.Lock()
        self.url = ""

    def backbone(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(self.noise * torch.randn(parameter.shape, generator=generator))
        return model

    def bodies(self, route: str = "/v1/completions") -> list[dict[str, Any]]:
        return [body for found, body in self.requests if found == route]

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append((route, body))
            if self.busy:
                self.busy -= 1
                return 503, {"error": "overloaded"}
            if route in ("/pause", "/resume", "/reset_prefix_cache", "/collective_rpc"):
                if body.get("method") == "reload_weights" and not self.deaf:
                    self.models[BASE] = CausalLM(self.backbone())
                return 200, {}
            if route == "/get_world_size":
                return 200, {"world_size": 1}
            if route == "/weight_info":
                return 200, {"weight_version": self.receiver.version}
            if route in Receiver.ROUTES:
                return self.receiver.answer(route, body, self.models[BASE].model)
            if route in ("/sleep", "/wake_up"):
                self.asleep = route == "/sleep"
                return 200, {}
            if self.asleep:
                return 400, {"error": "the engine sleeps"}
            if route == "/v1/load_lora_adapter" and body["lora_name"] in self.models:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            if route == "/v1/load_lora_adapter" and self.deaf:
                self.models[body["lora_name"]] = list(self.models.values())[-1]
                return 200, "Success"
            if route == "/v1/load_lora_adapter":
                adapter = PeftModel.from_pretrained(self.backbone(), body["lora_path"]).eval()
                self.models[body["lora_name"]] = CausalLM(adapter)
                return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
            if route == "/v1/unload_lora_adapter":
                if body["lora_name"] not in self.models:
                    return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found."}}
                del self.models[body["lora_name"]]
                return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            if body.get("logprobs", 0) > 1:
                return 200, self.top_tokens(body)
            return 200, self.spoil(self.in_text(body) if self.text else self.in_tokens(body))

    def top_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the most probable tokens after each prompt, last prompt first."""
        with torch.no_grad():
            logits = self.models[body["model"]].model(torch.tensor(body["prompt"])).logits[:, -1]
        found = logits.log_softmax(-1).topk(body["logprobs"])
        choices = [
            {
                "index": n,
                "logprobs": {
                    "top_logprobs": [{f"token_id:{int(i)}": float(v) for i, v in zip(ids, values, strict=True)}]
                },
            }
            for n, (ids, values) in enumerate(zip(found.indices, found.values, strict=True))
        ]
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def draw(self, body: dict[str, Any], prompt: list[int], ends: list[int]) -> tuple[list[int], list[float], str]:
        settings = SamplingSettings(
            body["max_tokens"], body["temperature"], body.get("top_p", 1.0), body.get("top_k", 0)
        )
        model, episode = self.models[body["model"]], torch.tensor([0])
        drawn = SlotEngine().sample(model, [torch.tensor(prompt)], episode, settings, body["seed"], ends)
        return drawn.ids[0].tolist(), drawn.logprobs[0].tolist(), "stop" if bool(drawn.finished[0]) else "length"

    def in_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        stops = body.get("stop", ()) if self.knows_stops else ()
        ends = Ends.of(body["stop_token_ids"], stops, self.tokenizer)
        ids, logprobs, reason = self.draw(body, body["prompt"], ends)
        tokens = [f"token_id:{token}" for token in ids]
        table = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}
        choice = {"index": 0, "text": "", "logprobs": table, "finish_reason": reason, "token_ids": ids}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def in_text(self, body: dict[str, Any]) -> dict[str, Any]:
        unknown = set(body) - {"model", "prompt", "max_tokens", "temperature", "seed", "generation_config"}
        assert not unknown and isinstance(body["prompt"], str)
        ends = json.loads(body["generation_config"])["eos_token_id"]
        ids, _, reason = self.draw(body, self.tokenizer(body["prompt"])["input_ids"], ends)
        choice = {"index": 0, "text": self.tokenizer.decode(ids, skip_special_tokens=True), "finish_reason": reason}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}


@contextmanager
def serving(folder: str, port: int = 0, **settings: Any) -> Iterator[SmallServer]:
    """Run a small server during the block, on a free port or on the given port."""
    small = SmallServer(folder, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.do_POST()

        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            small.authorization = self.headers.get("Authorization")  # type: ignore[attr-defined]
            route = self.path.partition("?")[0]
            status, answer = small.answer(route, body)
            if not small.after(route, len(small.bodies(route))):
                self.close_connection = True
                return
            sent = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    small.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield small
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def started_worker(folder: Path, key: str | None = None) -> Iterator[str]:
    """Serve a rollout worker from a thread; yield its address."""
    folder.mkdir(exist_ok=True)
    with served(make_app(JobRunner(folder, "cpu", ()), key), listen("127.0.0.1", 0)) as port:
        yield f"http://127.0.0.1:{port}"
