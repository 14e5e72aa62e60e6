"""A scoring server over HTTP that tests can kill and restart. Run as a script, it serves; it imports no large packages.

A completion's score is its number of words. Some words trigger faults, see `answer`.
"""

import json
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = {word for text in body["completions"] for word in text.split()} | set(
            self.path.partition("?")[2].split("&")
        )
        status, answer = 200, self.answer(words, body)
        if "refuse" in words:
            status, answer = 401, {"error": f"no such key: {self.headers.get('Authorization')}"}
        if "busy" in words:
            status = 503
        if "elsewhere" in words:
            status = 302
        sent = json.dumps(answer).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        for byte in sent:
            if "trickle" in words:
                time.sleep(0.05)
                self.wfile.flush()
            self.wfile.write(bytes([byte]))

    def answer(self, words: set[str], body: dict[str, Any]) -> Any:
        scores: list[Any] = [len(text.split()) + sum(body["columns"].get("bonus", [])) for text in body["completions"]]
        if "none" in words:
            scores = [None] * len(scores)
        if "fewer" in words:
            scores = scores[1:]
        return {"answer": 42} if "nonsense" in words else {"scores": scores}

    def log_message(self, *args: Any) -> None:
        pass


class ScoreServer:
    """The server process and its address."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/score"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        self.process = subprocess.Popen([sys.executable, "-S", __file__, str(self.port)])
        while wait:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
