"""Test `rlhf chat`: turns, commands, and answers equal to the policy's."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.chat import HELP, Conversation, converse
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.tokenization import encode_prompt, load_tokenizer


class Shown:
    """Output as a terminal would show it."""

    def __init__(self):
        self.text = ""

    def __call__(self, piece, end="\n", flush=False):
        self.text += piece + end


@pytest.fixture
def conversation(policy_folder):
    policy, tokenizer = SamplingArguments().load(policy_folder)
    return Conversation(policy, tokenizer, SamplingSettings(max_new_tokens=20, temperature=0.0), system="Be kind")


def greedy(folder, prompt, tokens):
    """Return the greedy continuation of the plain model."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and ids[-1] not in (2, 5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode([index for index in ids[start:] if index not in (2, 5)], skip_special_tokens=True)


def test_a_streamed_answer_equals_that_of_the_plain_model(conversation, policy_folder):
    pieces = list(conversation.answer("hello"))
    expected = greedy(
        policy_folder, [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hello"}], 20
    )
    assert "".join(pieces) == expected
    assert conversation.turns[-1] == {"role": "assistant", "content": expected or "…"}


def test_earlier_turns_are_in_the_prompt(conversation, policy_folder):
    first = "".join(conversation.answer("hello"))
    second = "".join(conversation.answer("and now?"))
    turns = [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first or "…"}, {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    assert second == greedy(policy_folder, turns, 20)


def test_reset_keeps_only_the_system_prompt(conversation):
    shown = Shown()
    converse(conversation, iter(["hello", "/reset", "hello"]), shown)
    first, again = shown.text.split("(a new conversation)\n")
    assert first == again and len(first) > 1
    assert [turn["role"] for turn in conversation.turns] == ["system", "user", "assistant"]


def test_slash_commands_are_not_added_as_turns(conversation):
    shown = Shown()
    converse(conversation, iter(["", "   ", "/help", "/quit", "never said"]), shown)
    assert shown.text == HELP + "\n" and [turn["role"] for turn in conversation.turns] == ["system"]


def test_an_interrupted_answer_keeps_its_printed_text(conversation, monkeypatch):
    def pieces(self, prompt):
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_pieces", pieces)
    shown = Shown()
    converse(conversation, iter(["hello"]), shown, stoppable=True)
    assert shown.text == "half an (stopped)\n"
    assert conversation.turns[-1] == {"role": "assistant", "content": "half an"}


def test_an_interrupt_ends_a_chat_that_reads_from_a_pipe(conversation, monkeypatch):
    def interrupted(text):
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converse(conversation, iter(["hello", "never answered"]), lambda text="", **options: None)


def test_incomplete_utf8_is_buffered_until_the_character_is_complete(conversation, monkeypatch):
    """Tokens are printed in chunks of eight, one byte each: sixteen bytes end inside a character of three bytes."""
    from rlhf_lightning.sampling import slot_engine

    wanted = ("a" * 7 + "€" + "b" * 3 + "ü").encode()
    ids = [7 + byte for byte in wanted] + [5]
    drawn_so_far = []

    def scripted(self, model, prompts, episodes, settings, seed, ends, on_progress=None):
        start = len(drawn_so_far)
        part = ids[start : start + settings.max_new_tokens]
        drawn_so_far.extend(part)
        done = torch.tensor([part[-1] == 5])
        return Completions((torch.tensor(part),), (torch.zeros(len(part)),), done)

    monkeypatch.setattr(slot_engine.SlotEngine, "sample", scripted)
    pieces = list(conversation.answer("x"))
    assert (
        pieces[:2] == ["a" * 7, "€bbbü"]
        and "".join(pieces) == "a" * 7 + "€bbbü"
        and all("\ufffd" not in piece for piece in pieces)
    )


def test_a_piped_chat_prints_answers_without_prompts_or_help(policy_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    assert rlhf(["chat", policy_folder, "--max-new-tokens", "3", "--temperature", "1", "--seed", "3"]) == 0
    once = capsys.readouterr().out
    assert "> " not in once and HELP not in once and once.count("\n") >= 2
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    assert rlhf(["chat", policy_folder, "--max_new_tokens=3", "--temperature=1", "--seed=3"]) == 0
    assert capsys.readouterr().out == once


def test_without_a_chat_template_each_line_is_its_own_prompt(plain_folder):
    policy, tokenizer = SamplingArguments().load(plain_folder)
    conversation = Conversation(policy, tokenizer, SamplingSettings(max_new_tokens=6, temperature=0.0), system="unused")
    first = "".join(conversation.answer("hello"))
    assert "".join(conversation.answer("hello")) == first == greedy(plain_folder, "hello", 6)
    assert conversation.turns == []


def test_help_and_argument_errors(capsys):
    with pytest.raises(SystemExit) as exit_status:
        rlhf(["chat", "--help"])
    shown = capsys.readouterr().out
    assert exit_status.value.code == 0
    assert shown.startswith("usage: rlhf chat") and "system prompt of each conversation" in shown
    with pytest.raises(SystemExit) as exit_status:
        rlhf(["chat"])
    assert exit_status.value.code == 2 and "missing: FOLDER" in capsys.readouterr().err
    assert rlhf(["chat", "./absent"]) == 1
    assert capsys.readouterr().err == (
        "rlhf: there is no model folder ./absent; check the path, or give a Hub id (owner/name)\n"
    )


def test_control_sequences_in_an_answer_are_escaped():
    """A model or a server may write control sequences; they are printed as visible text."""

    class Hostile:
        def answer(self, text):
            yield from ["a\x1b]0;owned\x07", "\u202eb\n", "ü\t\x9b2J"]

    shown = []
    converse(Hostile(), iter(["hello"]), lambda text="", **options: shown.append(text))
    assert "".join(shown) == "a\\x1b]0;owned\\x07\\u202eb\nü\t\\x9b2J"
