"""Test the annotation server with endless requests, too many connections, and malformed input."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from rlhf_lightning.commands import web_server
from rlhf_lightning.commands.web_server import HEADERS, listen, served
from rlhf_lightning.people.server import PAGE, make_app

START = b"POST /api/enter HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture
def port(make_store, monkeypatch):
    """A page with time limits of one second for a request and two seconds for its response."""
    monkeypatch.setattr(web_server, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(web_server, "RESPONSE_SECONDS", 2.0)
    monkeypatch.setattr(web_server, "MOST_CONNECTIONS", 8)
    with served(make_app(make_store(3)), listen("127.0.0.1", 0)) as port:
        yield port


def connect(port):
    made = socket.create_connection(("127.0.0.1", port))
    made.settimeout(15)
    return made


def everything(connection):
    """Return what the server sends until it closes the connection."""
    said = b""
    try:
        while more := connection.recv(65536):
            said += more
    except ConnectionError:
        pass
    return said


def page(port):
    with urllib.request.urlopen(f"http://localhost:{port}/enter", timeout=15) as answer:
        return answer.status


STALLED = {
    b"": b"",
    b"GET / HT": b"",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n": b"",
    START + b"content-length: 50\r\n\r\n": b" 408 ",
    START + b"content-length: 50\r\n\r\n{": b" 408 ",
    START + b'transfer-encoding: chunked\r\n\r\n5\r\n{"na': b" 408 ",
    b"GET /enter HTTP/1.1\r\nhost: localhost\r\n\r\nGET": b" 200 ",
}
"""Beginnings of requests, and the status of the answer, if any."""


def test_stalled_requests_are_closed(port):
    connections = [connect(port) for _ in STALLED]
    for connection, sent in zip(connections, STALLED, strict=True):
        connection.sendall(sent)
    start = time.monotonic()
    for connection, (sent, status) in zip(connections, STALLED.items(), strict=True):
        with connection:
            said = everything(connection)
        assert time.monotonic() - start < 12 and (status in said if status else said == b""), (sent, said)
    assert page(port) == 200


def test_slow_headers_and_bodies_are_closed(port):
    for start in (b"GET / HTTP/1.1\r\nx: ", START + b"content-length: 5000\r\n\r\n"):
        with connect(port) as connection:
            connection.sendall(start)
            begun = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() - begun < 20:
                    connection.sendall(b"a")
                    time.sleep(0.1)
            assert time.monotonic() - begun < 15


def test_excess_connections_are_closed_and_the_page_recovers(port, monkeypatch):
    monkeypatch.setattr(web_server, "REQUEST_SECONDS", 60.0)
    held = [connect(port) for _ in range(8)]
    for one in held:
        one.sendall(b"GET / HTTP/1.1\r\n")
    for _ in range(20):
        with connect(port) as further:
            assert everything(further) == b""
    for one in held:
        one.close()
    for _ in range(50):
        try:
            assert page(port) == 200
            break
        except OSError:
            time.sleep(0.1)
    else:
        pytest.fail("the page does not recover")


def test_an_unread_response_is_closed(port):
    with connect(port) as connection:
        request = b"GET /assets/annotate.js HTTP/1.1\r\nhost: localhost\r\n\r\n"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begun = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begun < 20:
                connection.sendall(request * 100)
        assert time.monotonic() - begun < 18
    assert page(port) == 200


@pytest.mark.parametrize("sent", [b"\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000])
def test_responses_to_malformed_requests_have_security_headers(port, sent):
    with connect(port) as connection:
        connection.sendall(sent)
        said = everything(connection).decode()
    assert said.startswith("HTTP/1.1 400 ") and all(f"{name}: {value}" in said for name, value in HEADERS.items())


BROWSER = """
const calls = [];
const timers = [];
const handler = {
  get: (target, name) => name in target ? target[name] : target[name] = node(),
  set: (target, name, value) => (target[name] = value, true),
};
function node() {
  const made = function () {};
  return new Proxy(Object.assign(made, {
    classList: { toggle() {}, add() {}, remove() {} }, dataset: {}, style: {}, querySelectorAll: () => [],
    querySelector: () => null, addEventListener() {}, replaceChildren() {}, append() {}, textContent: "", hidden: false,
    setAttribute() {}, children: [],
  }), handler);
}
const nodes = {};
globalThis.document = { getElementById: (id) => nodes[id] ??= node(), addEventListener() {}, querySelectorAll: () => [],
  createElement: node, body: node(), hidden: false, querySelector: () => null };
globalThis.window = { scrollTo() {}, getSelection: () => "",
  matchMedia: () => ({ matches: false, addEventListener() {} }) };
globalThis.location = { assign: (to) => calls.push(`to ${to}`) };
globalThis.setInterval = () => 0;
globalThis.setTimeout = (work) => { if (timers.push(1) <= 5) Promise.resolve().then(work); return 1; };
globalThis.clearTimeout = () => {};
const answers = JSON.parse(process.argv[2]);
globalThis.fetch = async (path) => {
  calls.push(path);
  const status = answers[Math.min(calls.length, answers.length) - 1];
  if (status === 0) throw new Error("no connection");
  return { status, ok: status < 400, text: async () => "a reason", json: async () => ({}) };
};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not installed")
@pytest.mark.parametrize(
    ("answers", "calls"),
    [([500], 1), ([503], 1), ([400], 1), ([403], 1), ([0, 0, 500], 3), ([0], 6), ([401], 2)],
)
def test_the_page_retries_without_a_response_and_stops_after_an_error(tmp_path, answers, calls):
    """Status 401 leads to the login page; the clock of this browser stops after five waits."""
    script = tmp_path / "page.js"
    ending = "\nsetImmediate(() => console.log(JSON.stringify({ calls, said: at('status').textContent })));"
    script.write_text(BROWSER + (PAGE / "assets" / "annotate.js").read_text().replace('"use strict";', "") + ending)
    found = subprocess.run(
        ["node", str(script), json.dumps(answers)], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert len(told["calls"]) == calls, told
    if answers[-1] >= 400 and answers[-1] != 401:
        assert "a reason" in told["said"] and "Reload" in told["said"]
