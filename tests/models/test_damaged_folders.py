"""Damaged, odd and hostile model and adapter files give a one-sentence error with a code before a
library reads them.
"""

import contextlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from tiny_models import save_policy, save_reward_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.loading import refuse_large_yaml
from rlhf_lightning.models.folders import INDEX, check_folder, read_json, reading, weight_files
from rlhf_lightning.models.limits import check_prompts
from rlhf_lightning.models.loading import LoadSettings, load_hf_model
from rlhf_lightning.models.lora import LoraSettings, refuse_slow_patterns
from rlhf_lightning.models.resolving import (
    adapter_settings,
    backbone_record,
    content_hash,
    fingerprint,
    refuse_odd_gguf,
)
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.scoring import LearnedScorer

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "model", "target_modules": ["q_proj"]}


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    "name", ["other.bin", "../out.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "gone.safetensors", 7, None]
)
def test_an_index_may_only_name_safetensors_of_its_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "other.bin").touch()
    write(tmp_path / INDEX, {"weight_map": {"a": name}})
    with refused("unreadable-model", INDEX):
        check_folder(tmp_path)


def test_the_fingerprint_covers_exactly_the_loaded_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "shard.safetensors")
    write(tmp_path / INDEX, {"weight_map": {"a": "shard.safetensors"}})
    before = fingerprint(str(tmp_path)), content_hash(str(tmp_path))
    save_file({"a": torch.zeros(4)}, tmp_path / "decoy.safetensors")
    assert (fingerprint(str(tmp_path)), content_hash(str(tmp_path))) == before
    save_file({"a": torch.zeros(4)}, tmp_path / "shard.safetensors")
    assert fingerprint(str(tmp_path)) != before[0] and content_hash(str(tmp_path)) != before[1]
    assert weight_files(tmp_path) == [tmp_path / "shard.safetensors"]


@pytest.mark.parametrize(
    "key",
    ["_attn_implementation", "attn_implementation", "experts_implementation", "_attn_implementation_internal"],
)
@pytest.mark.parametrize("value", ["owner/kernel", "flash_attention_2", {"": "owner/kernel"}, "paged|owner/kernel"])
def test_a_config_that_names_a_hub_kernel_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    for config in ({key: value}, {"text_config": {key: value}}):
        write(tmp_path / "config.json", config)
        with refused("foreign-kernel", key):
            check_folder(tmp_path)
    write(tmp_path / "config.json", {key: "sdpa"})
    check_folder(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("x", 10**30)])
def test_implausibly_large_sizes_are_refused(key: str, value: int, tmp_path: Path) -> None:
    write(tmp_path / "config.json", {key: value})
    with refused("model-too-large", key):
        check_folder(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_negative_sizes_are_refused(key: str, tmp_path: Path) -> None:
    write(tmp_path / "config.json", {key: -1})
    with refused("model-too-small", key):
        check_folder(tmp_path)


def test_a_new_model_larger_than_memory_is_refused_before_allocation(policy_folder: str, tmp_path: Path) -> None:
    config = json.loads((Path(policy_folder) / "config.json").read_text())
    write(tmp_path / "config.json", {**config, "vocab_size": 2**31, "hidden_size": 1024})
    began = time.monotonic()
    with refused("model-too-large", "GiB of memory"):
        load_hf_model(str(tmp_path), AutoModelForCausalLM, LoadSettings(from_scratch=True))
    assert time.monotonic() - began < 60


def test_prompts_beyond_a_models_embeddings_or_positions_are_refused() -> None:
    tiny = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(tiny)
    check_prompts(model, [torch.tensor([1, 19])], 14)
    with refused("tokenizer-larger-than-model", "token id 20", "20 embeddings"):
        check_prompts(model, [torch.tensor([1]), torch.tensor([20])], 4)
    with refused("positions-exceeded", "may take 17 tokens", "16 positions"):
        check_prompts(model, [torch.tensor([1, 2])], 15)
    check_prompts(model, [], 15)


def test_a_tokenizer_that_expands_text_exponentially_is_refused(tmp_path: Path) -> None:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 8
    write(tmp_path / "tokenizer.json", {"normalizer": {"type": "Sequence", "normalizers": steps}})
    with refused("hostile-tokenizer"):
        check_folder(tmp_path)
    write(tmp_path / "tokenizer.json", {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}})
    check_folder(tmp_path)


def test_a_named_pipe_in_a_model_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with refused("not-a-file", "pipe"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "<html>", "[" * 100_000, "7", "\x00"])
def test_json_that_is_not_an_object_is_refused_with_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with refused("unreadable-model", "config.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": None},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": []},
        {"r": 10**9},
        {"r": 0},
        {"r": True},
        {"r": "8"},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": 7},
        {"bias": "many"},
    ],
)
def test_malformed_adapter_configs_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "adapter_config.json", {**ADAPTER, **change})
    with pytest.raises(ValueError, match="adapter_config.json"):
        adapter_settings(tmp_path)


@pytest.mark.parametrize("change", [{"target_modules": "(a|a)*$"}, {"target_modules": "("}])
def test_slow_target_module_patterns_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_lightning.models.lora.PATTERN_SECONDS", 1)
    write(tmp_path / "adapter_config.json", {**ADAPTER, **change})
    model = nn.ModuleDict({"a" * 40 + "c": nn.Linear(1, 1)})
    with refused("hostile-pattern"):
        refuse_slow_patterns(str(tmp_path), model)
    write(tmp_path / "adapter_config.json", {**ADAPTER, "target_modules": r".*\.(q|v)_proj"})
    refuse_slow_patterns(str(tmp_path), nn.Linear(1, 1))


@pytest.mark.parametrize("record", [[], 7, {"fingerprint": 7}, {"source": ["x"]}])
def test_malformed_backbone_records_are_refused(record: Any, tmp_path: Path) -> None:
    write(tmp_path / "backbone.json", record)
    with refused("unreadable-model", "backbone.json"):
        backbone_record(tmp_path)


def test_a_gguf_with_an_implausible_tensor_count_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40))
    with refused("unreadable-model", "gguf"):
        refuse_odd_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("size mismatch"), ValueError("x")])
def test_library_errors_become_one_sentence(error: Exception, tmp_path: Path) -> None:
    with refused("unreadable-model", type(error).__name__), reading(str(tmp_path)):
        raise error


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "half a header": lambda whole: whole[:40],
    "half": lambda whole: whole[: len(whole) // 2],
    "the last byte is missing": lambda whole: whole[:-1],
    "a byte more": lambda whole: whole + b"x",
    "HTML": lambda whole: b"<!DOCTYPE html><html>404</html>",
    "zeros": lambda whole: bytes(len(whole)),
    "a pickle": lambda whole: b"PK\x03\x04" + whole,
    "a pointer of Git LFS": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a header of exabytes": lambda whole: b"\xff" * 8 + whole[8:],
    "a header that is a list": lambda whole: header([]),
    "a header that is deep": lambda whole: header(b'{"a":' * 5000),
    "no tensors": lambda whole: header({}),
    "an unknown type": lambda whole: header({"a": {**ENTRY, "dtype": "X9"}}, bytes(8)),
    "a negative shape": lambda whole: header({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "a shape beyond its data": lambda whole: header({"a": {**ENTRY, "shape": [2**40]}}, bytes(8)),
    "offsets beyond the end": lambda whole: header({"a": {**ENTRY, "data_offsets": [0, 2**50]}}, bytes(8)),
    "other names": lambda whole: header({"a": ENTRY}, bytes(8)),
}
LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "policy": ("model.safetensors", load_policy),
    "reference": ("model.safetensors", load_reference),
    "reward model": ("model.safetensors", lambda folder: LearnedScorer(folder)(["w20"], ["w21"])),
    "adapter": ("adapter_model.safetensors", load_policy),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of each kind in `LOADERS`."""
    root = tmp_path_factory.mktemp("whole")
    policy, reward = save_policy(root / "policy"), save_reward_model(root / "reward")
    load_policy(policy, lora=LoraSettings(r=2)).model.save_pretrained(root / "adapter")
    tiny_tokenizer().save_pretrained(root / "adapter")
    kinds = {"policy": policy, "reference": policy, "reward model": reward, "adapter": root / "adapter"}
    return {name: Path(folder) for name, folder in kinds.items()}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused_in_one_sentence(
    kind: str, damage: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name, load = LOADERS[kind]
    shutil.copytree(folders[kind], tmp_path / "x")
    file = tmp_path / "x" / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(RlhfError) as caught:
        load(str(tmp_path / "x"))
    codes = ("unreadable-model", "untrained-head", "adapter-mismatch", "incomplete-weights")
    assert caught.value.code in codes, caught.value


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("change", ["other shape", "one is missing", "one is renamed"])
def test_weights_of_another_model_are_refused_in_one_sentence(
    kind: str, change: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name, load = LOADERS[kind]
    shutil.copytree(folders[kind], tmp_path / "x")
    weights = load_file(tmp_path / "x" / name)
    key = next(key for key in weights if "layers.1" in key)
    weight = weights.pop(key)
    weights |= {"other shape": {key: weight[:-1].clone()}, "one is renamed": {f"{key}x": weight}}.get(change, {})
    save_file(weights, tmp_path / "x" / name, metadata={"format": "pt"})
    with pytest.raises(RlhfError):
        load(str(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["policy", "reward model"])
@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"num_attention_heads": 7}, {"num_hidden_layers": "2"}, {"vocab_size": "many"},
        {"hidden_act": "unknown"}, {"dtype": "os.system"}, {"torch_dtype": 7}, {"model_type": "none"},
        {"model_type": None}, {"hidden_size": 0}, {"hidden_size": 1.5}, {"intermediate_size": []},
        {"num_key_value_heads": 3}, {"rms_norm_eps": "x"}, {"rope_parameters": {"rope_type": "none"}},
        {"rope_scaling": 7}, {"max_position_embeddings": "x"}, {"pad_token_id": 10**6}, {"tie_word_embeddings": "x"},
        {"layer_types": ["none"]}, {"quantization_config": {"quant_method": "none"}}, {"head_dim": 0},
        {"architectures": 7}, {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, {"num_labels": -1},
    ],
)  # fmt: skip
def test_changed_configs_load_or_are_refused_in_one_sentence(
    kind: str, change: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[kind], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    write(tmp_path / "x" / "config.json", {**config, **change})
    with contextlib.suppress(RlhfError):
        LOADERS[kind][1](str(tmp_path / "x"))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "[" * 9000, "- " * 5000 + "a", "? " * 5000 + "a", "k" * 2_000_000]
)
def test_yaml_alias_bombs_are_refused(text: str) -> None:
    with refused("yaml-too-large"):
        refuse_large_yaml(text)
    refuse_large_yaml("a: &x {b: [1, 2]}\nc: *x")
