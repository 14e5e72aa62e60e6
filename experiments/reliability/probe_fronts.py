"""Probes of processes, annotation pages, servers and numeric settings."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from probe_files import leak_probes, silence_probes
from probing import CHAT, NOT_REACHED, RESUME, RUN, Judge, Probe, calls_of, fit, with_signals

RESUMABLE = 75


# -- processes: signals after a given number of function calls --------------------------------------------------------


def judge_signal(number: int, second: bool, runs: str) -> Judge:
    """Return the judge of a signal: status 75 with a checkpoint, or 128 + n, and no partial files.

    After a second signal, partial files may remain.
    """

    def judge(status: int, text: str) -> str | None:
        place = Path.cwd()
        checkpoints = list((place / runs).rglob("update_*.ckpt"))
        half = [path for path in place.glob("runs/*/version_*") if not (path / "manifest.json").is_file()]
        half += [path for path in place.rglob(".*.partial") if ".ckpt" not in path.name]
        if "Traceback (most recent" in text:
            return "traceback"
        if NOT_REACHED in text:
            return None if status == 0 else f"status {status}"
        if second:
            return "status 0" if status == 0 else None
        if half:
            return f"left {half[0].name}"
        if status == RESUMABLE and number == signal.SIGTERM:
            return None if checkpoints else "75 and nothing to resume"
        return None if status == 128 + number else f"status {status}"

    return judge


MOMENTS = (0.001, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.995)
"""Fractions of a command's function calls after which it gets a signal."""


def process_probes() -> Iterator[Probe]:
    """Send signals at moments from the first import to the last export."""
    yield from (probe for probe in leak_probes() if probe.front == "processes")
    few = ["--max_new_tokens", "3"]
    commands = {
        "fit": [*fit("cut"), "--checkpoint.every_n_updates", "2"], "fit --resume": RESUME, "chat": CHAT,
        "generate": ["generate", "--model", "model", "--prompts", "data.jsonl", "--out", "out.jsonl", *few],
        "audit": ["audit", "pairs.jsonl", "--json", "report.json"],
        "validate": ["validate", RUN, "--data.eval_rows", "2"],
        "export": ["export", RUN, "--out", "exported"],
    }  # fmt: skip

    def probe(name: str, argv: list[str], share: float, numbers: Sequence[int]) -> Probe:
        def sent() -> int:
            at = max(int(calls_of(argv) * share), 150)
            return with_signals(argv, [(at + 200 * place, number) for place, number in enumerate(numbers)])[0]

        said = f"{signal.Signals(numbers[0]).name}{' twice' * (len(numbers) > 1)}"
        judge = judge_signal(numbers[0], len(numbers) > 1, "runs/cut" if name == "fit" else "runs")
        return Probe("processes", f"rlhf {name}: {said} after {share:.1%} of its calls", sent, judge=judge)

    for name, argv in commands.items():
        for place, share in enumerate(MOMENTS):
            yield probe(name, argv, share, [signal.SIGTERM])
            yield probe(name, argv, share, [signal.SIGINT])
            if place % 4 == 1:
                yield probe(name, argv, share, [signal.SIGHUP])
                yield probe(name, argv, share, [signal.SIGTERM, signal.SIGTERM])


# -- pages: malformed requests ----------------------------------------------------------------------------------------

ODD: dict[str, Any] = {
    "null": None, "true": True, "-1": -1, "2**70": 2**70, "1e400": float("inf"), "NaN": float("nan"),
    "a long text": "x" * 300_000,
    "NUL": "\x00", "half a surrogate": "\ud800", "bidi": "\u202e\u2066", "[]": [], "[[]]": [[]], "{}": {}, "2.5": 2.5,
    "empty": "",
    "SQL": "'; DROP TABLE judgements; --", "markup": "<script>alert(1)</script>", "many": list(range(5000)),
}  # fmt: skip
FIELDS = (
    "key",
    "store",
    "assignment",
    "verdict",
    "ranks",
    "strength",
    "reasons",
    "flags",
    "seconds",
    "edited",
    "note",
    "unknown",
)


def requests() -> Iterator[tuple[str, Callable[[Any, dict[str, Any]], Any]]]:
    """Yield the name of a request, and a function that sends it with a client and a valid answer."""
    for field in FIELDS:
        for name, value in ODD.items():

            def answer(client: Any, sound: dict[str, Any], f: str = field, v: Any = value) -> Any:
                body = json.dumps({**sound, f: v}, ensure_ascii=True)
                return client.post(
                    "/api/judgements", content=body.encode(), headers={"content-type": "application/json"}
                )

            yield f"judgement with {field} {name}", answer
    for place in (
        "/api/enter",
        "/api/undo",
        "/api/item",
        "/api/judgements",
        "/",
        "/results",
        "/enter",
        "/api/../x",
        "/%2e%2e/x",
        "/api/item?x=" + "y" * 9000,
    ):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
            yield f"{method} {place[:20]}", lambda client, _, m=method, p=place: client.request(m, p)
    bodies = {
        "empty": b"",
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "not UTF-8": b"\xff\xfe",
        "a number": b"7",
        "twice": b'{"key": 1, "key": 2}',
        "huge": b"{" + b" " * 600_000,
        "half": b'{"key": "',
    }
    for name, content in bodies.items():
        for place in ("/api/enter", "/api/judgements", "/api/undo"):
            yield (
                f"body {name} to {place}",
                lambda client, _, p=place, c=content: client.post(
                    p, content=c, headers={"content-type": "application/json"}
                ),
            )
    for header, values in {
        "host": ("evil.example", "localhost:99999999", "[::1", "localhost@evil", "", "127.0.0.1.evil.example",
        "a" * 5000),
        "origin": ("http://[", "null", "https://localhost:8765", "http://localhost:8766", "http://evil.example",
        "javascript:alert(1)"),
        "cookie": ("annotator=\x01", "annotator=" + "x" * 5000, "a=b;" * 500, "annotator=null", 'annotator="\\"'),
        "content-type": ("text/plain", "application/json; charset=x", "application/x-www-form-urlencoded",
        "multipart/form-data"),
        "content-length": ("-1", "x", "99999999999"), "sec-fetch-site": ("cross-site", "same-site", "x"),
        "x-forwarded-proto": ("https", "javascript", "x" * 3000),
    }.items():  # fmt: skip
        for value in values:
            yield (
                f"header {header}: {value[:30]!r}",
                lambda client, sound, h=header, v=value: client.post("/api/judgements", json=sound, headers={h: v}),
            )
    for name in (
        "null",
        "true",
        "owner",
        "",
        " ",
        "a" * 100,
        "../x",
        "<b>",
        "\u202ea",
        "a\nb",
        "ann\x00",
        7,
        None,
        [],
        {"a": 1},
    ):
        yield f"enter as {name!r}"[:60], lambda client, _, n=name: client.post("/api/enter", json={"name": n})


def ask(send: Callable[[Any, dict[str, Any]], Any]) -> int:
    """Send a request to a page over a new store; return 0 if the answer is valid and the page still works."""
    from starlette.testclient import TestClient

    from rlhf_lightning.commands.web_server import HEADERS
    from rlhf_lightning.data.feedback.records import Candidate, Item
    from rlhf_lightning.people.handing_out import Policy
    from rlhf_lightning.people.server import make_app
    from rlhf_lightning.people.store import FeedbackStore

    with FeedbackStore(Path("feedback.db"), Policy(1, 0.0)) as store:
        store.add([Item(f"question {n}", (Candidate(f"good {n}"), Candidate(f"poor {n}"))) for n in range(3)])
        client = TestClient(
            make_app(store), base_url="http://localhost:8765", follow_redirects=False, raise_server_exceptions=False
        )
        client.post("/api/enter", json={"name": "ann"})
        item = client.get("/api/item").json()["item"]
        sound = {
            "key": "a key of 16 or more",
            "store": item["store"],
            "assignment": item["assignment"],
            "verdict": "ranking",
            "ranks": [0, 1],
            "seconds": 1,
        }
        with contextlib.suppress(UnicodeEncodeError, ValueError):  # the client itself refuses to send it
            answered = send(client, sound)
            print(f"answered with {answered.status_code}: {answered.text[:200]}")
            if answered.status_code >= 500 or any(name not in answered.headers for name in HEADERS):
                return 1
        client.cookies.clear()
        client.post("/api/enter", json={"name": "bob"})
        return 0 if client.get("/api/item").status_code == 200 else 1


def _sound(status: int, text: str) -> str | None:
    return "traceback" if "Traceback (most recent" in text else None if status == 0 else text.strip()[-200:]


def page_probes() -> Iterator[Probe]:
    """Send malformed requests: each gets a status below 500 with the page's headers, and the page still works."""
    for name, send in requests():
        yield Probe("page", name, lambda s=send: ask(s), judge=_sound)


# -- servers: malformed answers ---------------------------------------------------------------------------------------


def answers() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of invalid server answers to a request for three scores."""

    def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"{head}{headers}\r\n".encode() + body

    scores: dict[str, str] = {
        "none": "[]", "two": "[1, 2]", "four": "[1, 2, 3, 4]", "texts": '["1", "2", "3"]', "1e400": "[1e400, 1, 1]",
        "NaN": "[NaN, 1, 1]", "null": "[null, 1, 1]",
        "lists": "[[1], [2], [3]]", "objects": '[{"x": 1}, {}, {}]', "true": "[true, false, true]", "a text": '"abc"',
        "a number": "7", "an object": '{"a": 1}',
        "2**5000": f"[{2**5000}, 1, 1]", "digits": "[" + "9" * 100_000 + ", 1, 1]", "deep": "[" * 50_000,
        "deep and closed": "[" * 5000 + "]" * 5000, "-0": "[-0.0, 0, 0]", "1e30": "[1e30, 1, 1]",
        "half": "[1, 2", "twice": "[1, 2, 3][1, 2, 3]", "a comma": "[1, 2, 3,]", "a comment": "[1, 2, 3] // x",
        "hexadecimal": "[0x1, 2, 3]",
    }  # fmt: skip
    for name, text in scores.items():
        yield f"scores {name}", http(f'{{"scores": {text}}}'.encode())
        yield f"body {name}", http(text.encode())
    for status in (
        "100 Continue",
        "204 No Content",
        "301 Moved",
        "400 Bad",
        "401 No",
        "404 Not Found",
        "418 Teapot",
        "429 Slow",
        "500 Broken",
        "503 Busy",
        "999 Odd",
        "abc",
        "",
    ):
        yield (
            f"status {status!r}",
            http(b'{"error": "\\u001b[31mred \\u202e"}', status, "location: http://127.0.0.1:1/\r\n"),
        )
    raw: dict[str, bytes] = {
        "nothing": b"", "one byte": b"H", "not HTTP": b"SSH-2.0-x\r\n", "no headers": b"HTTP/1.1 200 OK\r\n\r\n",
        "HTML": http(b"<html>502</html>"), "not UTF-8": http(b"\xff\xfe\xfd"), "zeros": bytes(4096),
        "short": b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n[1,2,3]",
        "negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n[1,2,3]",
        "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\ncontent-length: 3\r\n\r\n[1,2,3]",
        "bad chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n[1]\r\n",
        "endless chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffff\r\n",
        "a long header": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        "many headers": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 500 + b"\r\n",
        "gzip": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
        "HTTP/0.9": b"[1, 2, 3]", "HTTP/3": b"HTTP/3 200\r\n\r\n[1,2,3]",
        "30 MB": http(b'{"scores": [' + b"1," * (15 << 20) + b"1]}"),
    }  # fmt: skip
    yield from raw.items()


def score_by(answer: bytes) -> int:
    """Request three scores; return 0 if the answer is accepted (null as NaN) or refused in a sentence."""
    from rlhf_lightning.errors import RlhfError
    from rlhf_lightning.scoring import RemoteScorer
    from rlhf_lightning.scoring.scorer import ask_scorer

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.settimeout(5)
                connection.recv(1 << 16)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        scorer = RemoteScorer(f"http://127.0.0.1:{listener.getsockname()[1]}/score", timeout=3, retries=0, wait=0.1)
        judged = ask_scorer(scorer, ["a", "b", "c"], ["x", "y", "z"], {}, "the server")
        print(f"took {judged.scores.tolist()}")
        taken = len(judged.scores) == 3 and not judged.scores.isinf().any()
        return 0 if taken and (b"null" in answer or not judged.scores.isnan().any()) else 1
    except RlhfError as error:
        print(f"rlhf: {error}")
        return 0 if str(error).isprintable() else 1


def server_probes() -> Iterator[Probe]:
    """Return malformed server answers: each is read as scores, or refused in a printable sentence."""
    for name, answer in answers():
        yield Probe("servers", f"a score server answers: {name}", lambda a=answer: score_by(a), judge=_sound)


# -- numbers: invalid numeric settings --------------------------------------------------------------------------------

VALUES = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e30",
    "1e-300",
    "999999999999999999999",
    "1_0",
    "0x10",
    "\u0663",
    "true",
    "[1]",
    "1e400",
)


def numeric_settings(kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each class and each of its numeric settings, from the index behind `--help`."""
    from rlhf_lightning.commands.flag_index import INDEX

    index = json.loads(INDEX.read_text(encoding="utf-8"))
    for part in ("model", "data"):
        for kind in kinds:
            for place in index[part].get(kind, {}).get("settings", []):
                name, annotation = index["settings"][place][:2]
                if {"int", "float"} & set(annotation.split("|")):
                    yield kind, f"{part}.{name}"
    for place in index["run"]:
        name, annotation = index["settings"][place][:2]
        if {"int", "float"} & set(annotation.split("|")) and name.split(".")[0] in (
            "checkpoint",
            "samples",
            "export",
            "seed_everything",
        ):
            yield "run", name


def number_probes() -> Iterator[Probe]:
    """Set invalid or extreme numbers: they are refused, or training gives a finite loss."""

    def finite(status: int, text: str) -> str | None:
        if "Traceback (most recent" in text:
            return "traceback"
        return "a loss that is not finite, and status 0" if status == 0 and "loss nan" in text else None

    yield from (probe for probe in silence_probes() if probe.front == "numbers")
    for _, name in numeric_settings(["SFTModule", "SFTDataModule"]):
        for value in VALUES:
            yield Probe("numbers", f"--{name} {value}", lambda n=name, v=value: [*fit("x"), f"--{n}={v}"], judge=finite)
