"""Test the routes: permissions of the page and of other sites, and eight concurrent annotators."""

import json
import re
import shlex
import sqlite3
import threading
from html import unescape

import pytest
from conftest import refused
from starlette.testclient import TestClient

from rlhf_lightning.commands.web_server import HEADERS, LARGEST_BODY, is_loopback
from rlhf_lightning.data.feedback.database import judgements_of
from rlhf_lightning.data.feedback.records import Candidate, Item
from rlhf_lightning.people.hostile_text import shown_text, to_html
from rlhf_lightning.people.server import PageSettings, make_app
from rlhf_lightning.people.serving import AccessPolicy, checked_names, is_name, stored_tokens

from .conftest import label, pair, prefer, ranked_item

SITE = "http://localhost:8765"


@pytest.fixture
def make_client(make_store):
    def make(items=3, name="ann", access=None, settings=None, **policy):
        app = make_app(make_store(items, **policy), access, settings)
        made = TestClient(app, base_url=SITE, follow_redirects=False)
        if name is not None:
            assert made.post("/api/enter", json={"name": name}).status_code == 200
        return made

    return make


def place_of(item):
    return {"store": item["store"], "assignment": item["assignment"]}


def judge(client, item, key="a key of 16 or more", **answer):
    return client.post("/api/judgements", json={"key": key, **place_of(item), **answer})


def item_of(client):
    return client.get("/api/item").json()["item"]


def test_an_annotator_enters_and_labels_every_item(make_client):
    client = make_client(2, name=None)
    assert client.get("/").headers["location"] == "/enter"
    assert client.get("/api/item").status_code == 401
    assert client.post("/api/enter", json={"name": "no <name>"}).status_code == 400
    client.post("/api/enter", json={"name": "ann"})
    assert "What decided?" in client.get("/").text
    told = client.get("/api/item").json()
    assert told["progress"] == {"judged": 0, "skipped": 0, "left": 2, "seconds": 0}
    answer = {"verdict": "ranking", "ranks": [0, 1], "strength": 3, "reasons": ["correct"], "seconds": 4.5}
    first = judge(client, told["item"], **answer).json()
    assert first["next"]["progress"] == {"judged": 1, "skipped": 0, "left": 1, "seconds": 4.5}
    assert judge(client, told["item"], **answer).json()["id"] == first["id"], "the same key"
    assert judge(client, told["item"], key="another key, 16+", verdict="tie").status_code == 409
    undone = client.post("/api/undo", json={"key": "undo with a key 1"}).json()
    assert undone["next"]["item"]["assignment"] == told["item"]["assignment"]
    assert judge(client, told["item"], key="changed my mind 1", verdict="both_bad").status_code == 200
    last = judge(client, item_of(client), key="and the last one 1", verdict="skip").json()["next"]
    assert last["item"] is None and last["state"] == ""


def test_items_reveal_neither_model_nor_order_nor_repeats(make_client):
    client = make_client(1)
    told = client.get("/api/item").text
    assert set(json.loads(told)["item"]) == {"store", "assignment", "prompt", "candidates"}
    assert "models/" not in told and "temperature" not in told and "repeat" not in told and "t0" not in told


def test_the_page_waits_while_completions_are_sampled(make_client):
    client = make_client(0, settings=PageSettings(state=lambda: "being written"))
    assert client.get("/api/item").json()["state"] == "being written"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"ranks": [0, 0]}, 400),
        ({"ranks": "01"}, 400),
        ({"ranks": [0, True]}, 400),
        ({"strength": 2.5}, 400),
        ({"verdict": "best"}, 400),
        ({"verdict": ["tie"]}, 400),
        ({"key": "short"}, 400),
        ({"key": None}, 400),
        ({"assignment": 99}, 409),
        ({"assignment": 2**70}, 400),
        ({"reasons": ["<b>"]}, 400),
        ({"flags": {"harmful": 1}}, 400),
        ({"seconds": "long"}, 400),
        ({"edited": 5, "edited_place": 0}, 400),
    ],
)
def test_invalid_judgements_are_refused(make_client, change, status):
    client = make_client(1)
    body = {"key": "a key of 16 or more", **place_of(item_of(client)), "verdict": "ranking", "ranks": [0, 1], **change}
    answer = client.post("/api/judgements", json=body)
    assert answer.status_code == status and "Traceback" not in answer.text and answer.text
    assert client.get("/api/item").json()["progress"]["judged"] == 0


def test_cross_site_requests_are_refused(make_client):
    client = make_client(1)
    body = {"key": "a key of 16 or more", **place_of(item_of(client)), "verdict": "tie"}

    def post(**headers):
        return client.post("/api/judgements", json=body, headers=headers).status_code

    assert post(origin="http://evil.example") == 403
    assert post(origin="null") == 403
    assert post(origin="http://localhost:9999") == 403, "another port is another site"
    assert post(**{"sec-fetch-site": "cross-site"}) == 403 and post(**{"sec-fetch-site": "same-site"}) == 403
    assert (
        client.post("/api/judgements", content=json.dumps(body), headers={"content-type": "text/plain"}).status_code
        == 415
    )
    assert client.post("/api/undo", data={"key": "a key of 16 or more"}).status_code == 415, "what a form can send"
    assert client.request("DELETE", "/api/item").status_code == 405
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421, "a name made to point here"
    assert client.get("/api/item").json()["progress"]["judged"] == 0
    assert post(origin=SITE, **{"sec-fetch-site": "same-origin"}) == 200


@pytest.mark.parametrize(
    "origin", ["http://[", "http://", "//", "\x7f", "https://localhost:8765", "http://localhost", "http://LOCALHOST:8765x",
               "http://localhost:8765/", "http://a@localhost:8765", "null", "", "http://localhost:99999999"],
)  # fmt: skip
def test_requests_with_another_origin_are_refused(make_client, origin):
    """Origins are compared by scheme, host and port; an invalid origin counts as another site."""
    client = make_client(1)
    answer = client.post("/api/undo", json={"key": "k" * 16}, headers={"origin": origin})
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (403, "nosniff")
    assert client.post("/api/undo", json={"key": "k" * 16}, headers={"origin": SITE}).status_code == 200


@pytest.mark.parametrize(
    "host", ["[", "a b", "localhost:", "localhost:port", "[::1", "a/b", "", "localhost@evil", "\xff"]
)
def test_invalid_host_headers_are_refused(make_client, make_store, host):
    for access in (None, AccessPolicy({"ann": "token"})):
        app = make_app(make_store(0, name=f"{access is None}.db"), access)
        answer = TestClient(app, base_url=SITE, follow_redirects=False).get(
            "/", headers={"host": host.encode("latin-1")}
        )
        assert answer.status_code == 400 and "content-security-policy" in answer.headers


@pytest.mark.parametrize(
    "seconds", ["1e400", "-1e400", "1" + "0" * 400, "-1", "NaN", "Infinity", "true", '"5"', "[1]", "1e7"]
)
def test_invalid_seconds_are_refused(make_client, seconds):
    client = make_client(1)
    body = json.dumps({"key": "k" * 16, **place_of(item_of(client)), "verdict": "tie", "seconds": 0})
    kind = {"content-type": "application/json"}
    answer = client.post("/api/judgements", content=body.replace('"seconds": 0', f'"seconds": {seconds}'), headers=kind)
    assert answer.status_code == 400 and answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/item").json()["progress"]["judged"] == 0


def test_invalid_annotator_names_are_refused(make_client):
    client = make_client(1, name=None)
    for name in (None, True, False, 5, 1.5, ["ann"], {"ann": 1}, "null", "None", "TRUE", "false", "", " ", "a" * 65):
        assert client.post("/api/enter", json={"name": name}).status_code == 400, name
    assert client.post("/api/enter", json={}).status_code == 400 and client.get("/api/item").status_code == 401
    for name in ("null", "True", "ann,none"):
        with refused("invalid-name"):
            checked_names("127.0.0.1", name)


def test_cookies_are_secure_over_https(make_store):
    for scheme, secure in (("http", False), ("https", True)):
        app = make_app(make_store(0, name=f"{scheme}.db"))
        with_token = make_app(make_store(0, name=f"{scheme}-token.db"), AccessPolicy({"ann": "token"}))
        named = TestClient(app, base_url=f"{scheme}://localhost").post("/api/enter", json={"name": "ann"})
        entered = TestClient(with_token, base_url=f"{scheme}://lab.example", follow_redirects=False).get(
            "/enter?token=token"
        )
        assert all(("Secure" in one.headers["set-cookie"]) is secure for one in (named, entered))


def test_a_stale_page_cannot_judge_items_of_another_store(make_client, make_store):
    """In two rounds of a loop, assignments have the same numbers."""
    client, other = make_client(2), TestClient(make_app(make_store(2, name="round_1.db")), base_url=SITE)
    other.post("/api/enter", json={"name": "ann"})
    mine, theirs = item_of(client), item_of(other)
    assert mine["assignment"] == theirs["assignment"] and mine["store"] != theirs["store"]
    assert judge(other, mine, verdict="tie").status_code == 409
    for wrong in (None, 0, "", [mine["store"]]):
        assert judge(other, {**theirs, "store": wrong}, verdict="tie").status_code == 409
    assert other.get("/api/item").json()["progress"]["judged"] == 0
    assert judge(other, theirs, verdict="tie").status_code == 200


def test_the_remaining_count_includes_items_still_to_be_sampled(make_client):
    client = make_client(2, settings=PageSettings(left=lambda count: count + 40))
    assert client.get("/api/item").json()["progress"]["left"] == 42


def test_a_failing_store_is_reported_with_security_headers(make_client, make_store, capsys):
    store = make_store(2, name="gone.db")
    client = TestClient(make_app(store), base_url=SITE)
    client.post("/api/enter", json={"name": "ann"})
    item = item_of(client)
    store.path.unlink()
    answer = judge(client, item, verdict="tie")
    assert answer.status_code == 500 and "was removed or replaced" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "was removed or replaced" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [sqlite3.OperationalError("database or disk is full"), ZeroDivisionError("a bug")])
def test_every_failure_has_the_security_headers(make_store, monkeypatch, failure):
    store = make_store(1)
    client = TestClient(make_app(store), base_url=SITE, raise_server_exceptions=False)
    client.post("/api/enter", json={"name": "ann"})
    monkeypatch.setattr(store, "next", lambda name: (_ for _ in ()).throw(failure))
    answer = client.get("/api/item")
    assert answer.status_code == 500 and HEADERS.items() <= dict(answer.headers).items()
    assert ("disk is full" in answer.text) is isinstance(failure, sqlite3.Error) and "Traceback" not in answer.text


def test_every_refusal_has_the_security_headers(make_client):
    client = make_client(1, name=None)
    answers = [
        client.get(path) for path in ("/absent", "/assets/../server.py", "/assets/%00", "/api/item", "/results/")
    ]
    answers += [
        client.request(method, "/api/item") for method in ("DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE")
    ]
    answers += [
        client.post("/api/enter", content=b"{"),
        client.post("/results", json={}),
        client.get("/?" + "a" * 5000),
    ]
    for answer in answers:
        assert HEADERS.items() <= dict(answer.headers).items(), (answer.request.url, answer.status_code)
        assert answer.status_code < 500


def test_oversized_and_malformed_bodies_are_refused(make_client):
    client = make_client(1)
    large = json.dumps({"key": "k" * 16, "edited": "x" * LARGEST_BODY})
    kind = {"content-type": "application/json"}
    assert client.post("/api/judgements", content=large, headers=kind).status_code == 413

    def pieces():
        yield from (b"x" * 65536 for _ in range(12))

    assert client.post("/api/judgements", content=pieces(), headers=kind).status_code == 413, "no length is announced"
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"key": "\\ud800"}'):
        assert client.post("/api/judgements", content=content, headers=kind).status_code == 400


def test_the_content_security_policy_allows_only_own_scripts(make_client):
    client = make_client(1)
    for path in ("/", "/api/item", "/enter", "/results", "/assets/annotate.js", "/absent"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/enter", "/results"):
        page = client.get(path).text
        assert not re.search(r"<script(?! src=)|\son\w+=|\sstyle=|javascript:|https?://", page), path


LONG = "x" * 24


@pytest.mark.parametrize(
    "content",
    [
        [LONG], [["ann", LONG]], LONG, 7, None, True, {"ann": 7}, {"ann": None}, {"ann": [LONG]}, {"ann": {}},
        {"ann": ""},
        {"ann": "short"}, {"ann": "ü" * 24}, {"ann": " " * 24}, {"ann": LONG, "bob": LONG}, {"owner": 1e400},
    ],
)  # fmt: skip
def test_a_tokens_file_with_other_content_is_refused(content, tmp_path):
    file = tmp_path / "feedback.db.tokens"
    file.write_text(json.dumps(content))
    with refused("bad-tokens-file", str(file), "restore it, or delete it"):
        stored_tokens(tmp_path / "feedback.db", ["ann", "bob"])
    assert json.loads(file.read_text()) == content, "the file stays as it was"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"SQLite format 3"])
def test_a_tokens_file_that_is_not_json_is_refused(content, tmp_path):
    (tmp_path / "feedback.db.tokens").write_bytes(content)
    with refused("bad-tokens-file", "it is not JSON"):
        stored_tokens(tmp_path / "feedback.db", ["ann"])


def test_remote_access_needs_a_token(make_client, tmp_path):
    tokens = stored_tokens(tmp_path / "feedback.db", ["ann", "bob"])
    assert stored_tokens(tmp_path / "feedback.db", ["ann", "bob"]) == tokens, "links stay good"
    assert (tmp_path / "feedback.db.tokens").stat().st_mode & 0o077 == 0
    client = make_client(2, name=None, access=AccessPolicy(tokens), annotators=2)
    assert client.post("/api/enter", json={"name": "ann"}).status_code == 403
    client.cookies.set("annotator", "ann")
    assert client.get("/api/item").status_code == 401, "a name is not a token"
    client.cookies.clear()
    assert client.get("/enter?token=wrong").status_code == 401
    entered = client.get(f"/enter?token={tokens['ann']}", headers={"host": "lab.example:8765"})
    assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
    client.cookies.clear()
    client.cookies.set("annotator", tokens["ann"])
    assert client.get("/api/item").status_code == 200
    assert client.get("/results").status_code == 403 and 'href="/results"' not in client.get("/").text
    client.cookies.clear()
    client.cookies.set("annotator", tokens["owner"])
    assert client.get("/results").status_code == 200
    with refused("invalid-name", "invalid annotator name 'owner'"):
        checked_names("0.0.0.0", "owner")


def test_annotator_names_and_loopback_hosts_are_validated():
    assert is_name("ann.b-2@lab") and not any(map(is_name, ("", "a b", "-a", "a" * 65, "<a>", "a\n")))
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.1.4")


HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "[click](javascript:alert(1)) [data](data:text/html,<script>1</script>)",
    "![pixel](http://evil.example/p.png)",
    "<svg/onload=alert(1)>",
    '```"><script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```',
    "<iframe src='data:text/html,x'></iframe>",
    '[a](<" onmouseover=alert(1) x=">)',
    "| <b onclick=alert(1)>a</b> |\n|---|\n| <a href=javascript:1>b</a> |",
    "<style>body{display:none}</style>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_html_of_hostile_texts_has_only_allowed_tags(text):
    html = to_html(text)
    allowed = {"p", "pre", "code", "span", "table", "thead", "tbody", "tr", "th", "td", "br", "em", "strong"}
    tags = re.findall(r"<\s*/?\s*([^\s>/]*)([^>]*)>", html)
    assert {name for name, _ in tags} <= allowed, html
    assert {rest for _, rest in tags} <= {"", " /", " class='info'", " class='plain'"}, html


def test_invisible_characters_and_control_tokens_are_shown():
    assert shown_text("a\u202eb\u200bc\x00d\r\ne") == "a[U+202E]b[U+200B]c[U+0000]d\ne"
    assert "&lt;|im_end|&gt;" in to_html("stop<|im_end|>"), "control tokens are characters"
    assert shown_text("👩\u200d💻") == "👩\u200d💻"


def test_markdown_is_rendered():
    html = to_html("# Title\n\n- **one**\n- `two`\n\n[words](http://a.example/b)\n\n| a | b |\n|---|---|\n| 1 | 2 |")
    for part in ("<h1>Title</h1>", "<strong>one</strong>", "<code>two</code>", "<td>1</td>"):
        assert part in html
    assert "[words](http://a.example/b)" in html, "a link is its text and its address"
    assert to_html("<b>" * 20_000).startswith("<pre class='plain'>&lt;b&gt;"), "very long texts stay as they are"
    assert len(to_html("[" * 20_000)) >= 20_000 and to_html(">" * 5_000)


def test_html_in_items_is_escaped(make_client):
    client = make_client([Item(HOSTILE[0], (Candidate(HOSTILE[1]), Candidate(HOSTILE[4])))])
    item = item_of(client)
    assert "<script" not in item["prompt"][0]["html"]
    assert all("<img" not in one["html"] and "<svg" not in one["html"] for one in item["candidates"])


def test_results_show_agreement_of_two_annotators(make_client, make_store):
    items = [pair(n) if n % 3 else pair(n, "poor", "good") for n in range(6)]
    store = make_store(items, annotators=2, name="two.db")
    for name in ("ann", "bob"):
        client = TestClient(make_app(store), base_url=SITE)
        client.post("/api/enter", json={"name": name})
        while (item := item_of(client)) is not None:
            left = "good" in item["candidates"][0]["text"]
            ranks = [0, 1] if left else [1, 0]
            assert judge(
                client, item, key=f"{name:-<16}{item['assignment']}", verdict="ranking", ranks=ranks
            ).is_success
    page = client.get("/results").text
    assert "<b>1.00</b> agreement" in page and "over 6 that several people judged" in page
    assert "models/a" in page and re.search(r"models/a</code></td><td>67 %", page)
    assert "<polyline" in page and client.get("/results").status_code == 200


def labelled(make_client, *answers):
    """A client that has judged several pairs."""
    client = make_client(len(answers))
    for number, answer in enumerate(answers):
        assert judge(client, item_of(client), key=f"key {number} of 16 or more", **answer).is_success
    return client


CHOICE = {"verdict": "ranking", "ranks": [0, 1]}


def test_results_count_and_export_labels(make_client):
    client = labelled(make_client, {**CHOICE, "strength": 4}, CHOICE, {"verdict": "tie"}, {"verdict": "skip"})
    page = client.get("/results").text
    for words in ("much better", "chosen", "equally good", "skipped"):
        assert re.search(rf"<td>{words}</td><td>1 <span class=\"soft\">\(25 %\)", page), words
    assert '<text class="tick"' in page and "<span>50</span>" in page
    shown = client.get("/results/labels").text
    assert "models/a" in shown and "ann" in shown and "question 0" in shown
    assert "question 0" not in client.get("/results/labels?before=1").text
    assert client.get("/results/labels?before=x'--").status_code == 200
    rows = [json.loads(line) for line in client.get("/results/labels.jsonl").text.splitlines()]
    assert len(rows) == 4 and rows[0]["annotator"] == "ann"


def test_labels_are_paginated(make_client):
    client = labelled(make_client, *({"verdict": "tie"} for _ in range(30)))
    first = client.get("/labels").text
    assert first.count("data-undo") == 25 and "?before=6" in first
    assert client.get("/labels?before=6").text.count("data-undo") == 5


def test_annotators_can_undo_only_their_own_labels(make_client, make_store):
    client = labelled(make_client, CHOICE, {"verdict": "tie"})
    undo = {"key": "undo with a key 1", "judgement": 1}
    assert client.post("/api/undo", json={**undo, "judgement": 99}).status_code == 400
    assert client.post("/api/undo", json={**undo, "judgement": "1"}).status_code == 400
    client.post("/api/enter", json={"name": "bob"})
    assert client.post("/api/undo", json=undo).status_code == 400
    client.post("/api/enter", json={"name": "ann"})
    undone = client.post("/api/undo", json=undo).json()
    assert undone["next"]["item"]["prompt"][0]["text"] == "question 0"
    assert client.post("/api/undo", json=undo).json()["id"] == undone["id"], "the same key"
    assert client.post("/api/undo", json={**undo, "key": "another key, 16+"}).status_code == 400


def test_only_the_owner_sees_all_labels(make_client, tmp_path):
    tokens = stored_tokens(tmp_path / "feedback.db", ["ann"])
    client = make_client(1, name=None, access=AccessPolicy(tokens))
    client.cookies.set("annotator", tokens["ann"])
    assert client.get("/labels").status_code == 200
    assert client.get("/results/labels").status_code == client.get("/results/labels.jsonl").status_code == 403
    client.cookies.clear()
    assert client.get("/labels").headers["location"] == "/enter"


def test_the_printed_training_command_runs(make_store, policy_folder):
    """The printed command names the store and the policy that wrote most of the completions."""
    from rlhf_lightning.commands.train import run

    items = [
        Item(f"q{n}", (Candidate(f"good {n}", policy_folder), Candidate(f"poor {n}", policy_folder))) for n in range(30)
    ]
    store = make_store(items, name="to train.db")
    for _ in items:
        label(store, "ann", prefer(0))
    client = TestClient(make_app(store), base_url=SITE)
    client.post("/api/enter", json={"name": "ann"})
    command = re.search(r'<code id="command">(.*?)</code>', client.get("/results").text)[1]
    words = shlex.split(unescape(re.sub(r"</?span>", "", command)))
    assert words[:3] == ["rlhf", "fit", "--config"] and f"{store.path}@30" in words
    assert words[words.index("--data.eval_rows") + 1] == "6", "a fifth of the labels"
    tiny = ["--model.lora", "null", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    assert run([*words[1:], *tiny]).model.updates == 1


@pytest.mark.parametrize("labels", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_eight_concurrent_annotators_store_each_label_once(make_store, labels):
    """Every request is sent twice, as a page does after a lost response; two of the items are ranked lists."""
    store = make_store([*(pair(n) for n in range(labels // 4 - 2)), *(ranked_item(n) for n in range(2))], annotators=4)
    app, confirmed, failures = make_app(store), [], []

    def work(name):
        try:
            client = TestClient(app, base_url=SITE)
            client.post("/api/enter", json={"name": name})
            item = item_of(client)
            while item is not None:
                key = f"{name:-<16}{item['assignment']}"
                ranks = list(range(len(item["candidates"])))
                first, again = (judge(client, item, key, verdict="ranking", ranks=ranks).json() for _ in range(2))
                assert first["id"] == again["id"]
                confirmed.append(first["id"])
                item = again["next"]["item"]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"annotator-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    with store.reading() as connection:
        kept = judgements_of(connection)
    assert sorted(one.id for one in kept) == sorted(confirmed) and len(kept) == labels
    assert len({(one.annotator, one.item) for one in kept}) == labels
