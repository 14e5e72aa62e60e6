"""Additional rows of `outside_reports`: bugs found here by an earlier search of other projects, and small inputs."""

import inspect
import json
from pathlib import Path
from typing import Any

from conftest import make_tiny_tokenizer, refused
from data import test_conversations as conversations
from models import test_new_tokens as new_tokens
from models import test_self_check as self_checks
from models import test_vocabularies as vocabularies
from models.families import measure
from outside_reports import indentation, learned, report, turns
from tiny_models import save_policy, save_reward_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_lightning.data.sources import Source, read_rows
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
from rlhf_lightning.scoring import LearnedScorer, load_scorer
from rlhf_lightning.tokenization import encode_prompt

# -- an earlier search ------------------------------------------------------------------------------------------------


def thinking() -> Any:
    return conversations.tokenizer_with(conversations.case("thinking.jinja"))


def opening() -> Any:
    return conversations.tokenizer_with(conversations.case("thinking_opens.jinja"))


@report(
    "huggingface/trl#6361, huggingface/trl#5213, hiyouga/LlamaFactory#10773, verl-project/verl#5576",
    "a template that writes or opens a thought: an empty one is learned before the real one, old ones stay",
    "the template's own rendering is learned, once, in the context that serving shows",
)
def thoughts(_: Path) -> None:
    conversations.test_a_thought_is_supervised_once_in_every_input_form(thinking(), opening())
    conversations.test_each_turn_is_trained_with_its_inference_time_context(thinking())
    conversations.test_both_sides_of_a_pair_have_the_inference_time_prompt(thinking())
    conversations.test_a_sampled_thought_is_not_rendered_twice_for_the_scorer(thinking(), opening())


def right(folder: Path, columns: tuple[str, ...], *names: str) -> None:
    for name in names:
        found = measure(name, folder / name, columns)
        assert {found[column] for column in columns} <= {"right", "padded instead"}, found


@report(
    "huggingface/transformers#46634, hiyouga/LlamaFactory#10736",
    "StableLM, Nemotron and Falcon: a packed row never reaches their attention, log-probabilities off by up to 7.8",
    "the check at loading has them forwarded in padded rows",
)
def dropped_arguments(folder: Path) -> None:
    right(folder, ("padded", "packed"), "stablelm", "nemotron", "falcon")


@report(
    "huggingface/trl#3546",
    "Gemma 4: softcap and windows stand in a config within the config",
    "read there, and checked",
)
def nested_configs(folder: Path) -> None:
    right(folder, ("padded", "packed", "in groups", "shared critic"), "gemma4_text", "gemma3")


@report(
    "linkedin/Liger-Kernel#1477, unslothai/unsloth#11277",
    "Falcon-H1, MPT, ModernBERT decoders, Llama 4: states times the head are not their logits",
    "logits come from the model's own head where they differ",
)
def own_logits(folder: Path) -> None:
    right(folder, ("padded",), "falcon_h1", "mpt", "modernbert-decoder", "llama4_text")


@report(
    "pytorch/torchtitan#3756, ml-explore/mlx-lm#1403",
    "groups of samples of recurrent and hybrid models crash",
    "their states are shared and selected like keys and values",
)
def recurrent_groups(folder: Path) -> None:
    right(folder, ("in groups",), "lfm2", "mamba2", "qwen3_next")


@report(
    "meta-llama/llama-cookbook#189",
    "a tokenizer without a spare pad token: the exported folder loads nowhere",
    "exports have a row for it; SFT, DPO, reward model and PPO follow each other",
)
def no_spare_token(folder: Path) -> None:
    vocabularies.test_all_stages_work_without_a_spare_pad_token(folder)


@report(
    "huggingface/peft#2018, unslothai/unsloth#9331",
    "LoRA on `lm_head` is counted as trained, and is not; a merge changes both of two tied matrices",
    "trained, seen in log-probabilities, and merged into a matrix of its own",
)
def adapted_heads(folder: Path) -> None:
    for tied in (True, False):
        for target in ("lm_head", "embed_tokens"):
            here = folder / f"{target}_{tied}"
            here.mkdir()
            vocabularies.test_an_adapter_on_head_or_embeddings_trains_and_merges(here, tied, target)


@report(
    "hiyouga/LlamaFactory#7454, modelscope/ms-swift#3113",
    "`<|im_end|>` stands in no field of the export that names ends",
    "the generation config lists every end of a turn",
)
def exported_ends(folder: Path) -> None:
    vocabularies.test_the_generation_config_lists_every_token_that_ends_a_turn(folder)


@report("modelscope/ms-swift#9239", "a policy's folder as scorer gets a random head", "refused (`untrained-head`)")
def random_head(folder: Path) -> None:
    with refused("untrained-head"):
        LearnedScorer(save_policy(folder))


@report(
    "NVIDIA-NeMo/Automodel#2348, verl-project/verl#5316, hiyouga/LlamaFactory#4729, hiyouga/LlamaFactory#5866",
    "`reasoning_content`, `tool_calls`, `tools`, `weight`, `system`, `history`, `images` are left out without a word",
    "used, or the row is dropped and counted; unused columns are counted at the start",
)
def columns(_: Path) -> None:
    conversations.test_tool_calls_are_supervised_and_tools_are_in_the_prompt(thinking())
    conversations.test_turn_weights_and_train_flags_select_supervised_turns(thinking())
    row = {"messages": turns("hi", "yo"), "odd": 1}
    row["messages"][0]["mood"] = "glad"
    assert set(learned(thinking(), row)[1].unused) == {"column 'odd'", "key 'mood' of turns"}


@report(
    "OpenRLHF/OpenRLHF#367",
    "a folder as source trains on test.jsonl too, and on the licence",
    "files by split and format",
)
def folders(_: Path) -> None:
    for split in ("train", "test"):
        (row,) = [dict(row) for row in read_rows(Source(str(conversations.CASES / "folder"), split=split))]
        (expected,) = [json.loads(line) for line in conversations.case(f"folder/{split}.jsonl").splitlines()]
        assert row == expected


@report(
    "hiyouga/LlamaFactory#10779, huggingface/trl#3500",
    "dropout that is a plain number stays on: DPO starts at another loss than log 2; BLOOM and Falcon do not load",
    "off in every form",
)
def dropout(_: Path) -> None:
    for name in ("opt", "gpt_bigcode", "biogpt", "bloom", "falcon", "persimmon"):
        self_checks.test_every_kind_of_dropout_is_disabled(name)


@report(
    "CarperAI/trlx#130, huggingface/peft#2415, NVIDIA-NeMo/RL#237",
    "an IndexError without a cause: learned positions exceeded, a tokenizer larger than the model",
    "refused before training, with the id or the row; padded vocabularies of other sizes are read",
)
def indices(folder: Path) -> None:
    vocabularies.test_rows_beyond_embeddings_or_positions_are_refused(folder / "a", save_policy(folder / "b"))
    new_tokens.test_roles_may_have_vocabularies_padded_to_different_sizes(folder / "c", "separate")


@report(
    "huggingface/trl#5087, huggingface/trl#404",
    "reward models of five labels, and encoders, end in tracebacks",
    "labels become parts of the score; encoders score",
)
def labels(folder: Path) -> None:
    names = {"num_labels": 2, "id2label": {0: "kind", 1: "clear"}, "label2id": {"kind": 0, "clear": 1}}
    scorer = LearnedScorer(save_reward_model(folder / "two", **names), label="clear")
    (judged,) = scorer(["w5"], ["w6"])
    assert set(judged.parts) == {"kind", "clear"} and judged.score == judged.parts["clear"]
    config = AutoConfig.for_model(
        "bert", vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    assert isinstance(load_scorer(str(folder / "bert"))(["w5"], ["w6"])[0], float)
    with refused("no-score-head"):
        load_reward_hf_model(str(folder / "bert"), LoadSettings(from_scratch=True))


@report(
    "huggingface/trl#2054",
    "a normaliser that prepends a space: each answer begins with a token too many; `strftime_now` changes at midnight",
    "as the template writes it; the date is pinned, or `template_args: {now: ...}`, and in the fingerprint",
)
def prepended(_: Path) -> None:
    indentation(Path())
    dated = make_tiny_tokenizer(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    assert dated.decode(encode_prompt(dated, turns("a"))).startswith("2025")


# -- small inputs -----------------------------------------------------------------------------------------------------


def case(name: str, number: int, there: str, here: str) -> Any:
    return report(f"cases/{name}, row {number}", there, here)


@case("further_columns.jsonl", 1, "`system` in a column", "the conversation begins with it")
def system_column(_: Path) -> None:
    row = conversations.rows_of("further_columns.jsonl")[0]
    ((prompt, _c, said),), _r = learned(thinking(), row)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>") and said.endswith("yo<|im_end|>")


@case("further_columns.jsonl", 2, "`history` and `system` with `instruction` and `output`", "turns before the question")
def history_column(_: Path) -> None:
    row = conversations.rows_of("further_columns.jsonl")[1]
    ((prompt, _c, said),), _r = learned(thinking(), row)
    places = [prompt.index(part) for part in ("Be brief.", "2+1", "3<|im_end|>", "and now?")]
    assert places == sorted(places) and said.endswith("4<|im_end|>")


@case("further_columns.jsonl", 3, "ShareGPT's `conversations` with `from` and `value`", "read")
def sharegpt(_: Path) -> None:
    ((prompt, _c, said),), _r = learned(thinking(), conversations.rows_of("further_columns.jsonl")[2])
    assert "user\nhi<|im_end|>" in prompt and said.endswith("yo<|im_end|>")


@case("further_columns.jsonl", 4, "an image that the answer is about", "the row is dropped and counted (`media`)")
def image(_: Path) -> None:
    found, counts = learned(thinking(), conversations.rows_of("further_columns.jsonl")[3])
    assert not found and counts.dropped == {"media": 1}


@case("json_text.jsonl", 1, "conversations as JSON text", "parsed")
def json_text(_: Path) -> None:
    found, _r = learned(thinking(), conversations.rows_of("json_text.jsonl")[0], "preference")
    assert [said.rpartition("\n")[2] for _p, _c, said in found] == ["yo<|im_end|>", "no<|im_end|>"]


@case("tools.jsonl", 1, "a call with text", "rendered and learned; the tool's answer is not")
def call_with_text(_: Path) -> None:
    learns_call(0)


@case("tools.jsonl", 2, "a call with empty content", "the same")
def call_without_text(_: Path) -> None:
    learns_call(1)


@case("tools.jsonl", 3, "a call with null content", "the same")
def call_with_null(_: Path) -> None:
    learns_call(2)


def learns_call(place: int) -> None:
    ((prompt, _c, said),), _r = learned(thinking(), conversations.rows_of("tools.jsonl")[place])
    assert "<tool_call>" in said and "tool_response" not in said and '"name": "add"' in prompt


@case("turn_flags.jsonl", 1, "`weight: 0` on a turn", "not learned")
def zero_weight(_: Path) -> None:
    ((_p, _c, said),), _r = learned(thinking(), conversations.rows_of("turn_flags.jsonl")[0])
    assert "GOOD" in said and "BAD" not in said


@case("turn_flags.jsonl", 2, "`train: false` on a turn", "not learned")
def untrained_turn(_: Path) -> None:
    ((_p, _c, said),), _r = learned(thinking(), conversations.rows_of("turn_flags.jsonl")[1])
    assert "GOOD" in said and "BAD" not in said


def thought_row(place: int) -> list[str]:
    row = conversations.rows_of("thoughts.jsonl")[place]
    kind = "preference" if "chosen" in row else "sft"
    return [said for _p, _c, said in learned(thinking(), row, kind)[0]]


@case("thoughts.jsonl", 1, "a thought in the content", "one thought")
def thought_in_content(_: Path) -> None:
    assert thought_row(0) == ["<think>\nLet me see.\n</think>\n\nYo.<|im_end|>"]


@case("thoughts.jsonl", 2, "no thought, by a template that always writes one", "the empty thought that it writes")
def no_thought(_: Path) -> None:
    assert thought_row(1) == ["<think>\n\n</think>\n\nYo.<|im_end|>"]
    ((prompt, _c, said),), _r = learned(opening(), conversations.rows_of("thoughts.jsonl")[1])
    assert prompt.endswith("<think>\n") and said == "\n</think>\n\nYo.<|im_end|>"


@case("thoughts.jsonl", 3, "two turns with thoughts", "a row for each, without old thoughts in its context")
def two_thoughts(_: Path) -> None:
    assert thought_row(2) == [f"<think>\n{a}.\n</think>\n\n{b}.<|im_end|>" for a, b in (("A", "Yo"), ("B", "Ya"))]


@case("thoughts.jsonl", 4, "`reasoning_content`", "the thought")
def named_thought(_: Path) -> None:
    assert thought_row(3) == thought_row(0)


@case("thoughts.jsonl", 5, "a pair after a turn with a thought", "both sides after the prompt of use")
def pair_of_thoughts(_: Path) -> None:
    assert thought_row(4) == ["<think>\nB.\n</think>\n\nYa.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"]


@report("cases/folder", "train.jsonl, test.jsonl and a licence in one folder", "each split from its file")
def split_folder(_: Path) -> None:
    folders(Path())


@report("cases/tiny_families.json", "33 families that were wrong in part", "right in what they can do, see Families")
def families(_: Path) -> None:
    page = (Path(inspect.getfile(measure)).parents[2] / "docs" / "families.md").read_text()
    for name in json.loads(conversations.case("tiny_families.json")):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name.removesuffix('_alibi')} |")]
        assert "wrong" not in row
