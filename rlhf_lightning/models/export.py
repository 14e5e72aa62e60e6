"""Export a trained model as a Hugging Face folder: weights or adapter, tokenizer with template, and provenance."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.atomic_files import complete_folder
from rlhf_lightning.compat import erases_pad_row
from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.quantization import quantization_of
from rlhf_lightning.models.resolving import BACKBONE_FILE, SCORE_BIAS, fingerprint
from rlhf_lightning.models.scalar_head import ScalarModel, text_config, unwrapped
from rlhf_lightning.models.sharding import is_first_rank, whole_weights
from rlhf_lightning.tokenization import end_token_ids

CARD_FILE = "README.md"


def export_policy(policy: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a policy so that AutoModelForCausalLM (or peft, for an adapter) can load it; return the folder."""
    return _export(policy.model, tokenizer, Path(folder), policy.source, {})


def export_reward_model(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, source: str, **facts: Any
) -> Path:
    """Write a reward model so that AutoModelForSequenceClassification loads it with the same scores.

    That class reads the score at the last token that is not ``pad_token_id``, so the exported pad token must differ
    from the end token. The bias of the scores, which ``LearnedScorer`` subtracts, and further facts are written to
    config.json (for an adapter to backbone.json).
    """
    return _export(reward_model.model, tokenizer, Path(folder), source, {SCORE_BIAS: reward_model.bias, **facts})


def _export(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str, facts: dict[str, Any]) -> Path:
    """Write the export to a temporary folder next to ``folder``, then rename it: no reader sees a partial model.

    If weights are sharded, every rank must call; the first rank writes.
    """
    weights = whole_weights(model)
    if weights is not None and not is_first_rank():
        return folder
    config = unwrapped(model).config
    if not erases_pad_row(unwrapped(model)):
        config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    _note_ends(unwrapped(model), tokenizer)
    for name, value in facts.items():
        setattr(config, name, value)
    record = {"source": model_name(source), "fingerprint": fingerprint(source), **facts}
    quantization = quantization_of(unwrapped(model))
    if quantization is not None:
        record["quantization"] = quantization
    kind = "adapter" if hasattr(model, "peft_config") else "model"
    with complete_folder(folder) as partial:
        if hasattr(model, "peft_config"):
            model.peft_config["default"].base_model_name_or_path = source
            # No config.json in the adapter's folder: transformers would take it for a whole model and miss its weights.
            model.save_pretrained(partial, selected_adapters=["default"], state_dict=weights)
        else:
            with _room_for_pad(model, tokenizer, weights) as grown:
                model.save_pretrained(partial, state_dict=grown)
        tokenizer.save_pretrained(partial)
        _pack(partial / "tokenizer.json")
        (partial / BACKBONE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        card = model_card(source, kind, SCORE_BIAS in facts, record["fingerprint"])
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def _note_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write every token that ends a completion to the folder's generation config, EOS first."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        eos = tokenizer.eos_token_id
        ends = [eos, *(token for token in end_token_ids(tokenizer) if token != eos)]
        generation.eos_token_id = ends if len(ends) > 1 else eos
        generation.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _room_for_pad(
    model: Any, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None
) -> Iterator[dict[str, Tensor] | None]:
    """Yield the weights to write, with an embedding row for a pad token added beyond the vocabulary.

    Other libraries need the row. It is the mean of all other rows, so that the pad token is at most as likely as an
    average token. The model in memory is not changed.
    """
    inner = unwrapped(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    rows = embedding.weight.shape[0]
    missing = (tokenizer.pad_token_id or 0) + 1 - rows
    if missing <= 0:
        yield weights
        return
    state = dict(model.state_dict() if weights is None else weights)
    for name, module in inner.named_modules():
        if module is embedding or module is head:
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in state and state[key].shape[:1] == (rows,):
                    mean = state[key].float().mean(0, keepdim=True).to(state[key])
                    state[key] = torch.cat([state[key], mean.expand(missing, *mean.shape[1:])])
    config = text_config(inner)
    config.vocab_size = rows + missing
    try:
        yield state
    finally:
        config.vocab_size = rows


def push_folder(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload an exported folder to the Hugging Face Hub, or to the server named by HF_ENDPOINT; return its URL.

    Raises:
        ModelError: the Hub cannot be reached or refuses the upload.
    """
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with _without_paths(Path(folder)) as shared:
            return str(hub.upload_folder(repo_id=repo_id, folder_path=shared))
    except Exception as error:  # includes the HTTP library's errors; the library depends on the huggingface_hub version
        raise ModelError(
            "push-failed",
            f"{repo_id} was not pushed ({reason_of(error)}); check name, network and `hf auth login`, and push "
            f"{folder} again",
        ) from error


@contextmanager
def _without_paths(folder: Path) -> Iterator[Path]:
    """Yield the folder; for an adapter on a local backbone yield a copy that does not contain the backbone's path."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    source = settings.get("base_model_name_or_path")
    if not isinstance(source, str) or model_name(source) == source:
        yield folder
        return
    with TemporaryDirectory() as place:
        copy = shutil.copytree(folder, Path(place) / folder.name)
        settings["base_model_name_or_path"] = model_name(source)
        (copy / file.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        yield copy


def model_name(source: str) -> str:
    """Return the name of a model for folders that others read: its Hub id, or a local folder's name without its path.

    The folder of a run keeps the run's name: ``sft/version_0/model``.
    """
    path = Path(source)
    if not (path.is_absolute() or path.is_dir()):
        return source
    parts = path.resolve().parts
    run = next((place for place, part in enumerate(parts) if re.fullmatch(r"version_\d+", part)), 0)
    return "/".join(parts[run - 1 :] if run > 1 else parts[-1:])


def model_card(source: str, kind: str, scores: bool, fingerprint: str | None = None) -> str:
    """Return the README.md of an exported folder, which replaces peft's empty one.

    Args:
        source: the model that training started from.
        kind: "adapter" or "model".
        scores: True for a reward model, False for a policy.
        fingerprint: fingerprint of the weights that training started from.
    """
    name = model_name(source)
    local = name != source or Path(source).is_dir()
    head = "SequenceClassification" if scores else "CausalLM"
    loader = f"AutoPeftModelFor{head}" if kind == "adapter" else f"AutoModelFor{head}"
    package = "peft" if kind == "adapter" else "transformers"
    base = "" if local else f"base_model: {source}\n"
    title = "Reward model" if scores else "Policy"
    weights = "" if fingerprint is None else f", whose weights have the fingerprint {fingerprint}"
    elsewhere = (
        "`adapter_config.json` names the folder of the backbone on the machine that trained the adapter; elsewhere, "
        "write the folder or Hub id of the same weights there, as `base_model_name_or_path`.\n\n"
        if local and kind == "adapter"
        else ""
    )
    return (
        f"---\n{base}library_name: {package}\ntags:\n- rlhf-lightning\n---\n\n# {title}\n\n"
        f"Trained with rlhf-lightning from `{name}`{weights}.\n\n{elsewhere}"
        f"```python\nfrom {package} import {loader}\nfrom transformers import AutoTokenizer\n\n"
        f"model = {loader}.from_pretrained(FOLDER)\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n"
    )


def _pack(file: Path) -> None:
    """Rewrite a JSON file without white space, which makes up half of a tokenizer's file."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
