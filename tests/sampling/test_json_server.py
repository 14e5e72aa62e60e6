"""Test servers that answer slowly, endlessly or with nonsense, repeat a key, or send control sequences."""

import base64
import html
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import refused

from rlhf_lightning.errors import ModelError, RlhfError, printable
from rlhf_lightning.sampling import json_server
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, finite, redacted
from rlhf_lightning.scoring import FaultTolerant, RemoteScorer

KEY = "sk-proj-Tq7xVb2mKz9LcWd4"


@contextmanager
def answering(reply: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve raw bytes: ``reply`` is called with each connection after its request has arrived."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += connection.recv(1 << 16)
                head, _, sent = asked.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                while len(sent) < length:  # closing before all is read would reset the connection
                    sent += connection.recv(1 << 16)
                reply(connection)
            except OSError:
                pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def body(content: bytes | str, status: str = "200 OK") -> Callable[[socket.socket], None]:
    sent = content.encode() if isinstance(content, str) else content
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(sent)}\r\nConnection: close\r\n\r\n".encode()
    return lambda connection: connection.sendall(head + sent)


def dripping(text: bytes, after: bytes = b"") -> Callable[[socket.socket], None]:
    """Send ``after`` at once, then ``text`` repeatedly, one byte at a time."""

    def reply(connection: socket.socket) -> None:
        connection.sendall(after)
        for _ in range(200):
            for byte in text:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)

    return reply


HEAD = b"HTTP/1.1 200 OK\r\n"
TRICKLES = {
    "status line": dripping(b"H"),
    "headers": dripping(b"X-More: 1\r\n", HEAD),
    "one header": dripping(b"a", HEAD + b"X-Long: "),
    "continue": dripping(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": dripping(b" ", HEAD + b"Content-Length: 100000\r\n\r\n"),
    "chunks": dripping(b"1\r\n \r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
    "a refusal": dripping(b" ", b"HTTP/1.1 400 No\r\nContent-Length: 100000\r\n\r\n"),
    "silence": dripping(b""),
}


@pytest.mark.parametrize("part", TRICKLES)
def test_the_timeout_holds_for_slow_responses(part: str) -> None:
    started = time.monotonic()
    with answering(TRICKLES[part]) as url, pytest.raises(ServerError):
        JSONServer(url, timeout=0.4, retries=1, wait=0.0).post("", {})
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("chunked", [False, True])
def test_an_endless_response_is_aborted(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_server, "LARGEST_ANSWER", 2**20)
    sent = [0]

    def reply(connection: socket.socket) -> None:
        connection.sendall(HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        part = b"10000\r\n" + b"[" * 2**16 + b"\r\n" if chunked else b"[" * 2**16
        while sent[0] < 2**28:
            connection.sendall(part)
            sent[0] += len(part)

    with answering(reply) as url, refused("server-answer-too-large", "MiB", "ask for less"):
        JSONServer(url, timeout=20, retries=3, wait=0.0).post("", {})
    assert sent[0] < 2**25


def test_a_truncated_response_is_retried() -> None:
    answers = iter([HEAD + b'Content-Length: 50\r\n\r\n{"a', HEAD + b'Content-Length: 8\r\n\r\n{"a": 1}'])
    with answering(lambda connection: connection.sendall(next(answers))) as url:
        assert JSONServer(url, wait=0.0).post("", {}) == {"a": 1}


# -- keys -------------------------------------------------------------------------------------------------------------

RAW = KEY.encode()
REPETITIONS = {
    "whole": KEY,
    "bearer": f"Bearer {KEY}",
    "half": KEY[: len(KEY) // 2],
    "other half": KEY[len(KEY) // 2 :],
    "ends": f"{KEY[:7]}****{KEY[-4:]}",
    "dots": f"{KEY[:8]}...{KEY[-4:]}",
    "reversed": KEY[::-1],
    "upper": KEY.upper(),
    "base64": base64.b64encode(RAW).decode(),
    "base64 of the header": base64.b64encode(b"Bearer " + RAW).decode(),
    "base64 of a pair": base64.b64encode(b"u:" + RAW).decode(),
    "urlsafe": base64.urlsafe_b64encode(RAW).decode(),
    "base32": base64.b32encode(RAW).decode(),
    "hex": RAW.hex(),
    "HEX": RAW.hex().upper(),
    "hex with colons": RAW.hex(":"),
    "url": urllib.parse.quote(KEY, safe=""),
    "every byte in url": "".join(f"%{byte:02x}" for byte in RAW),
    "twice in url": urllib.parse.quote("".join(f"%{byte:02x}" for byte in RAW)),
    "html": "".join(f"&#{byte};" for byte in RAW),
    "html hex": "".join(f"&#x{byte:x};" for byte in RAW),
    "json": "".join(f"\\u{byte:04x}" for byte in RAW),
    "c": "".join(f"\\x{byte:02x}" for byte in RAW),
    "spaced": " ".join(KEY),
    "lines": "\n".join(KEY),
    "dashed": "-".join(KEY),
    "zero width": "\u200b".join(KEY),
    "wide": "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in KEY),
    "in a word": f"prefix{KEY}suffix",
    "in html": html.escape(f"<b>{KEY}</b>"),
}


def fragments(text: str) -> set[str]:
    letters = "".join(c for c in text.lower() if c.isalnum())
    return {letters[at : at + 5] for at in range(len(letters) - 4)}


@pytest.mark.parametrize("way", REPETITIONS)
def test_error_messages_contain_no_part_of_the_key(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    said = json.dumps({"error": f"the model is unknown; you sent {REPETITIONS[way]} to us"}, ensure_ascii=False)
    for status in ("401 No", "400 No", "503 Busy"):
        with answering(body(said, status)) as url, pytest.raises(ServerError) as error:
            JSONServer(url, retries=0, api_key="SERVER_KEY").post("/v1", {})
        text = str(error.value)
        hidden = [KEY, REPETITIONS[way] if way not in ("in a word", "in html", "bearer") else KEY]
        ours = fragments("prefixsuffix sent to us")
        assert not any(fragments(text) & (fragments(one) - ours) for one in hidden), text
        assert "the model is unknown; you sent" in text


def test_a_short_key_is_redacted_and_other_words_are_kept() -> None:
    assert redacted("no such key: Bearer ab1", "ab1") == "no such key: Bearer ***"
    assert redacted("the model m7 does not exist", KEY) == "the model m7 does not exist"


def test_errors_of_malformed_responses_contain_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    answers: list[Any] = [
        [KEY], [{KEY: 1}], [{"score": KEY}], [{"score": 1.0, KEY: 2}], [{"score": 1.0, "parts": {"a": KEY}}],
        [{"score": 1.0, "token_rewards": [KEY]}], {KEY: 1},
    ]  # fmt: skip
    for scores in answers:
        with answering(body(json.dumps({"scores": scores}))) as url, pytest.raises(RlhfError) as error:
            RemoteScorer(url, retries=0, api_key="SERVER_KEY")(["p"], ["c"])
        assert not fragments(repr(error.value)) & fragments(KEY)
        assert error.value.__cause__ is None


# -- words on a terminal ----------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202eevil\u2066\u200b\x9b31m\r\x00\ud800\U000e0041"


def test_server_messages_are_escaped_for_the_terminal() -> None:
    with answering(body(json.dumps({"error": HOSTILE}, ensure_ascii=True), "400 No")) as url:
        with pytest.raises(ServerError) as error:
            JSONServer(url, retries=0).post("", {})
        assert all(character.isprintable() for character in str(error.value))
    with answering(body(HOSTILE.encode(errors="replace"), "400 No")) as url:
        with pytest.raises(ServerError, match=r"\\x1b\]0;owned\\x07") as error:
            JSONServer(url, retries=0).post("", {})
        assert all(character.isprintable() for character in str(error.value))


def test_every_error_message_is_printable() -> None:
    """The quoted text may come from a file, a model folder, a row or a person."""
    error = ModelError("some-code", f"the file {HOSTILE} is\nunreadable: Überraschung, 数学 and a\ttab")
    assert all(character.isprintable() or character in "\n\t" for character in str(error))
    assert "Überraschung, 数学 and a\ttab" in str(error) and "\\u202eevil" in str(error)
    assert error.args[1] == error.sentence == str(error)


def test_printable_text_is_unchanged() -> None:
    for text in ("plain\n\ttext", "naïve café", "数学 ", "emoji 🎉", "a\u00a0b"):
        assert printable(text) == text


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, "1", None, [1], {}, float("nan"), float("inf"), 10**400])
def test_non_finite_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="number"):
        finite(value)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ('{"scores": [1e400, 1]}', "not-numbers"),
        ('{"scores": [NaN, 1]}', "not-numbers"),
        ('{"scores": [-Infinity, 1]}', "not-numbers"),
        ('{"scores": [[1], [1]]}', "not-numbers"),
        ('{"scores": [true, 1]}', "not-numbers"),
        ('{"scores": ["1", 1]}', "not-numbers"),
        (f'{{"scores": [1{"0" * 400}, 1]}}', "not-numbers"),
        (f'{{"scores": [1{"0" * 5000}, 1]}}', "server-answer-unusable"),
        ('{"scores": [1]}', "number-of-scores"),
        ('{"scores": [1, 2, 3]}', "number-of-scores"),
        ('{"scores": [{"score": 1}]}', "number-of-scores"),
        ('{"scores": []}', "number-of-scores"),
        ('{"scores": [{"score": 1, "token_rewards": 3}, 1]}', "not-numbers"),
        ('{"scores": [{"score": 1, "token_rewards": [[1]]}, 1]}', "not-numbers"),
        ('{"scores": [{"score": 1, "parts": [1]}, 1]}', "not-numbers"),
        ('{"scores": [{"score": 1, "parts": {"a": 1e999}}, 1]}', "not-numbers"),
        ('{"scores": [{"score": 1, "feedback": 7}, 1]}', "not-numbers"),
        ('{"scores": [{"score": 1, "surprise": 7}, 1]}', "not-numbers"),
        ('{"scores": [{"parts": {"a": 1}}, 1]}', "not-numbers"),
        ('{"scores": {"0": 1, "1": 1}}', "server-answer-unusable"),
        ('{"scores": 1}', "server-answer-unusable"),
        ("[" * 200_000, "server-answer-unusable"),
        ('{"scores": ' + "[" * 200_000, "server-answer-unusable"),
        ("", "server-answer-unusable"),
        ("null", "server-answer-unusable"),
    ],
)  # fmt: skip
def test_a_response_without_scores_is_refused(answer: str, code: str) -> None:
    with answering(body(answer)) as url, refused(code, url):
        RemoteScorer(url, retries=0)(["p", "q"], ["a", "b"])


def test_an_invalid_score_drops_only_its_completion() -> None:
    def reply(connection: socket.socket) -> None:
        body('{"scores": [1e400]}')(connection)

    with answering(reply) as url:
        assert FaultTolerant(RemoteScorer(url, retries=0), on_fault="drop")(["p"], ["a"]) == [None]
