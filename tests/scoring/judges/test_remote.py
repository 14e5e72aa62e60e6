"""A judge and a critic behind a real server in this process: requests, letters, missing answers."""

import math

import pytest
from conftest import refused

from rlhf_lightning.constitution.labelling import LabelSettings, label_pairs
from rlhf_lightning.constitution.revision import RevisionSettings, Written, revise
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.json_server import ServerError
from rlhf_lightning.scoring.judges import RemoteJudge, RemoteWriter, load_judge
from rlhf_lightning.scoring.judges.judge import JudgeAnswer, Pair
from rlhf_lightning.scoring.judges.remote import ChatServer, letters_in, verdict_in

from .chat_server import place, said, serving
from .test_local import RULES, question

LOG = math.log


def likes_hello(body):
    """Prefer the option with Hello in either position; answer with its letter after a bracket."""
    first = body["messages"][-1]["content"].find("Hello") < body["messages"][-1]["content"].find("Go.")
    a, b = (LOG(0.8), LOG(0.1)) if first else (LOG(0.2), LOG(0.6))
    letter = "A" if first else "B"
    places = [
        place("(", LOG(0.9), **{"(": LOG(0.9)}),
        place(letter, max(a, b), A=a, B=b, Neither=-9.0),
        place(")", 0.0),
    ]
    return said(f"({letter})", places)


def test_a_server_can_label_pairs():
    with serving(likes_hello) as server:
        judge = load_judge(server.url + "/v1", {"model": "big", "wait": 0.01})
        found = label_pairs(judge, RULES, [Pair("Hi", "Hello!", "Go.", 1.0)])
    (one,) = found.pairs
    assert one.comparisons[0].probability == pytest.approx(8 / 9)
    assert one.comparisons[0].swapped_probability == pytest.approx(2 / 8)
    assert one.preference == pytest.approx((8 / 9 + 3 / 4) / 2)
    assert found.metrics["letter_mass"] == pytest.approx(0.9 * (0.9 + 0.8) / 2)
    assert found.metrics["agreement"]["mean"] == 1.0 and found.metrics["bounded"] == 0
    body = server.bodies[0]
    assert body["model"] == "big" == judge.name and body["logprobs"] is True and body["top_logprobs"] == 20
    assert body["temperature"] == 0 and body["messages"][-1]["role"] == "user"
    assert "continue_final_message" not in body


def test_begin_prefills_the_answer():
    with serving(lambda body: said("A)", [place("A", -0.1, A=-0.1, B=-2.4)])) as server:
        judge = RemoteJudge(server.url, "big", begin=True)
        (answer,) = judge([question("Go.", "Hello!")])
    assert answer[:2] == pytest.approx((-0.1, -2.4))
    assert server.bodies[0]["messages"][-1] == {"role": "assistant", "content": "The better answer is ("}
    assert server.bodies[0]["continue_final_message"] is True and server.bodies[0]["add_generation_prompt"] is False


def test_letter_probabilities_are_summed_over_variants_and_positions():
    # "A" directly or after a bracket: 0.1 + 0.6 * 0.5; "B": 0.2 + 0.05 (with a space) + 0.6 * 0.4.
    places = [
        ("(", LOG(0.6), [("(", LOG(0.6)), ("B", LOG(0.2)), ("A", LOG(0.1)), (" B", LOG(0.05)), ("Be", LOG(0.01))]),
        ("A", LOG(0.5), [("A", LOG(0.5)), ("B)", LOG(0.4))]),
        (")", 0.0, [(")", 0.0)]),
    ]
    found = letters_in(places)
    assert (math.exp(found.first_logprob), math.exp(found.second_logprob)) == pytest.approx((0.4, 0.49))
    assert not found.bounded and not found.failure


def test_a_missing_letter_is_bounded_by_the_smallest_listed_probability():
    found = letters_in([("A", LOG(0.9), [("A", LOG(0.9)), ("I", LOG(0.05)), ("The", LOG(0.02))])])
    assert found.bounded and math.exp(found.second_logprob) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([("I", -0.1, [("I", -0.1), ("The", -3.0)])], "other_words"),
        ([("JudgeAnswer", -0.1, [("JudgeAnswer", -0.1)]), ("A", 0.0, [("A", 0.0), ("B", -9.0)])], "other_words"),
        ([("(", -0.1, [("(", -0.1)])], "empty"),
        ([], "empty"),
    ],
)
def test_other_words_give_no_answer(places, reason):
    assert letters_in(places).failure == reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A", JudgeAnswer(0.0, -math.inf)), (" (B).", JudgeAnswer(-math.inf, 0.0)),
        ("**A**", JudgeAnswer(0.0, -math.inf)),
        ("tie", JudgeAnswer(-LOG(2), -LOG(2))), ("Tie.", JudgeAnswer(-LOG(2), -LOG(2))),
    ],
)  # fmt: skip
def test_verdicts_are_read_from_text(text, answer):
    assert verdict_in(text) == answer


@pytest.mark.parametrize("text", ["A or B", "Both", "Answer A", "a", "C", "A is better than B", "AB", "neither, a tie"])
def test_ambiguous_texts_give_no_verdict(text):
    assert verdict_in(text).failure == "other_words"
    assert verdict_in(" ").failure == "empty"


def test_a_server_without_logprobs_can_be_read_as_text():
    replies = iter(["(A)", "(B)", "I like both."] * 2)
    with serving(lambda body: said(next(replies))) as server:
        with refused("server-answer-unusable", "top_logprobs of an answer ", "; set read to text"):
            RemoteJudge(server.url, "big", requests=1)([question("x", "y")])
        judge = RemoteJudge(server.url, "big", read="text", requests=1)
        found = label_pairs(judge, RULES, [Pair("p", "y", "x"), Pair("q", "x", "y")])
    assert found.metrics["parse_failures"] == {"other_words": 1} and "logprobs" not in server.bodies[-1]
    assert found.pairs[0].preference is None and found.pairs[1].preference == pytest.approx(1.0)


def test_reasoning_is_requested_before_the_letter():
    def reply(body):
        asks_for_letter = len(body["messages"]) == 3
        return said("(B)", [place("(B", -0.2, **{"(B": -0.2, "(A": -2.0})]) if asks_for_letter else said("Hm, B.")

    with serving(reply) as server:
        judge = RemoteJudge(server.url, "big")
        settings = LabelSettings(reasoning=True)
        found = label_pairs(judge, RULES, [Pair("p", "x", "y")], settings).pairs[0]
    assert found.comparisons[0].reasoning == ("Hm, B.", "Hm, B.")
    assert found.comparisons[0].probability == 0.4 and found.preference == pytest.approx(0.5)
    thought = next(body for body in server.bodies if len(body["messages"]) == 1)
    assert thought["messages"][0]["content"].endswith("Let us weigh them step by step:")


def test_a_server_can_be_the_critic():
    with serving(
        lambda body: said(f"text of {body['seed']}", reason="stop" if body["seed"] % 2 else "length")
    ) as server:
        server.busy = 2
        chat = ChatServer(server.url, "big", wait=0.01)
        writer = RemoteWriter(chat, SamplingSettings(max_new_tokens=9, temperature=0.7), seed=4)
        prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(3)]
        settings = RevisionSettings(rounds=1, keep_unfinished=True)
        chains = revise(writer, RULES, prompts, settings)
        assert chains == revise(writer, RULES, prompts, settings)
    assert len({chain.answer for chain in chains}) == 3 and all(chain.rounds[0].revision for chain in chains)
    assert {body["max_tokens"] for body in server.bodies} == {9}
    assert len({body["seed"] for body in server.bodies}) == 9


def test_plain_prompts_use_the_completions_route():
    with serving(lambda body: {"index": 0, "text": f"{body['prompt']}!", "finish_reason": "stop"}) as server:
        writer = RemoteWriter(ChatServer(server.url, "base"), SamplingSettings())
        assert writer(["Hi"], [0]) == [Written("Hi!", True)]


def test_a_response_without_a_completion_is_refused(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    with serving(lambda body: {"finish_reason": "stop", "note": "secret-key"}) as server:
        judge = RemoteJudge(server.url, "big", api_key="JUDGE_KEY")
        with pytest.raises(ServerError, match="answered without a completion") as refused:
            judge([question("x", "y")])
    assert server.keys == ["Bearer secret-key"] and "secret-key" not in str(refused.value)


def test_invalid_arguments_are_refused():
    with refused("unknown-choice", "read is 'mind'; choose 'logprobs' or 'text'"):
        RemoteJudge("http://127.0.0.1:1", "big", read="mind")
    with refused("setting-out-of-range", "requests is 0"):
        RemoteJudge("http://127.0.0.1:1", "big", requests=0)


@pytest.mark.parametrize("value", ["nan", "-1.0", None, True, [-1.0], 0.5, -(10**400)])
@pytest.mark.parametrize("where", ["chosen", "likely"])
def test_a_non_numeric_logprob_is_refused(value, where):
    def reply(body):
        spoilt = place("A", -0.1, A=-0.1, B=-2.4)
        (spoilt if where == "chosen" else spoilt["top_logprobs"][1])["logprob"] = value
        return said("A", [spoilt])

    with serving(reply) as server, refused("server-answer-unusable", "top_logprobs", "set read to text"):
        RemoteJudge(server.url, "big", retries=0)([question("x", "y")])


@pytest.mark.parametrize(
    "values", [("high", -1.0), (True, -1.0), (None, -1.0), (math.inf, -1.0), (-1.0, 2.0), (-1.0, [0.0]), (-1.0, 1e30)]
)
def test_invalid_logprobs_of_a_user_judge_are_refused(values):
    class Own:
        name = "own"

        def __call__(self, questions):
            return [JudgeAnswer(*values)] * len(questions)

    with refused("not-a-logprob", "judge own", "at most 0"):
        label_pairs(Own(), RULES, [Pair("p", "y", "x")])
