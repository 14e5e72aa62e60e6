"""Probes of `rlhf serve`, environments and tools, imports of labels, reports, projects, sweeps and foreign losses."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probing import RUN, Judge, Probe, fit, rlhf

DEEP = "[" * 700 + "]" * 700
EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script> $\\frac$ \u2028 \x85 \u202e | `${{7*7}}`"


def sound(status: int, text: str) -> str | None:
    """Return why a self-judging probe broke; status 0 is success."""
    return "traceback" if "Traceback (most recent" in text else None if status == 0 else text.strip()[-200:]


def one_sentence(may_succeed: bool = True) -> Judge:
    """Return the judge of a command: no traceback, and no status 0 if nothing could be done."""

    def judge(status: int, text: str) -> str | None:
        if "Traceback (most recent" in text:
            return "traceback"
        if "unexpected argument" in text:
            return "the probe's own command line is wrong"
        if status == 0:
            return None if may_succeed else "status 0"
        return None if status in (1, 2) and "rlhf" in text else f"status {status}"

    return judge


# -- rlhf serve -------------------------------------------------------------------------------------------------------

ODD = (None, True, -1, 2**70, 10**400, 1e308, float("nan"), "x" * 300_000, "\x00", "\ud800", [], [[]], {}, 2.5, "",
       EVIL, list(range(5000)), json.loads(DEEP), ["\ud800"], [None], {"a": {"b": []}}, "9" * 5000)  # fmt: skip


def fields() -> Iterator[tuple[str, str, list[bytes]]]:
    """Yield the name, the route and the bodies of requests with one invalid field."""
    from rlhf_lightning.commands.completion_requests import CHAT_FIELDS, COMPLETION_FIELDS

    for route, known, sound_body in (
        ("/v1/chat/completions", CHAT_FIELDS, {"messages": [{"role": "user", "content": "w6"}], "max_tokens": 2}),
        ("/v1/completions", COMPLETION_FIELDS, {"prompt": "w6", "max_tokens": 2}),
    ):
        for field in sorted(known):
            bodies = [json.dumps({**sound_body, field: value}).encode() for value in ODD]
            yield f"{route}: {field} is one of {len(ODD)} odd values", route, bodies
    turns: dict[str, Any] = {
        "role": 7, "content": {"a": 1}, "tool_calls": 5, "function_call": "5", "name": [], "tool_call_id": {},
        "weight": 10**400, "reasoning_content": 5, "tools": [{"function": 7}], "loss": "x",
    }  # fmt: skip
    for key, value in turns.items():
        body = {"messages": [{"role": "assistant", "content": "w6", key: value}, {"role": "user", "content": "w7"}]}
        yield f"a message whose {key} is {value!r:.20}", "/v1/chat/completions", [json.dumps(body).encode()]
    for depth in (60, 100, 300, 500, 800, 900, 950, 980, 1000, 3000):
        nested = "[" * depth + "]" * depth
        bodies = [
            f'{{"messages": [{{"role": "user", "content": "w6"}}], "{field}": {nested}}}'.encode()
            for field in ("tools", "n", "metadata", "logit_bias", "chat_template_kwargs")
        ]
        yield f"fields nested {depth} levels", "/v1/chat/completions", bodies
    for args in ({"messages": []}, {"tokenize": True}, {"chat_template": "{{ 7*7 }}"}, {"add_generation_prompt": 1},
                 {"text": 1}, {"self": 1}, {"tools": 7}, {"now": "x"}, {"bos_token": []},
                 {"strftime_now": 1}):  # fmt: skip
        body = {"messages": [{"role": "user", "content": "w6"}], "chat_template_kwargs": args, "max_tokens": 2}
        yield f"chat_template_kwargs {args}", "/v1/chat/completions", [json.dumps(body).encode()]
    for route, field in (("/tokenize", "prompt"), ("/detokenize", "tokens")):
        yield f"{route}: {len(ODD)} odd values", route, [json.dumps({field: value}).encode() for value in ODD]


def raw_requests() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of raw malformed requests."""
    body = b'{"prompt": "w6", "max_tokens": 2}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    length = b"content-length: %d\r\n" % len(body)
    smuggled = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    yield from {
        "two lengths": head + length + b"content-length: 3\r\n\r\n" + body,
        "length and chunks": head + length + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
        "an odd encoding": head + b"transfer-encoding: xchunked\r\n\r\n" + body,
        "two encodings": head + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "a negative length": head + b"content-length: -5\r\n\r\n" + body,
        "a length with a sign": head + b"content-length: +33\r\n\r\n" + body,
        "a hexadecimal length": head + b"content-length: 0x21\r\n\r\n" + body,
        "a huge length": head + b"content-length: " + b"9" * 30 + b"\r\n\r\n" + body,
        "a length that lies": head + b"content-length: 9\r\n\r\n" + body + smuggled,
        "a huge chunk": head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        "a negative chunk": head + b"transfer-encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
        "a chunk extension": head + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 100_000 + b"\r\n{\r\n0\r\n\r\n",
        "a folded header": head + b"x: a\r\n b\r\n" + length + b"\r\n" + body,
        "a space before the colon": head + b"content-length : 33\r\n\r\n" + body,
        "line feeds alone": head.replace(b"\r\n", b"\n") + length.replace(b"\r\n", b"\n") + b"\n" + body,
        "a NUL in a header": head + b"x: a\x00b\r\n" + length + b"\r\n" + body,
        "a long header": head + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
        "many headers": head + b"x: y\r\n" * 5000 + length + b"\r\n" + body,
        "a long path": b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "another version": head.replace(b"1.1", b"9.9") + length + b"\r\n" + body,
        "an absolute address": head.replace(b"/v1", b"http://evil.example/v1") + length + b"\r\n" + body,
        "CONNECT": b"CONNECT evil.example:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "an upgrade": head + b"connection: upgrade\r\nupgrade: websocket\r\n" + length + b"\r\n" + body,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        "pipelined": smuggled * 50,
        "an escaped path": b"GET /v1/models/%00%ff%2e%2e/%2e%2e HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "no host": head.replace(b"host: localhost\r\n", b"") + length + b"\r\n" + body,
        "two hosts": head + b"host: evil.example\r\n" + length + b"\r\n" + body,
        "expect": head + b"expect: 100-continue\r\n" + length + b"\r\n" + body,
        "a compressed body": head + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
        "10 MB": head + b"content-length: 10485760\r\n\r\n" + b" " * 10_485_760,
    }.items()  # fmt: skip


def serve_odd(send: Callable[[Any, int], None]) -> int:
    """Serve the world's model, send something, then send a valid request; return 0 if that is answered."""
    from starlette.testclient import TestClient

    from rlhf_lightning.commands.completion_api import make_app
    from rlhf_lightning.commands.generate import SamplingArguments
    from rlhf_lightning.commands.serve import policy_api
    from rlhf_lightning.commands.web_server import listen, served

    with policy_api("model", "tiny", SamplingArguments(max_new_tokens=4, batch_size=4), 20.0) as api:
        app = make_app(api)
        with served(app, listen("127.0.0.1", 0), 30) as port:
            client = TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False)
            send(client, port)
            answer = client.post("/v1/completions", json={"prompt": "w6", "max_tokens": 2})
            begun = time.monotonic()
            while api.waiting and time.monotonic() - begun < 60:
                time.sleep(0.05)
            return 0 if answer.status_code == 200 and answer.json()["choices"][0]["text"] and not api.waiting else 1


def _post(route: str, bodies: list[bytes]) -> Callable[[Any, int], None]:
    def send(client: Any, port: int) -> None:
        for body in bodies:
            answer = client.post(route, content=body, headers={"content-type": "application/json"})
            if answer.status_code >= 500:
                raise RuntimeError(f"{body[:200]!r} was answered with {answer.status_code}: {answer.text[:200]}")

    return send


def _raw(sent: bytes) -> Callable[[Any, int], None]:
    def send(client: Any, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            with contextlib.suppress(OSError):  # the server may close early
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 16):
                    found += part
        print(found[:200])
        if b"HTTP/1.1 5" in found:
            raise RuntimeError("answered with 5xx")
        if (
            sent.startswith(b"POST")
            and found.count(b"HTTP/1.1 ") > 1
            and b'"object":"list"' in found.replace(b" ", b"")
        ):
            raise RuntimeError("a smuggled request was answered")

    return send


def serve_probes() -> Iterator[Probe]:
    """Send malformed requests to `rlhf serve`: it stays up and still answers afterwards."""
    sent = [(name, _post(route, bodies)) for name, route, bodies in fields()]
    sent += [(f"request with {name}", _raw(given)) for name, given in raw_requests()]
    for name, send in sent:
        yield Probe("servers", f"rlhf serve, {name}", lambda s=send: serve_odd(s), judge=sound)


# -- environments and tools -------------------------------------------------------------------------------------------

ENVIRONMENT = """
import sys
import torch
from rlhf_lightning.types import Reply
class Odd:
    def reset(self, row):
        return {reset}
    def reply(self, episode):
        if episode.turn: return Reply(done=True)
        return {reply}
"""
REWARDS = ("float('nan')", "float('inf')", "10**400", "True", "'1'", "'x'", "None", "[1]", "torch.ones(2)", "1j",
           "torch.tensor(float('nan'))", "{}", "-1e308", "1e30", "b'1'")  # fmt: skip
REPLIES = ("None", "7", "'w6'", "Reply()", "Reply(5)", "Reply('\\ud800')", "Reply('')", "Reply(ids=[10**9])",
           "Reply(ids=[-1])", "Reply(ids=['x'])", "Reply(ids=[2.5])", "Reply(ids=[])", "Reply(messages=5)",
           "Reply(messages=[5])", "Reply(messages=[{'role': 'user'}])", "Reply(messages=[{'content': 'w6'}])",
           "Reply(messages=[{'role': 'wizard', 'content': 'w6'}])", "Reply(messages=[{'role': 'user', 'content': 5}])",
           "Reply(messages=[{'role': 'assistant', 'content': 'w6'}])", "Reply('w6', turn=5)", "Reply('w6', turn={})",
           "Reply('w6 ' * 100_000)", "Reply('<eos>' * 9)", "Reply('w6', done='no')", "Reply('w6', ids=[6])",
           "sys.exit(0)", "1/0", "exit()", "(_ for _ in ()).throw(KeyboardInterrupt)", "[Reply('w6')]")  # fmt: skip
RESETS = ("None", "7", "''", "[]", "[5]", "[{'role': 'user'}]", "[{'role': 5, 'content': 'w6'}]", "'\\ud800'", "{}",
          "[{'role': 'wizard', 'content': 'w6'}]", "[{'role': 'user', 'content': 5}]", "sys.exit(0)", "1/0",
          "'w6 ' * 50_000", "b'w6'", "row", "(x for x in 'ab')")  # fmt: skip


def with_environment(reply: str, reset: str) -> list[str]:
    """Write an environment and return the command that trains with it."""
    Path("odd_environment.py").write_text(ENVIRONMENT.format(reply=reply, reset=reset))
    Path("prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "w6 w7"}]}\n' * 4)
    return [
        "fit", "--model", "GRPOModule", "--model.init_from", "model", "--model.max_new_tokens", "3",
        "--data", "PromptDataModule", "--data.source", "prompts.jsonl", "--data.rollouts", "1",
        "--data.batch_size", "4", "--data.samples_per_prompt", "2", "--data.environment", "odd_environment.Odd",
        "--model.stop_tokens", '["w8", "w9"]', "--run_name", "odd", "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def environment_probes() -> Iterator[Probe]:
    """Environments and tools with invalid return values: refused in a sentence, or trained on with finite numbers."""
    for reward in REWARDS:
        yield Probe("numbers", f"an environment's reward is {reward}",
                    lambda r=reward: with_environment(f"Reply('w6', reward={r})", "row['prompt']"),
                    judge=one_sentence(reward in ("True", "-1e308", "1e30")))  # fmt: skip
    for reply in REPLIES:
        exits = "exit" in reply or "Interrupt" in reply or "1/0" in reply
        judge = _exit_judge if exits else one_sentence()
        yield Probe("numbers", f"an environment replies with {reply}",
                    lambda r=reply: with_environment(r, "row['prompt']"), judge=judge)  # fmt: skip
    for reset in RESETS:
        exits = "exit" in reset or "1/0" in reset
        yield Probe("numbers", f"an environment begins with {reset}",
                    lambda r=reset: with_environment("Reply('w6')", r),
                    judge=_exit_judge if exits else one_sentence(reset in ("'w6 ' * 50_000",)))  # fmt: skip
    for name, text in said_by_policies().items():
        yield Probe("numbers", f"a policy says {name}", lambda t=text: say(t), judge=sound)


def _exit_judge(status: int, text: str) -> str | None:
    """Judge an exception of a user's own code: it may show a traceback, but status 0 is always wrong."""
    return "status 0" if status == 0 else None


def said_by_policies() -> dict[str, str]:
    """Return turns with which a policy may call its tools."""

    def hermes(arguments: str, name: str = "calculator") -> str:
        return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'

    expressions = ("9**9**9", "9**9**9**9", "-" * 190 + "1", "(" * 90 + "1" + ")" * 90, "1e308*10", "2**-64**64",
        "0**0",
                   "9" * 199, "1/1e-320", "7%0", "1_000", "0x" + "f" * 150, "1.5//1e-300", "~1", "1<<9999", "'a'*10**9",
                   "[1]*10**9", "f'{1}'", "lambda:1", "__import__('os')", "\u0663+1", "1j**64", "True", "1 if 1 else 2",
                   "\ud800", "1\x00", "**" * 99, "9.9e99*9.9e99", "1e-99**64", "64**64**1", "(-8)**.5",
                   "...")  # fmt: skip
    calls = {f"calculator {one[:30]!r}": hermes(json.dumps({"expression": one})) for one in expressions}
    odd = ("null", "[]", '"x"', "{}", '{"expression": null}', '{"expression": 7}', '{"expression": [1]}', '{"x": 1}',
           '{"expression": "1", "expression": "2"}', '{"expression": ' + DEEP + "}", '{"expression": NaN}',
           '{"self": 1, "args": 2}', '{"expression": "' + "9" * 300_000 + '"}', '{"": 1}', '{"expression": 1e999}',
           '{"__class__": 1}', '{"expression": "\\ud800"}')  # fmt: skip
    calls |= {f"arguments {one[:30]}": hermes(one) for one in odd}
    calls |= {
        f"a call of {one!r:.30}": hermes("{}", one) for one in ("os.system", "", "__class__", "x" * 90_000, "\\u0000")
    }
    plain = ("1j", "b'x'", "{1, 2}", "{(1, 2): 3}", "...", "1e999", "[" * 90 + "]" * 90, "[" * 5000, "-" * 5000 + "1",
             "9" * 5000, "'a' * 10**9", "f(1)", "*[1]", "**{}", "x", "'\\ud800'", "(" * 5000)  # fmt: skip
    calls |= {f"call: calculator(expression={one[:20]})": f"call: calculator(expression={one})" for one in plain}
    spaces = " " * 100_000
    texts = (f"<tool_call>{spaces}x", f"[TOOL_CALLS]f{spaces}x", f"{spaces}x", "<tool_call>" * 20_000,
        "</think>" * 20_000,
             "[TOOL_CALLS]" * 20_000, "call: " * 20_000, "call: f()\n" * 5000, '{"name": "f"};' * 9000, "{" * 100_000,
             '{"name"' + ":" * 100_000, "[ARGS]" * 20_000, hermes('{"expression": "1"}') * 3000, "\x00", "\ufffd" * 999,
             "<|" * 50_000, "[CALL_ID]" * 20_000, f"[TOOL_CALLS]f[CALL_ID]{'a' * 100_000}{spaces}")  # fmt: skip
    return calls | {f"{text[:30]!r} of {len(text)} characters": text for text in texts}


def say(text: str) -> int:
    """Pass a turn of a policy to tools; return 0 if the reply is finite, short and valid JSON and UTF-8."""
    from rlhf_lightning.environments.tool_use import LookupTable, ToolEnvironment, calculator
    from rlhf_lightning.types import Episode

    tools = ToolEnvironment([calculator, LookupTable({"a": 1})], reward={"call": 0.1, "wrong": -0.1})
    begun = time.process_time()
    turns = [{"role": "user", "content": "w6"}, {"role": "assistant", "content": text}]
    reply = tools.reply(Episode({}, turns, [], [], 0, 0))
    json.dumps([reply.text, reply.messages, reply.turn], ensure_ascii=False, allow_nan=False).encode()
    said = sum(len(one["content"]) for one in reply.messages)
    calls = max(len((reply.turn or {}).get("tool_calls") or ()), 1)
    return 0 if time.process_time() - begun < 5 and said <= 5000 * calls and abs(reply.reward) <= 0.1 else 1


# -- imports of labels ------------------------------------------------------------------------------------------------


def records() -> Iterator[tuple[str, str, str]]:
    """Yield the name, the tool and the JSON text of invalid records."""
    base = {"fields": {"prompt": "w6", "a_1": "w7", "a_2": "w8"}}
    task = {"data": base["fields"], "annotations": [{"completed_by": 1, "result": [{"value": {"selected": "left"}}]}]}
    odd: list[Any] = [None, True, -1, 10**400, float("nan"), "x" * 300_000, "\x00", "\ud800", [], [[]], {}, EVIL,
                      {"a": {"b": 1}}, [{"value": [1], "rank": 1}], [{"value": "a_1", "rank": 10**400}]]  # fmt: skip
    for place, value in enumerate(odd):
        yield from (
            (f"the whole file is odd value {place}", tool, json.dumps(value)) for tool in ("argilla", "label-studio")
        )
        for key in ("fields", "metadata", "responses", "status", "id"):
            yield f"{key} is odd value {place}", "argilla", json.dumps([{**base, key: value}])
        for field in ("prompt", "a_1"):
            changed = {**base["fields"], field: value}
            yield f"field {field} is odd value {place}", "argilla", json.dumps([{"fields": changed}])
            yield f"data {field} is odd value {place}", "label-studio", json.dumps([{**task, "data": changed}])
        for key in ("value", "user_id", "status"):
            answer = {"value": "a_1", "user_id": "ann", key: value}
            yield f"a response's {key} is odd value {place}", "argilla", json.dumps(
                [{**base, "responses": {"q": [answer]}}])  # fmt: skip
        for key in ("completed_by", "lead_time", "was_cancelled", "result"):
            changed = [{**task["annotations"][0], key: value}]
            yield f"an annotation's {key} is odd value {place}", "label-studio", json.dumps(
                [{**task, "annotations": changed}])  # fmt: skip
        for kind in ("selected", "choices", "ranker"):
            changed = [{"completed_by": 1, "result": [{"value": {kind: value}}, value]}]
            yield f"a result's {kind} is odd value {place}", "label-studio", json.dumps(
                [{**task, "annotations": changed}])  # fmt: skip
    for depth in (100, 500, 900, 980, 100_000):
        nested = "[" * depth + "]" * depth
        for key in ("metadata", "responses"):
            yield f"{key} nested {depth} levels", "argilla", json.dumps(base)[:-1] + f', "{key}": {nested}}}'
        yield f"a field nested {depth} levels", "argilla", json.dumps(base)[:-2] + f', "further": {nested}}}}}'
    many = {"prompt": "w6", **{f"a_{n}": f"w{n}" for n in range(5000)}}
    yield "5,000 completions", "argilla", json.dumps([{"fields": many}])
    yield "a long name of digits", "argilla", json.dumps([{"fields": {"prompt": "w6", "1" * 500_000 + "x": "y"}}])
    yield "a hundred thousand fields", "argilla", json.dumps([{"fields": {f"f{n}x": "y" for n in range(100_000)}}])


def take_over(tool: str, text: str) -> int:
    """Import records into a store and read them back; return the exit status of the import."""
    Path("records.json").write_bytes(text.encode())
    status = rlhf(["annotate", "import", "--store", "labels.db", "--records", "records.json", "--tool", tool])
    if status == 0 and rlhf(["annotate", "export", "--store", "labels.db", "--out", "labels.jsonl"]) not in (0, 1):
        return 70
    return status


def label_probes() -> Iterator[Probe]:
    """Records of Argilla and Label Studio with hostile texts, deep JSON and wrong types."""
    for name, tool, text in records():
        yield Probe(
            "files",
            f"rlhf annotate import, {tool}: {name}",
            lambda k=tool, t=text: take_over(k, t),
            judge=one_sentence(),
        )
    for kind, make in {
        "FIFO": os.mkfifo, "link to /dev/zero": lambda place: os.symlink("/dev/zero", place), "folder": os.mkdir,
    }.items():  # fmt: skip

        def special(made: Callable[[str], Any] = make) -> list[str]:
            made("records.json")
            return ["annotate", "import", "--store", "labels.db", "--records", "records.json", "--tool", "argilla"]

        yield Probe("files", f"rlhf annotate import: the file is a {kind}", special)


def row_probes() -> Iterator[Probe]:
    """Rows with nested columns and invalid turns: dropped and counted, or trained on."""

    def rows(argv: list[str], text: str) -> list[str]:
        sound_row = Path("data.jsonl").read_text()
        Path("data.jsonl").write_bytes(sound_row.encode() + text.encode() + b"\n")
        return argv

    asked = {"role": "user", "content": "w6"}
    odd: tuple[Any, ...] = (5, "5", [5], {"a": 1}, True, "[", [{}], [{"name": 5}], [{"function": 5}], 10**400, "\ud800",
                            float("nan"))  # fmt: skip
    texts = {f"messages whose {key} are {value!r:.20}": json.dumps(
        {"messages": [asked, {"role": "assistant", "content": "w7", key: value}]})
        for key in ("tool_calls", "function_call", "weight", "reasoning_content", "name") for value in odd}  # fmt: skip
    for key in ("tools", "system", "history", "prompt", "completion"):
        texts |= {
            f"{key} {value!r:.20}": json.dumps({"prompt": [asked], "completion": "w7", key: value}) for value in odd
        }
    for depth in (100, 300, 480, 700, 900, 950, 980, 1000, 5000):
        nested = "[" * depth + "]" * depth
        texts[f"a column nested {depth} levels"] = f'{{"prompt": "w6", "completion": "w7", "x": {nested}}}'
        texts[f"tools nested {depth} levels"] = (
            f'{{"prompt": [{json.dumps(asked)}], "completion": "w7", "tools": [{{"name": "f", "p": {nested}}}]}}'
        )
        texts[f"arguments nested {depth} levels"] = (
            f'{{"messages": [{json.dumps(asked)}, {{"role": "assistant", "content": "w7", "tool_calls": '
            f'[{{"name": "f", "arguments": {{"a": {nested}}}}}]}}]}}'
        )
    commands = {"fit": fit("rows"), "audit": ["audit", "data.jsonl", "--tokenizer", "model"],
                "show": ["show", "data.jsonl", "--tokenizer", "model", "--rows", "20"]}  # fmt: skip
    for place, (name, text) in enumerate(texts.items()):
        command = list(commands)[place % 3]
        yield Probe("files", f"rlhf {command}: a row with {name}",
                    lambda a=commands[command], t=text: rows(a, t), judge=one_sentence())  # fmt: skip


# -- reports, projects, sweeps and foreign losses ---------------------------------------------------------------------


def report_probes() -> Iterator[Probe]:
    """Hostile texts and damaged run folders in `rlhf compare` and `rlhf evaluate`."""

    def changed(file: str, content: str | bytes) -> Callable[[], list[str]]:
        def prepare() -> list[str]:
            path = next(Path(RUN).glob(file), Path(RUN) / file)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            return ["compare", RUN, "--unfinished"]

        return prepare

    sample: dict[str, Any] = {"update": 4, "prompt": "w6", "completion": "w7", "score": 1.0}
    odd: tuple[Any, ...] = (
        None,
        7,
        [],
        {},
        "x",
        float("nan"),
        10**400,
        [5],
        [{"role": "user"}],
        True,
        EVIL,
        json.loads(DEEP),
    )
    for key in sample:
        for place, value in enumerate(odd):
            line = json.dumps({**sample, key: value}, ensure_ascii=False)
            yield Probe("page", f"rlhf compare: a sample's {key} is odd value {place}",
                        changed("samples.jsonl", line + "\n"), may_succeed=True)  # fmt: skip
    for place, text in enumerate(("7", "[]", "{", "", "\x00", "{}", "null", DEEP, "\ufeff{}")):
        for file in ("samples.jsonl", "manifest.json", "config.yaml"):
            yield Probe("page", f"rlhf compare: {file} is odd text {place}", changed(file, text), may_succeed=True)
    head = struct.pack("<Q", 2**62)
    for place, content in enumerate((b"", b"x" * 999, bytes(999), head * 9, b"\xff" * 40)):
        yield Probe("page", f"rlhf compare: the events are odd bytes {place}",
                    changed("events*", content), may_succeed=True)  # fmt: skip
    for place, value in enumerate((EVIL, "<b>" * 3000, "$$$", "x" * 100_000, "${x}_^", "\\", "\u202e")):

        def named(text: str = value) -> int:
            path = Path(RUN) / "config.yaml"
            other = Path("runs/lora/version_0/config.yaml")
            for file in (path, other):
                import yaml

                found = yaml.safe_load(file.read_text())
                found["model"]["init_args"]["note"] = text + str(file)
                file.write_text(yaml.safe_dump(found))
            status = rlhf(["compare", RUN, "runs/lora/version_0", "--unfinished", "--by", "model.note"])
            page = Path("comparison/report.html").read_text()
            return status or int("<img src=x" in page or "<script>alert" in page or "<b><b>" in page)

        yield Probe("page", f"rlhf compare: a setting is odd text {place}", named, judge=sound)

        def asked(text: str = value) -> int:
            Path("evil.jsonl").write_text(json.dumps({"prompt": f"w6 {text[:60]}"}) + "\n")
            status = rlhf(["evaluate", "model", "adapter", "--prompts", "evil.jsonl", "--max_new_tokens", "2"])
            page = Path("evaluation/report.html").read_text()
            return status or int("<img src=x" in page or "<script>alert" in page or "<b><b>" in page)

        yield Probe("page", f"rlhf evaluate: a prompt is odd text {place}", asked, judge=sound)


def project_probes() -> Iterator[Probe]:
    """Names of projects, settings of sweeps, and losses of other projects."""
    for name in ("", ".", "..", "/", "../..", "a/../..", "torch", "json", "rlhf_lightning", "data", "tests",
        "configs", "class",
                 "a b", "a;b", "$(touch ran)", "\u0430", "a" * 300, "con\x00", "-x", "model", "data.jsonl", "a\nb",
                 "1a"):  # fmt: skip
        yield Probe("files", f"rlhf init {name[:20]!r}", lambda n=name: ["init", n], judge=one_sentence(False))
    for over in ("model.beta=[]", "model.beta=[", "model.beta=", "=1", "x", "model.beta=1,1", "model.beta=[[1],{a: 2}]",
                 "model.beta=[null]", "model.beta=" + ",".join(map(str, range(20_000))), "model.beta=0..1",
                 "run_name=x",
                 "model.beta=&a [*a]", "model.beta=[!!python/object/apply:os.system ['touch ran']]", "model..=1", ".=1",
                 "model.beta=" + "[" * 9000, "model.learning_rate=nan", "model.none=1", "__class__=1"):  # fmt: skip
        yield Probe("files", f"rlhf sweep --over {over[:40]!r}",
                    lambda o=over: ["sweep", f"{RUN}/config.yaml", "--over", o, "--slurm"],
                    may_succeed=True)  # fmt: skip
    for over in (
        "a=1..1.0001",
        "a=-1e400..1",
        "a=1..1e400",
        "a=0..0",
        "a=log:0..1",
        "a=[]",
        "a=e..e",
        "a=1..2..3",
        "a=1,2",
    ):
        yield Probe(
            "numbers",
            f"rlhf sweep --random --over {over}",
            lambda o=over: [
                *("sweep", f"{RUN}/config.yaml", "--over", f"model.{o}", "--random", "50", "--slurm", "--out", "s"),
            ],
            may_succeed=over in ("a=e..e", "a=1..2..3", "a=1,2"),
        )
    yield Probe("numbers", "rlhf sweep --random 1e9", lambda: [
        "sweep", f"{RUN}/config.yaml", "--over", "model.a=0..1", "--random", "1000000000", "--slurm"])  # fmt: skip
    head = "import torch, sys\nfrom rlhf_lightning.types import PreferenceLogprobs\n"
    for place, body in enumerate((
        "return 7", "return None", "return 'x'", "return torch.tensor(float('nan'))", "return torch.ones(3, 3)", "1/0",
        "sys.exit(0)", "return given", "return torch.zeros(0)", "return torch.ones(1, dtype=torch.complex64)",
        "return torch.tensor(True)", "raise KeyError('x')",
    )):  # fmt: skip

        def foreign(text: str = body) -> list[str]:
            Path("mine.py").write_text(f"{head}def loss(given: PreferenceLogprobs):\n    {text}\n")
            return ["verify", "--foreign", "mine.py:loss"]

        yield Probe("numbers", f"rlhf verify --foreign, odd loss {place}", foreign, judge=_refused)
    for place, text in enumerate(("", "def f(: pass", "sys.exit(0)", "import sys; sys.exit(0)", "def loss(a): pass",
                                  "def loss(a: 'Unknown'): pass", "def loss(): pass", "loss = 7", "\x00",
                                  "1/0")):  # fmt: skip

        def file(content: str = text) -> list[str]:
            Path("mine.py").write_text(content)
            return ["verify", "--foreign", "mine.py:loss"]

        yield Probe(
            "files", f"rlhf verify --foreign, odd file {place}", file, judge=_exit_judge if text == "1/0" else _refused
        )


def _refused(status: int, text: str) -> str | None:
    """Judge an invalid file of losses, which is user code: status 0 is wrong."""
    return "status 0" if status == 0 else None if status in (1, 2) else f"status {status}"
