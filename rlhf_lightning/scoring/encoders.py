"""Trained encoders as scorers: DeBERTa, ModernBERT, BERT and similar with a sequence classification head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf_lightning.errors import ModelError, SettingError, printable
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.folders import reading, require_safetensors
from rlhf_lightning.models.loading import LoadSettings, refuse_nonfinite_weights
from rlhf_lightning.models.resolving import classifier_labels, content_hash, is_adapter, resolve_folder
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores
from rlhf_lightning.tokenization.templates import apply_template
from rlhf_lightning.types import Judgement, Message, MicroBatchLimits, Prompt


class EncoderScorer(Scorer):
    """Score completions with an encoder, such as DeBERTa, ModernBERT or BERT with a trained classification head.

    The model reads prompt and completion as a pair of texts, joined by its tokenizer. If the tokenizer has a chat
    template, it renders the conversation instead. Several labels become parts of the judgement. A pair longer than the
    model's context cannot be judged and is counted in the metric ``score_too_long``.

    Args:
        folder: Hugging Face folder or hub id with a trained sequence classification head.
        max_tokens: maximum number of positions in a forward pass: rows times the longest row.
        dtype: precision of the weights.
        label: label that is the score, if there are several; null uses the first.

    Raises:
        ModelError: the model is not an encoder with a trained classification head.
        SettingError: the label is unknown.
    """

    def __init__(self, folder: str, max_tokens: int = 16_384, dtype: str = "float32", label: str | None = None) -> None:
        self.folder, self.max_tokens, self.dtype = resolve_folder(folder), max_tokens, dtype
        if not is_encoder(self.folder) or not (labels := classifier_labels(self.folder)):
            raise ModelError(
                "untrained-head", f"{folder} is not an encoder with a trained sequence classification head"
            )
        self.output_names = labels if len(labels) > 1 else ()
        self.score_index = label_index(self.folder, self.output_names, label, own=False)
        with reading(self.folder, "tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.measured, self._device = Measured("score_too_long"), torch.device("cpu")

    def weights_hash(self) -> str | None:
        """Return the hash of the reward model's weights, to detect on resuming that they have changed."""
        return content_hash(self.folder)

    @cached_property
    def model(self) -> nn.Module:
        """The frozen classifier, loaded on first use."""
        settings = LoadSettings(dtype=self.dtype)
        require_safetensors(self.folder)
        with reading(self.folder, "reward model"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.folder, dtype=settings.torch_dtype, output_loading_info=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise ModelError(
                "untrained-head", f"{self.folder} lacks weights for {missing}: its scores would be random; name a "
                "trained reward model",
            )  # fmt: skip
        refuse_nonfinite_weights(model, self.folder)
        return model.to(self._device).requires_grad_(False).eval()

    def to(self, device: torch.device) -> EncoderScorer:
        self._device = device
        if "model" in self.__dict__:
            self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        encoded = [self._encode(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        config: Any = self.model.config
        longest = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 10**9)
        lengths = [len(row["input_ids"]) for row in encoded]
        self.measured.add("score_too_long", [float(length > longest) for length in lengths])
        fit = [row for row, length in enumerate(lengths) if length <= longest]
        found: list[float | Judgement | None] = [None] * len(encoded)
        for cut in cut_micro_batches([lengths[row] for row in fit], MicroBatchLimits(max_tokens=self.max_tokens)):
            rows = [fit[place] for place in cut]
            batch = self.tokenizer.pad([encoded[row] for row in rows], return_tensors="pt").to(self._device)
            for row, values in zip(rows, self.model(**batch).logits.float().tolist(), strict=True):
                score = values[self.score_index]
                named = dict(zip(self.output_names, values, strict=True)) if self.output_names else {}
                found[row] = Judgement(score, named) if named else score
        return found

    def _encode(self, prompt: Prompt, completion: str) -> dict[str, list[int]]:
        turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.tokenizer.chat_template:
            messages: list[Message] = [*turns, {"role": "assistant", "content": completion}]
            text = apply_template(self.tokenizer, messages, generation=False)
            return dict(self.tokenizer(text, add_special_tokens=False))
        alone = len(turns) == 1 and turns[0]["role"] == "user"
        said = turns[0]["content"] if alone else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        return dict(self.tokenizer(said, completion, split_special_tokens=True))  # text must not produce [SEP]


def is_encoder(folder: str) -> bool:
    """Return whether a folder or hub id is a bidirectional encoder; an encoder-decoder is refused.

    Raises:
        ModelError: the model is an encoder-decoder.
    """
    if is_adapter(folder):
        return False
    with reading(folder, "reward model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder", f"{folder} is an encoder-decoder ({config.model_type}), which cannot score completions; "
            "name a decoder or an encoder with a classification head",
        )  # fmt: skip
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False)


def label_index(folder: str, names: Sequence[str], label: str | None, own: bool) -> int:
    """Return the index of the output that is the score; warn if a foreign model has several labels and none is set."""
    if label is not None and label not in names:
        raise SettingError(
            "unknown-choice", f"{folder} has no label {label!r}; it has {', '.join(names) or 'one output'}"
        )
    if label is None and names and not own:
        warnings.warn(
            printable(
                f"{folder} has the labels {', '.join(names)}; the score is the first, {names[0]}: set label to choose "
                "another"
            ),
            stacklevel=3,
        )
    return 0 if label is None else list(names).index(label)
