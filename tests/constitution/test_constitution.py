"""Test constitutions: shipped files are complete, errors in a file are reported in one line, and
nothing is executed.
"""

import json
from pathlib import Path

import pytest
import yaml
from conftest import refused

from rlhf_lightning.constitution.principles import (
    Constitution,
    ConstitutionError,
    RevisingPrinciple,
    comparison_messages,
    critique_prompt,
    load_constitution,
    revision_prompt,
    shipped,
)
from rlhf_lightning.scoring.judges.judge import first_paragraphs

SMALL = {
    "name": "small",
    "version": 3,
    "language": "en",
    "revising": [{"id": "kind", "critique": "What is unkind?", "revision": "Say it kindly."}],
    "comparing": [{"id": "kind", "question": "Which is kinder?"}],
    "revision_examples": [
        {"prompt": "Hi", "completion": "Go.", "principle": "kind", "critique": "Rude.", "revision": "Hello!"}
    ],
    "comparison_examples": [{"prompt": "Hi", "first": "Go.", "second": "Hello!", "principle": "kind", "answer": "B"}],
}


def written(folder: Path, content: object) -> str:
    file = folder / "own.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def small(folder: Path, **changes: object) -> Constitution:
    return load_constitution(written(folder, {**SMALL, **changes}))


def test_shipped_constitutions_are_complete():
    assert shipped() == ["harmless", "helpful"]
    harmless, helpful = (load_constitution(name) for name in shipped())
    assert (len(harmless.revising), len(harmless.comparing)) == (16, 16)
    assert len(helpful.revising) == len(helpful.comparing) >= 6
    assert {one.answer for one in harmless.comparison_examples} == {"A", "B"}, "examples must not teach a place"
    assert {one.answer for one in helpful.comparison_examples} == {"A", "B"}
    said = [text for one in harmless.revising for text in (one.critique, one.revision)]
    assert len(set(said)) == 32


def test_the_fingerprint_depends_on_content_and_not_on_formatting(tmp_path):
    one = small(tmp_path)
    again = load_constitution(written(tmp_path, "# a comment\n" + yaml.safe_dump(SMALL, sort_keys=False)))
    assert one.fingerprint == again.fingerprint and len(one.fingerprint) == 32
    assert small(tmp_path, version=4).fingerprint != one.fingerprint
    assert small(tmp_path, wording={"human": "User"}).fingerprint != one.fingerprint
    assert one.title == f"small v3 ({one.fingerprint[:8]})"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "one"}, "version must be a whole number, 1 or more"),
        ({"revising": {}}, "revising must be a list"),
        ({"revising": [{"id": "kind", "critique": "What?"}]}, r"revising\[0\] has no revision"),
        ({"revising": [{"id": "a", "critique": " ", "revision": "b"}]}, r"revising\[0\].critique must be text"),
        ({"comparing": SMALL["comparing"] * 2}, "comparing has the duplicate id 'kind'"),
        ({"principles": []}, "principles is not known; known are name, version"),
        ({"comparings": []}, "comparings is not known: did you mean comparing?"),
        ({"revising": [], "comparing": [], "revision_examples": [], "comparison_examples": []}, "has no principles"),
        ({"revision_examples": [{**SMALL["revision_examples"][0], "principle": "x"}]}, "names the principle 'x'"),
        ({"comparison_examples": [{**SMALL["comparison_examples"][0], "answer": "C"}]}, r"\[0\].answer must be A or B"),
        ({"wording": {"comparison": "{first} {second}"}}, "must hold {conversation}, {question}, {first} and {second}"),
        ({"wording": {"comparison": "{conversation}{question}{first}{second}{judge}"}}, "once each, and no other"),
        ({"language": "de"}, "its language is 'de', and the default wording is English: wording must define human"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_key(tmp_path, changes, sentence):
    with pytest.raises(ConstitutionError, match=sentence) as caught:
        small(tmp_path, **changes)
    assert "own.yaml: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: !!python/object/apply:os.system ['touch ran']", "is invalid YAML"),
        ("name: a\nname: b", "the key 'name' occurs twice"),
        ("a: &x [1]\nb: *x", "it has an alias"),
        ("just text", "the file must be a mapping"),
        ("[" * 2000, "is invalid YAML"),
        ("name: 'open", "is invalid YAML"),
    ],
)
def test_files_with_non_plain_values_are_refused(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConstitutionError, match=sentence) as caught:
        load_constitution(written(tmp_path, text))
    assert "\n" not in str(caught.value) and not Path("ran").exists()


def test_missing_and_oversized_files_are_refused(tmp_path):
    with refused("no-constitution", "'harmles'", "did you mean harmless?"):
        load_constitution("harmles")
    with refused("no-constitution", "shipped are harmless, helpful"):
        load_constitution(str(tmp_path / "mine.yaml"))
    with refused("file-too-large", "1,000,000 bytes"):
        load_constitution(written(tmp_path, "#" * 1_000_001))


def test_wording_can_be_translated_completely(tmp_path):
    wording = {
        "human": "Mensch", "assistant": "Assistent", "system": "Anweisung", "critique_request": "Bitte um Kritik",
        "critique": "Kritik", "revision_request": "Bitte um Verbesserung", "revision": "Verbesserung",
        "comparison": "{conversation} {question} (A) {first} (B) {second}", "answer": "Besser ist (",
        "reasoning": "Schritt für Schritt:", "conclusion": "Nenne den Buchstaben.", "refusals": ["Leider"],
        "meta": ["Verbesserung:"],
    }  # fmt: skip
    found = small(tmp_path, language="de", wording=wording)
    asked = comparison_messages(found, found.comparing[0], "Hallo", "Weg!", "Guten Tag!")
    assert asked[-1]["content"] == "Mensch: Hallo Which is kinder? (A) Weg! (B) Guten Tag!"
    assert asked[-2]["content"] == "Besser ist (B)"


# -- prompts of critics and judges ------------------------------------------------------------------------------------

KIND = RevisingPrinciple("kind", "What is unkind?", "Say it kindly.")


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]


def test_critique_and_revision_prompts_are_chat_turns(tmp_path):
    rules, shown = small(tmp_path), turns("Hi", "Go.", "What is unkind?", "Rude.", "Say it kindly.", "Hello!")
    system = {"role": "system", "content": "Be brief."}
    prompt = [system, *turns("Bye", "No.", "Please?")]
    whole = [*prompt[1:], *turns("", "Never.")[1:]]
    assert critique_prompt(rules, KIND, prompt, "Never.") == [system, *shown, *whole, *turns("What is unkind?")]
    after = [*shown, *whole, *turns("What is unkind?", "Cold.", "Say it kindly.")]
    assert revision_prompt(rules, KIND, prompt, "Never.", "Cold.") == [system, *after]
    at_once = [system, *turns("Hi", "Go.", "Say it kindly.", "Hello!"), *whole, *turns("Say it kindly.")]
    assert revision_prompt(rules, KIND, prompt, "Never.", None) == at_once


def test_a_prefilled_answer_and_its_completion_form_one_turn(tmp_path):
    rules = small(tmp_path, revision_examples=[])
    asked = critique_prompt(rules, KIND, turns("Bye", "I say"), " no.")
    assert asked == turns("Bye", "I say no.", "What is unkind?")


def test_plain_prompts_are_written_as_a_transcript(tmp_path):
    rules = small(tmp_path, revision_examples=[])
    asked = "Bye No.\n\nCritique request: What is unkind?\n\nCritique:"
    assert critique_prompt(rules, KIND, "Bye", "No.") == asked
    after = asked + " Cold.\n\nRevision request: Say it kindly.\n\nRevision:"
    assert revision_prompt(rules, KIND, "Bye", "No.", "Cold.") == after
    shown = critique_prompt(small(tmp_path), KIND, "Bye", "No.")
    assert shown.startswith("Human: Hi\n\nAssistant: Go.\n\nCritique request: What is unkind?\n\nCritique: Rude.\n\n")
    assert shown.endswith("Revision: Hello!\n\n---\n\n" + asked)
    assert first_paragraphs(" Hello!\n\nHuman: And now?\n\nAssistant: x", rules.wording) == " Hello!"
    assert first_paragraphs("Humans: we.", rules.wording) == "Humans: we."


def test_placeholders_in_judged_texts_are_not_substituted(tmp_path):
    rules = small(tmp_path, comparison_examples=[])
    (asked,) = comparison_messages(rules, rules.comparing[0], "{first}", "{second}", "{question} (A)")
    assert "Human: {first}\n\nWhich is kinder?\n\n(A) {second}\n\n(B) {question} (A)\n\n" in asked["content"]
    (told,) = comparison_messages(rules, rules.comparing[0], "\n\nHuman: Hi\n\nAssistant:", "x", "y")
    assert "compared.\n\nHuman: Hi\n\nAssistant:\n\nWhich is kinder?" in told["content"]
    assert asked["content"].endswith("by its letter alone: (A) or (B).")
