"""Test `rlhf serve`: answers equal our own samples and log-probabilities, and hostile requests are answered."""

import http.client
import json
import random
import socket
import threading
import time

import pytest
import torch
from conftest import EOS, make_tiny_tokenizer, refused
from starlette.testclient import TestClient

from rlhf_lightning import tokenization
from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands import completion_api
from rlhf_lightning.commands.completion_api import LARGEST_BODY, make_app
from rlhf_lightning.commands.completion_requests import CHAT_FIELDS, COMPLETION_FIELDS
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.serve import access_key, policy_api
from rlhf_lightning.commands.web_server import HEADERS, listen, served
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import sample

SITE = "http://localhost:8000"
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def api(policy_folder):
    with policy_api(policy_folder, "tiny", SamplingArguments(max_new_tokens=8, batch_size=4), 60.0) as made:
        yield made


@pytest.fixture
def client(api):
    with TestClient(make_app(api), base_url=SITE) as made:
        yield made


@pytest.fixture(scope="module")
def ours(policy_folder):
    """Return our own samples of a prompt: texts, ids and log-probabilities."""
    policy = load_policy(policy_folder).eval()
    tokenizer = tokenization.load_tokenizer(policy_folder)

    def draw(prompt, n=1, seed=0, tokens=8, **settings):
        ids = torch.tensor(tokenization.encode_prompt(tokenizer, prompt))
        ends = tokenization.end_token_ids(tokenizer)
        drawn = sample(policy, [ids] * n, torch.arange(n), SamplingSettings(tokens, **settings), seed, ends)
        return [
            (tokenization.completion_text(tokenizer, one.tolist()), one.tolist(), logprobs.tolist())
            for one, logprobs in zip(drawn.ids, drawn.logprobs, strict=True)
        ]

    draw.policy, draw.tokenizer = policy, tokenizer
    return draw


def ask(client, chat=True, status=200, **body):
    route = "/v1/chat/completions" if chat else "/v1/completions"
    answer = client.post(route, json={"messages": CHAT, **body} if chat else body)
    assert answer.status_code == status, answer.text
    return answer.json()


def events(text):
    """Return the events of a stream, without the final marker."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}])
def test_responses_equal_samples_of_the_policy(client, ours, settings):
    body = {"n": 3, "seed": 11, "max_tokens": 12, "return_token_ids": True, "logprobs": True, **settings}
    for chat, prompt in ((True, CHAT), (False, "abc")):
        further = {"messages": CHAT} if chat else {"prompt": "abc", "logprobs": 0}
        answer = ask(client, chat, **{**body, **further})
        expected = ours(prompt, 3, 11, 12, **settings)
        for choice, (text, ids, logprobs) in zip(answer["choices"], expected, strict=True):
            said = choice["message"]["content"] if chat else choice["text"]
            listed = choice["logprobs"]
            found = [one["logprob"] for one in listed["content"]] if chat else listed["token_logprobs"]
            assert said == text and choice["token_ids"] == ids
            assert found == pytest.approx(logprobs, abs=1e-4)
            assert choice["finish_reason"] == ("stop" if ids[-1] == EOS or len(ids) < 12 else "length")
        assert answer["usage"]["completion_tokens"] == sum(len(ids) for _, ids, _ in expected)


def test_concurrent_requests_are_decoded_in_one_batch(api, ours):
    """Twelve concurrent clients get the same answers as each client alone."""
    steps, step = [], api.batch._step

    def counted():
        steps.append(len(api.batch.active))
        step()

    api.batch._step = counted
    found = {}

    def work(number):
        client = TestClient(make_app(api), base_url=SITE)
        content = "question" + "?" * number
        answer = ask(client, messages=[{"role": "user", "content": content}], seed=number, max_tokens=20)
        found[content] = (number, answer["choices"][0]["message"]["content"])

    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        api.batch._step = step
    assert max(steps) > 1
    for content, (number, text) in found.items():
        assert text == ours([{"role": "user", "content": content}], 1, number, 20)[0][0]


def test_stream_chunks_join_to_the_whole_answer(client, ours):
    body = {"messages": CHAT, "seed": 3, "n": 2, "max_tokens": 15, "stream": True, "logprobs": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    pieces = events(client.post("/v1/chat/completions", json=body).text)
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] > 0
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"} and len({p["id"] for p in pieces}) == 1
    texts, tokens, reasons = ["", ""], [0, 0], [None, None]
    for choice in (choice for piece in pieces for choice in piece["choices"]):
        texts[choice["index"]] += choice["delta"].get("content", "")
        tokens[choice["index"]] += len((choice["logprobs"] or {"content": []})["content"])
        reasons[choice["index"]] = choice["finish_reason"]
    expected = ours(CHAT, 2, 3, 15)
    assert texts == [text for text, _, _ in expected] and tokens == [len(ids) for _, ids, _ in expected]
    assert all(reason in ("stop", "length") for reason in reasons)
    plain = events(client.post("/v1/completions", json={"prompt": "abc", "seed": 3, "stream": True}).text)
    assert "".join(piece["choices"][0]["text"] for piece in plain) == ours("abc", 1, 3)[0][0]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_completion_across_token_boundaries(client, ours, stream):
    whole = ours("abc", 1, 5, 30)[0][0]
    for start in range(0, len(whole) - 3, 2):
        stop = whole[start : start + 3]
        if "\ufffd" in stop:
            continue
        body = {"prompt": "abc", "seed": 5, "max_tokens": 30, "stop": ["not in it", stop], "stream": stream}
        answer = client.post("/v1/completions", json=body)
        if stream:
            choices = [piece["choices"][0] for piece in events(answer.text)]
            text, reason = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
        else:
            (choice,) = answer.json()["choices"]
            text, reason = choice["text"], choice["finish_reason"]
            assert choice["stop_reason"] == stop
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_echo_returns_prompt_logprobs(client, ours):
    prompts = ["abc", [20, 30, 40, 50], "x"]
    rows = [tokenization.encode_prompt(ours.tokenizer, one) if isinstance(one, str) else one for one in prompts]
    for ids in rows:
        body = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
        (choice,) = ask(client, False, **body)["choices"]
        table = choice["logprobs"]
        with torch.no_grad():
            logprobs = ours.policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprobs[place, index]) for place, index in enumerate(ids[1:])]
        assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
        assert table["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        for place, top in enumerate(table["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(float(logprobs[place].max()), abs=1e-4) and 2 <= len(top) <= 3
        assert len(table["tokens"]) == len(ids) + 1 == len(table["text_offset"])
    answer = ask(client, False, prompt=prompts, echo=True, max_tokens=0, logprobs=0, n=2)
    assert [choice["text"] for choice in answer["choices"]][::2] == ["abc", ours.tokenizer.decode(prompts[1]), "x"]
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_have_ranks(client, ours):
    (choice,) = ask(client, prompt_logprobs=1, max_tokens=1, return_token_ids=True)["choices"]
    ids, listed = choice["prompt_token_ids"], choice["prompt_logprobs"]
    assert ids == tokenization.encode_prompt(ours.tokenizer, CHAT) and listed[0] is None and len(listed) == len(ids)
    for index, entries in zip(ids[1:], listed[1:], strict=True):
        assert entries[str(index)]["rank"] >= 1 and 1 <= len(entries) <= 2
        assert any(entry["rank"] == 1 for entry in entries.values())


def test_template_arguments_and_tools_reach_the_template(tmp_path):
    from transformers import LlamaForCausalLM

    from .conftest import save

    folder = save(tmp_path / "model", LlamaForCausalLM)
    template = (
        "{% if mood is defined %}{{ mood }}{% endif %}{% for tool in tools or [] %}{{ tool['function']['name'] }}"
        "{% endfor %}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% for call in message.get('tool_calls') or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    make_tiny_tokenizer(template).save_pretrained(folder)
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}  # fmt: skip
    with policy_api(folder, None, SamplingArguments(max_new_tokens=2), 60.0) as made, TestClient(
        make_app(made), base_url=SITE
    ) as client:  # fmt: skip

        def rendered(**body):
            answer = client.post("/tokenize", json=body)
            assert answer.status_code == 200, answer.text
            return client.post("/detokenize", json={"tokens": answer.json()["tokens"]}).json()["prompt"]

        assert rendered(messages=CHAT, tools=[tool], chat_template_kwargs={"mood": "glad"}).startswith(
            "gladadd<|user|>"
        )
        assert rendered(messages=CHAT).startswith("<|user|>hello"), "arguments of one request stay with it"
        turns = [*CHAT, called, {"role": "tool", "content": "2", "tool_call_id": "c1"}]
        assert '"name": "add"' in rendered(messages=turns, tools=[tool])
        ids = ask(client, messages=CHAT, tools=[tool], return_token_ids=True)["choices"][0]["prompt_token_ids"]
        assert ids == client.post("/tokenize", json={"messages": CHAT, "tools": [tool]}).json()["tokens"]
        assert rendered(messages=[{"role": "user", "content": "<|end|>"}]).count("<|end|>") == 2
        ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": "<|end|>"}]}).json()["tokens"]
        assert ids.count(5) == 1, "a message that spells a control token is text"
        for number in range(20):
            rendered(messages=CHAT, chat_template_kwargs={"mood": str(number)})
        assert len(made.text.with_args) <= 8


def test_tool_calls_are_returned_in_openai_format(client, monkeypatch):
    said = 'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    monkeypatch.setattr("rlhf_lightning.commands.completion_requests.Text.decode", lambda self, ids, _=False: said)
    tool = {"type": "function", "function": {"name": "hello", "parameters": {}}}
    body = {"tools": [tool], "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 3}
    monkeypatch.setattr("rlhf_lightning.tokenization.encode_prompt", lambda *_: [30, 40])
    (choice,) = ask(client, **body)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert choice["message"]["content"] == "Let me see."
    pieces = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert pieces[-1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "add"
    for broken in ('<tool_call>{"name": 5}</tool_call>', "<tool_call>" + "[" * 100_000, "plain words"):
        said = broken
        (choice,) = ask(client, **body)["choices"]
        assert "tool_calls" not in choice["message"] and choice["finish_reason"] in ("stop", "length")


def test_models_and_health_endpoints(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["max_model_len"] == 512 and client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other/one").status_code == 404 and client.get("/health").status_code == 200
    assert ask(client, status=404, model="gpt-4")["error"]["code"] == "not_found"
    assert client.get("/v1/engines").json()["error"]["code"] == "not_found"


WRONG = {
    "temperature": [-1, "hot", True, 10**400], "top_p": [0, -(10**400)],
    "top_k": [1.5], "max_tokens": [-1, 0, 10**9, 10**30],
    "n": [0, 100_000], "seed": [2**64, "x"], "stop": [{"a": 1}, ["a"] * 17, [5], "x" * 300],
    "stop_token_ids": [[-1], [10**9]], "logprobs": [1], "top_logprobs": [3], "prompt_logprobs": [21],
    "stream": ["yes"], "stream_options": [[1]], "tool_choice": ["required"], "chat_template_kwargs": [[1]],
    "messages": [
        [], "hello", [{"role": "wizard", "content": "x"}], [5], [{"role": "user", "content": ""}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "x", "cache_control": 1}], [{"role": "user", "content": "\ud800"}],
        [{"role": "assistant", "tool_calls": 5}], [{"role": "assistant", "tool_calls": "true"}],
    ],
    "continue_final_message": [True], "temprature": [1], "presence_penalty": [0.5],
    "response_format": [{"type": "json_object"}], "logit_bias": [{"5": 1}],
}  # fmt: skip
FURTHER = [
    ({"stream": True, "prompt_logprobs": 1}, "stream"), ({"tools": [5]}, "messages"),
    ({"tools": [{"function": "f"}]}, "messages"), ({"\ud800": 1}, "ud800"), ({"x" * 4_000_000: 1}, "xxx"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "and"}]}, "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"), [*(({name: value}, name) for name, many in WRONG.items() for value in many), *FURTHER]
)
def test_wrong_fields_are_refused_by_name(client, change, field):
    body = {"messages": CHAT, **change}
    answer = client.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    said = answer.json()["error"]
    assert answer.status_code == 400 and said["code"] == "bad-request" and field in (said["param"] or ""), said
    assert said["message"] and "Traceback" not in said["message"]


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [5, "x"], ["x", 5], 5, None, {"a": 1}, [[10**9]], [-1], [True], ["x"] * 300, "\ud800"]
)
def test_invalid_prompts_are_refused(client, prompt):
    answer = client.post(
        "/v1/completions", content=json.dumps({"prompt": prompt}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt", answer.text


@pytest.mark.parametrize(
    "content", [b'{"n": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"tools": ' + b"[" * 300 + b"]" * 300 + b"}",
                b'{"model": ' + b"[" * 960 + b"]" * 960 + b"}",
                b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 50_000,
                b'{"max_tokens": ' + b"9" * 9000 + b"}",
                b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}',
                b'{"prompt": "x", "top_p": -Infinity}'],
)  # fmt: skip
def test_malformed_json_is_refused(client, content):
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert HEADERS.items() <= dict(answer.headers).items()


def test_random_request_bodies_give_status_200_or_400(client, api):
    """A fifth of the fields have arbitrary values; answers are 200 or 400, and the batch is empty afterwards."""
    lot = random.Random(0)
    odd = [None, True, -1, 0, 1, 2.5, 10**20, "", "x", [], {}, [1], ["x"], {"a": None}, [None], "\u0000", [[1]]]
    fields = sorted(CHAT_FIELDS | COMPLETION_FIELDS)
    for number in range(150):
        chat = number % 2 == 0
        body = {"max_tokens": 2, **({"messages": CHAT} if chat else {"prompt": "abc"})}
        body |= {lot.choice(fields): lot.choice(odd) for _ in range(lot.randrange(1, 4))}
        body.pop("stream", None)
        answer = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
    assert api.waiting == 0


def test_cross_site_oversized_and_unauthenticated_requests_are_refused(api, client, monkeypatch):
    def post(made=client, **headers):
        return made.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1}, headers=headers).status_code

    assert post() == 200 and post(origin="http://evil.example") == 403
    assert post(**{"sec-fetch-site": "cross-site"}) == 403 and post(host="evil.example") == 421
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and answer.headers["connection"] == "close"
    assert "Content-Type: application/json" in answer.json()["error"]["message"]
    large = b'{"prompt": "' + b"x" * LARGEST_BODY + b'"}'
    assert (
        client.post("/v1/completions", content=large, headers={"content-type": "application/json"}).status_code == 413
    )
    with TestClient(make_app(api, "a key"), base_url="http://lab.example:8000") as guarded:
        assert post(guarded) == 401 and post(guarded, authorization="Bearer a wrong one") == 401
        assert guarded.get("/v1/models").status_code == 401 and guarded.get("/health").status_code == 200
        assert post(guarded, authorization="Bearer a key") == 200
    with refused("no-key", "0.0.0.0"):
        access_key("0.0.0.0", None)
    monkeypatch.setenv("SERVER_KEY", "a key")
    assert access_key("0.0.0.0", "SERVER_KEY") == "a key" and access_key("127.0.0.1", None) is None
    with refused("no-such-variable"):
        access_key("0.0.0.0", "NOT_THERE")


def test_a_full_queue_gives_429_and_slow_requests_time_out(api, client, monkeypatch):
    monkeypatch.setattr(completion_api, "MOST_WAITING", 2)
    assert ask(client, status=429, n=3)["error"]["type"] == "rate_limit_error"
    monkeypatch.undo()
    monkeypatch.setattr(api, "timeout", 0.05)
    body = {"prompt": "abc", "max_tokens": 490, "ignore_eos": True, "n": 64}
    assert client.post("/v1/completions", json=body).json()["error"]["code"] == "timeout"
    answer = client.post("/v1/completions", json={**body, "stream": True}).text
    assert '"timeout"' in answer and "[DONE]" not in answer
    monkeypatch.undo()
    assert len(ask(client, False, prompt="abc")["choices"]) == 1 and api.waiting == 0


def test_a_disconnected_client_frees_its_slots(api):
    with served(make_app(api), listen("127.0.0.1", 0)) as port:
        body = json.dumps({"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "n": 100}).encode()
        lines = ("POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json")
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head.encode() + body)
                time.sleep(0.2)
        until = time.monotonic() + 20
        while api.waiting and time.monotonic() < until:
            time.sleep(0.05)
        assert api.waiting == 0
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(
            "POST", "/v1/completions", b'{"prompt": "abc", "max_tokens": 2}', {"content-type": "application/json"}
        )
        assert connection.getresponse().status == 200


def test_remote_engine_samples_equal_the_policys(api, ours):
    """The trainer gets ids and log-probabilities from the server that equal the policy's."""
    with served(make_app(api), listen("127.0.0.1", 0)) as port:
        engine = RemoteEngine(f"http://localhost:{port}", "tiny", requests=4)
        prompts = [torch.tensor([20, 30, 40]), torch.tensor([50])]
        ends = tokenization.end_token_ids(ours.tokenizer)
        policy = ours.policy.requires_grad_(False)
        drawn = engine.sample(policy, prompts, torch.arange(2), SamplingSettings(10, temperature=0.7), 3, ends)
    for prompt, ids, logprobs in zip(prompts, drawn.ids, drawn.logprobs, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.cat([prompt, ids]).unsqueeze(0)).logits[0] / 0.7
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logprobs, expected.to(logprobs.dtype), atol=1e-4, rtol=1e-4)


def test_rlhf_serve_serves_the_newest_model_of_a_run(policy_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "sft"
    (run / "version_0").mkdir(parents=True)
    (run / "version_0" / "model").symlink_to(policy_folder, target_is_directory=True)
    asked = {}

    class Server:
        def run(self, sockets):
            asked["port"] = sockets[0].getsockname()[1]

    monkeypatch.setattr("rlhf_lightning.commands.web_server.make_server", lambda app, seconds: Server())
    assert rlhf(["serve", str(run), "--port", "0", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert f"{run} at http://127.0.0.1:{asked['port']}/v1" in said
    assert rlhf(["serve", str(run), "--host", "0.0.0.0"]) == 1 and "--api_key" in capsys.readouterr().err
    assert rlhf(["serve", str(run), "--timeout", "0"]) == 1
