"""A stage hands over a Hugging Face folder: weights or adapter, tokenizer with its template, and where it came from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import BACKBONE_FILE, SCORE_BIAS, fingerprint
from rlhf_lightning.models.quantization import quantization_of
from rlhf_lightning.models.scalar_head import ScalarModel, unwrapped
from rlhf_lightning.models.sharding import is_first_rank, whole_weights


def export_policy(policy: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a policy so that AutoModelForCausalLM (or peft, for an adapter) loads it. Returns the folder."""
    return _export(policy.model, tokenizer, Path(folder), policy.source, {})


def export_reward_model(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, source: str, **facts: Any
) -> Path:
    """Write a reward model so that AutoModelForSequenceClassification loads it with the same scores.

    That class reads the score at the last token that is not ``pad_token_id``, so the exported pad token must differ
    from the end token. The score bias travels in config.json (an adapter's in backbone.json); ``LearnedScorer``
    subtracts it. So do
    further facts that whoever scores with it has to know.
    """
    return _export(reward_model.model, tokenizer, Path(folder), source, {SCORE_BIAS: reward_model.bias, **facts})


def _export(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str, facts: dict[str, Any]) -> Path:
    """Write everything beside the folder first, then swap it in, so that no reader sees half a model.

    Where weights are sharded, every rank must call: the first one writes.
    """
    weights = whole_weights(model)
    if weights is not None and not is_first_rank():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    config = unwrapped(model).config
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    for name, value in facts.items():
        setattr(config, name, value)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = source
        # No config.json beside it: transformers would take the folder for a whole model and miss its weights.
        model.save_pretrained(partial, selected_adapters=["default"], state_dict=weights)
    else:
        model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    _pack(partial / "tokenizer.json")
    record = {"source": source, "fingerprint": fingerprint(source), **facts}
    quantization = quantization_of(unwrapped(model))
    if quantization is not None:
        record["quantization"] = quantization
    (partial / BACKBONE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return folder


def _pack(file: Path) -> None:
    """Write a JSON file without its white space: a tokenizer's is twice the size of its content."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
