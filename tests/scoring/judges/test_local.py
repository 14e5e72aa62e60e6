"""A local judge gives the probabilities of a full forward pass in every batch; the addressing of a local critic."""

import pytest
import torch
from conftest import make_tiny_tokenizer, refused
from models.families import build
from transformers import AutoModelForCausalLM

from rlhf_lightning import tokenization
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.constitution.labelling import LabelSettings, label_pairs
from rlhf_lightning.constitution.principles import (
    ComparingPrinciple,
    Constitution,
    RevisingPrinciple,
    comparison_messages,
)
from rlhf_lightning.constitution.revision import RevisionSettings, revise
from rlhf_lightning.models import resolving
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring.judges import CritiqueJudge, LocalJudge, LocalWriter, load_judge
from rlhf_lightning.scoring.judges.judge import Judge, JudgeAnswer, Pair, Question, Written, as_text
from rlhf_lightning.scoring.judges.local import letter_ids, next_logits, shared_length

RULES = Constitution(
    "t", 1, "en", (RevisingPrinciple("k", "Bad?", "Mend."),), (ComparingPrinciple("k", "Which is kinder?"),)
)


def question(first: str, second: str, prompt: str = "Hi", reasons: bool = False) -> Question:
    messages = comparison_messages(RULES, RULES.comparing[0], prompt, first, second)
    return Question(prompt, first, second, RULES.comparing[0], messages, RULES.wording, reasons)


QUESTIONS = [
    question("Go.", "Hello!"),
    question("Hello!", "Go."),
    question("a" * 60, "b"),
    question("x", "y", "z" * 90),
]


@pytest.fixture(scope="module")
def judge(policy_folder):
    torch.set_num_threads(1)
    return LocalJudge(policy_folder, max_length=2048)


def test_letter_logprobs_equal_those_of_the_plain_forward(judge):
    assert isinstance(judge, Judge)
    answers = judge(QUESTIONS)
    for asked, answer in zip(QUESTIONS, answers, strict=True):
        ids = torch.tensor([tokenization.encode_prompt(judge.tokenizer, asked.messages_with_answer())])
        with torch.no_grad():
            whole = judge.model.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        # A byte is a token here, so each letter has one spelling.
        expected = [float(whole[7 + ord(letter)]) for letter in "AB"]
        assert [answer.first_logprob, answer.second_logprob] == pytest.approx(expected, abs=1e-5)
        assert answer.mass == pytest.approx(sum(float(torch.tensor(e).exp()) for e in expected), rel=1e-4)


def test_the_prompt_ends_directly_before_the_letter(judge):
    ids = tokenization.encode_prompt(judge.tokenizer, QUESTIONS[0].messages_with_answer())
    assert judge.tokenizer.decode(ids).endswith("(A) or (B).<|end|>\n<|assistant|>\nThe better answer is (")


@pytest.mark.parametrize("max_tokens", [1, 700, 10**6])
def test_answers_do_not_depend_on_batching(judge, policy_folder, max_tokens):
    other = LocalJudge(judge.model, judge.tokenizer, max_tokens=max_tokens, max_length=2048, name="other")
    for one, same in zip(judge(QUESTIONS), other(QUESTIONS), strict=True):
        assert one[:2] == pytest.approx(same[:2], abs=1e-5)


def test_the_lm_head_is_applied_only_at_the_last_position(judge, monkeypatch):
    seen = []
    logits = type(judge.model).logits
    monkeypatch.setattr(type(judge.model), "logits", lambda *a: seen.append(a[1].shape) or logits(*a))
    judge(QUESTIONS)
    assert [len(shape) for shape in seen] == [2, 2], "one pass for what they share, one for the rest"
    assert sum(shape[0] for shape in seen) == 1 + len(QUESTIONS)


def test_a_common_prefix_is_prefilled_once(judge, monkeypatch):
    rows = [torch.tensor([9] * 40 + rest) for rest in ([5, 6, 7], [5, 6], [8])]
    assert shared_length(rows) == 40 and shared_length(rows[:2]) == 41 and shared_length(rows[2:]) == 40
    with torch.no_grad():
        found = next_logits(judge.model, rows)
        monkeypatch.setattr("rlhf_lightning.scoring.judges.local.SHARED_AT_LEAST", 10**6)
        torch.testing.assert_close(found, next_logits(judge.model, rows), rtol=1e-5, atol=1e-5)
        alone = [judge.model.model(input_ids=ids.unsqueeze(0)).logits[0, -1] for ids in rows]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_the_prefix_of_each_prompt_is_prefilled_once(judge, monkeypatch):
    rows = [
        torch.tensor([first] * size + rest) for first, size in ((9, 40), (8, 30)) for rest in ([5, 6, 7], [5, 6], [8])
    ]
    seen, logits = [], type(judge.model).logits
    monkeypatch.setattr(type(judge.model), "logits", lambda *a: seen.append(len(a[1])) or logits(*a))
    with torch.no_grad():
        found = next_logits(judge.model, rows, ["a"] * 3 + ["b"] * 3)
        alone = [judge.model.model(input_ids=ids.unsqueeze(0)).logits[0, -1] for ids in rows]
    assert seen == [2, 6]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_models_with_recurrent_states_share_no_prefix():
    model = CausalLM(build("lfm2", AutoModelForCausalLM, vocab_size=120)).eval()
    rows = [torch.tensor([9] * 40 + rest) for rest in ([5, 6, 7], [5, 6], [8])]
    with torch.no_grad():
        alone = [model.model(input_ids=ids.unsqueeze(0)).logits[0, -1] for ids in rows]
        torch.testing.assert_close(next_logits(model, rows), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_questions_over_max_length_get_no_answer(judge):
    longest = len(tokenization.encode_prompt(judge.tokenizer, QUESTIONS[3].messages_with_answer()))
    short = LocalJudge(judge.model, judge.tokenizer, max_length=longest - 1)
    answers = short([QUESTIONS[0], QUESTIONS[3]])
    assert [one.failure for one in answers] == ["", "too_long"]
    assert LocalJudge(judge.model, judge.tokenizer).max_length == 512, "what the model was made for"


def test_reasoning_is_generated_first_and_clamps_the_label(judge):
    thinking = LocalJudge(judge.model, judge.tokenizer, max_length=2048, reasoning_tokens=6)
    thinking.thinker.longest = None
    asked = question("Go.", "Hello!", reasons=True)
    (answer,) = thinking([asked])
    assert answer.reasoning and [*asked.messages_with_answer(answer.reasoning)][-1]["content"] == (
        f"Let us weigh them step by step: {answer.reasoning.strip()}\n\nThe better answer is ("
    )
    assert thinking([asked]) == [answer], "greedy: the same again"
    settings = LabelSettings(reasoning=True, least_mass=0)
    found = label_pairs(thinking, RULES, [Pair("Hi", "Go.", "Hello!")], settings).pairs[0]
    assert 0.4 <= found.preference <= 0.6 and len(found.row("j", "c")["reasoning"]) == 2


def test_without_a_chat_template_the_prompt_is_a_transcript(plain_folder):
    judge = LocalJudge(plain_folder, max_length=2048)
    (answer,) = judge(QUESTIONS[:1])
    said = as_text(QUESTIONS[0].messages_with_answer(), RULES.wording)
    assert said.endswith("(A) or (B).\n\nAssistant: The better answer is (")
    ids = torch.tensor([tokenization.encode_prompt(judge.tokenizer, said)])
    with torch.no_grad():
        whole = judge.model.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert answer.first_logprob == pytest.approx(float(whole[7 + ord("A")]), abs=1e-5)


def test_every_token_variant_of_a_letter_counts():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "A", "ĠA", "A)", "(A", "B", "Ġ(B", "Always"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert letter_ids(tokenizer, "A").tolist() == [1, 2, 3, 4]
    assert letter_ids(tokenizer, "B").tolist() == [5, 6]
    with refused("no-letter-token", "has no token for the letter C"):
        letter_ids(tokenizer, "C")
    assert letter_ids(make_tiny_tokenizer(), "A").tolist() == [7 + ord("A")]


def test_a_local_critic_does_not_depend_on_batching(policy_folder):
    policy, tokenizer = SamplingArguments().load(policy_folder)
    sampling = SamplingSettings(max_new_tokens=8, batch_size=2)
    writer = LocalWriter(policy, tokenizer, sampling, 3, "tiny")
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    settings = RevisionSettings(rounds=2, keep_unfinished=True, seed=3)
    whole = revise(writer, RULES, prompts, settings)
    assert whole == revise(writer, RULES, prompts[:2], settings) + revise(writer, RULES, prompts[2:], settings, start=2)
    assert any(one.revision for chain in whole for one in chain.rounds)
    writer.longest = 60
    assert [one is None for one in writer([prompts[0], [{"role": "user", "content": "x" * 50}]], [0, 1])] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("spec", "arguments", "code", "words"),
    [
        ("nowhere.Judge", {}, "not-importable", "judge 'nowhere.Judge'"),
        ("os.system", {}, "wrong-kind", "judge 'os.system' has no name"),
        ("subprocess.Popen", {"args": ["touch", "ran"]}, "wrong-kind", "a class whose objects can be called"),
        ("http://127.0.0.1:1", {}, "wrong-arguments", "missing a required argument: 'model'"),
        ("SimulatedJudge", {}, "wrong-arguments", "missing a required argument: 'gold_reward'"),
        (f"{__name__}.Nameless", {}, "wrong-kind", "has no name"),
    ],
)
def test_invalid_judges_are_refused(spec, arguments, code, words):
    with refused(code, words):
        load_judge(spec, arguments)


class Faults:
    name = "faults"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, episodes):
        self.asked += [prompt[0]["content"] for prompt in prompts]
        return [None if "mute" in text else Written(f"said {len(text)}", True) for text in self.asked[-len(prompts) :]]


class Reader:
    name = "reader"

    def __call__(self, questions):
        self.read = [one.messages[-1]["content"] for one in questions]
        return [JudgeAnswer(-1.0, -2.0) for _ in questions]


def test_critique_judge_reads_critiques_of_both_answers():
    reader, writer = Reader(), Faults()
    asked = [question("Go.", "Hello!"), question("Hello!", "Go."), question("mute", "b")]
    judge = CritiqueJudge(reader, writer)
    assert isinstance(judge, Judge) and judge.name == "reader after critiques by faults"
    assert [answer.first_logprob for answer in judge(asked)] == [-1.0] * 3
    assert len(writer.asked) == 4, "an answer is criticised once, in either order"
    assert "Human: Hi\n\nHere is an answer" in writer.asked[0] and "Go." in writer.asked[0]
    told = [f"said {len(text)}" for text in writer.asked]
    assert f"Critique (A): {told[0]}\n\nCritique (B): {told[1]}\n\n{RULES.wording.conclusion}" in reader.read[0]
    assert f"Critique (A): {told[1]}\n\nCritique (B): {told[0]}" in reader.read[1]
    assert "Critique (A)" not in reader.read[2] and "Critique (B)" in reader.read[2]


def test_debaters_see_earlier_arguments(policy_folder):
    reader, writer = Reader(), Faults()
    CritiqueJudge(reader, writer, rounds=2)([question("Go.", "Hello!")])
    assert len(writer.asked) == 4 and "(A) is the better" in writer.asked[0] and "(B) is the better" in writer.asked[1]
    told = "".join(f"({letter}): said {len(text)}\n\n" for letter, text in zip("AB", writer.asked[:2], strict=True))
    assert told in writer.asked[2] and told in reader.read[0] and reader.read[0].count("(B): said") == 2
    with refused("setting-out-of-range"):
        CritiqueJudge(reader, writer, rounds=-1)
    local = load_judge("CritiqueJudge", {"judge": policy_folder, "writer": policy_folder, "max_new_tokens": 4})
    assert len(local([question("Go.", "Hello!")])) == 1


def test_a_reward_model_as_judge_is_refused(reward_folder):
    with refused("reward-model", "is a reward model: it scores completions and cannot generate them"):
        LocalJudge(reward_folder)


def test_a_gguf_file_can_be_a_judge(judge, policy_folder, tmp_path, monkeypatch):
    """Weights and tokenizer both come from the converted folder."""
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(resolving, "converted_gguf", lambda path: policy_folder)
    assert LocalJudge(str(file), max_length=2048)(QUESTIONS) == judge(QUESTIONS)


class Nameless:
    def __call__(self, questions):
        return []


class Own:
    name = "own"

    def __init__(self, liking: str = "x") -> None:
        self.liking = liking

    def __call__(self, questions):
        return []


def test_a_user_class_can_be_a_judge():
    made = load_judge(f"{__name__}.Own", {"liking": "y"})
    assert made.name == "own" and made.liking == "y" and load_judge(made) is made
