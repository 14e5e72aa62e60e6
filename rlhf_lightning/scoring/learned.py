"""Trained causal and process reward models as scorers, and `load_scorer`, which creates a scorer from a user's spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ModelError, SettingError, check_choice
from rlhf_lightning.functional.ranking import aggregated_steps
from rlhf_lightning.loading import load, read_record, shipped_classes
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.folders import reading
from rlhf_lightning.models.layout import cut_sequences, free_layout, lay_out, padded_layout, select
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import (
    BACKBONE_FILE,
    MEAN_VARIANCE,
    PROMPT_FORM,
    STEP_SEPARATOR,
    backbone_record,
    classifier_labels,
    content_hash,
    output_names,
    resolve_folder,
)
from rlhf_lightning.models.roles import AdapterScalar, load_reward_model, settings_for_inference
from rlhf_lightning.models.scalar_head import ScalarModel, vocabulary_rows
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.scoring.encoders import EncoderScorer, is_encoder, label_index
from rlhf_lightning.scoring.scorer import FunctionScorer, Scorer, Scores
from rlhf_lightning.types import Judgement, MicroBatchLimits, Prompt, Sequences


class LearnedScorer(Scorer):
    """Score completions with a reward model's folder, relative to the stored mean score of demonstrations.

    An adapter's folder is scored on its backbone, quantised as in training. The backbone is shared with the policy if
    both have the same.

    Args:
        folder: Hugging Face folder with a scalar head, either a full model or an adapter on its backbone.
        max_tokens: maximum number of positions in a forward pass: rows times the longest row.
        dtype: precision of the weights; null uses the run's, or fp32 without a run.
        label: output that is the score, if there are several; null uses the first. All are parts of the judgement.
        caution: standard deviations to subtract from the score of a model with mean and variance (see
            `MeanVarianceRewardModule`), so that the policy is not rewarded where the model is uncertain.

    Raises:
        ModelError: the folder's model has no trained head, or is an encoder.
        SettingError: the label is unknown, or the model has no variance.
    """

    def __init__(
        self, folder: str, max_tokens: int = 16_384, dtype: str | None = None, label: str | None = None,
        caution: float = 0.0,
    ) -> None:  # fmt: skip
        self.folder, self.max_tokens, self.dtype = resolve_folder(folder), max_tokens, dtype
        if is_encoder(self.folder):
            raise ModelError(
                "encoder-as-decoder", f"{folder} is an encoder; use EncoderScorer, or the folder's name alone as scorer"
            )
        refuse_untrained_head(self.folder)
        self.tokenizer = tokenization.load_tokenizer(self.folder)
        self.output_names = output_names(self.folder)
        record = backbone_record(self.folder) if Path(self.folder).is_dir() else {}
        self.prompt_form, own = record.get(PROMPT_FORM), bool(record)
        self.score_index, self.caution = label_index(self.folder, self.output_names, label, own), caution
        if caution and tuple(self.output_names) != MEAN_VARIANCE:
            raise SettingError(
                "no-variance",
                f"caution is {caution}, and {folder} has no output log_variance: train MeanVarianceRewardModule, or "
                "set caution to 0",
            )
        self._model: ScalarModel | None = None

    def weights_hash(self) -> str | None:
        """Return the hash of the reward model's weights, to detect on resuming that they have changed."""
        return content_hash(self.folder)

    @property
    def model(self) -> ScalarModel:
        """The frozen reward model, loaded on first use."""
        if self._model is None:
            self._model = self._load(LoadSettings())
        return self._model

    def _load(self, settings: LoadSettings, policy: CausalLM | None = None) -> ScalarModel:
        settings = replace(settings, dtype=self.dtype or settings.dtype)
        return load_reward_model(self.folder, settings, policy, pad_token_id=self.tokenizer.pad_token_id)

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        if self._model is None or isinstance(self._model, AdapterScalar):
            self._model = self._load(settings_for_inference(settings), policy)

    @property
    def models(self) -> Sequence[nn.Module]:
        """The reward model, unless it is an adapter that is sharded with the policy's backbone."""
        return () if isinstance(self.model, AdapterScalar) else (self.model,)

    def to(self, device: torch.device) -> LearnedScorer:
        self.model.to(device)
        return self

    def shares_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether both tokenizers give the same token ids, so that completions need no second encoding.

        With stop strings the answer is False: the text of a completion ended by a stop string lacks it, and gets the
        end token instead.
        """
        mine, theirs = self.tokenizer, tokenizer
        args = tokenization.template_args_of
        same = mine.chat_template == theirs.chat_template and args(mine) == args(theirs)
        same = same and not tokenization.end_token_ids(theirs).strings
        return same and mine.get_vocab() == theirs.get_vocab()

    def has_rows_for(self, sequences: Sequences) -> bool:
        """Return whether each token has an embedding; models of a family pad their vocabularies to different sizes."""
        rows = vocabulary_rows(self.model.model)
        return all(int(ids.max()) < rows for ids in (*sequences.prompts, *sequences.completions) if len(ids))

    def score_of(self, outputs: Tensor) -> Tensor:
        """Return the score from several outputs: the output named by ``label``, minus ``caution`` standard deviations.

        Args:
            outputs: shape (completions, outputs), in the order of ``output_names``.
        """
        score = outputs[:, self.score_index]
        return score - self.caution * (0.5 * outputs[:, 1]).exp() if self.caution else score

    def score_sequences(self, sequences: Sequences) -> Tensor:
        """Return the scores of tokenized completions, fp32, shape (completions,)."""
        outputs = self.outputs_of(sequences)
        return (self.score_of(outputs) if self.output_names else outputs) - self.model.bias

    def judge_sequences(self, sequences: Sequences) -> Tensor | list[Judgement]:
        """Return the scores of tokenized completions, or judgements with the outputs as parts if there are several."""
        if not self.output_names:
            return self.score_sequences(sequences)
        outputs = self.outputs_of(sequences)
        scores = (self.score_of(outputs) - self.model.bias).tolist()
        parts = [dict(zip(self.output_names, row, strict=True)) for row in outputs.tolist()]
        return [Judgement(score, named) for score, named in zip(scores, parts, strict=True)]

    @torch.no_grad()
    def outputs_of(self, sequences: Sequences) -> Tensor:
        """Return the head's outputs for tokenized completions, fp32, shape (completions,) or (completions, outputs)."""
        device = next(self.model.parameters()).device
        shape = (len(sequences.completions), len(self.output_names))
        scores = torch.zeros(shape if self.output_names else shape[:1])
        share = self.model.reads_trees
        with in_step(self.model, partial(self.model, free_layout().to(device))) as before_pass:
            for rows in cut_sequences(sequences, limits=MicroBatchLimits(max_tokens=self.max_tokens), pack_rows=share):
                layout = lay_out(select(sequences, rows), share).to(device)
                before_pass()
                scores[rows] = self.model(layout).to(scores)
        return scores

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        found: Any = self.judge_sequences(scored_sequences(self.tokenizer, prompts, completions))
        return found


class ProcessScorer(Scorer):
    """Score a completion by the probabilities that its steps are right: the minimum, the product, or the last.

    The product is the probability that every step is right if errors are independent (arXiv 2305.20050, Appendix F).
    The minimum does not decrease with the number of steps alone. An empty completion has one empty step.

    With ``credit`` "steps" the reward of step k is the aggregate over the steps up to k minus the aggregate over the
    steps before k. These rewards sum to the score. So a policy gradient has the same return, and learns at which step
    the score dropped.

    Args:
        folder: process reward model's folder.
        aggregate: how step probabilities become one score: "min", "product" or "last".
        credit: position of the reward: "completion" on the last token, "steps" on the last token of each step.
        separator: separator of the steps; null uses the separator of training.
        max_tokens: maximum number of positions in a forward pass: rows times the longest row.
        dtype: precision of the weights.

    Raises:
        SettingError: the aggregate is unknown, or no separator is known.
    """

    def __init__(
        self,
        folder: str,
        aggregate: Literal["min", "product", "last"] = "min",
        separator: str | None = None,
        max_tokens: int = 16_384,
        dtype: str = "float32",
        credit: Literal["completion", "steps"] = "completion",
    ) -> None:
        found = stored_separator(folder) if separator is None else separator
        if not found:
            raise SettingError(
                "no-separator", f"{folder} is not the folder of a process reward model; give the separator of its steps"
            )
        check_choice(("min", "product", "last"), aggregate=aggregate)
        check_choice(("completion", "steps"), credit=credit)
        self.separator, self.aggregate, self.credit = found, aggregate, credit
        self.learned = LearnedScorer(folder, max_tokens, dtype)
        self.folder, self.max_tokens = self.learned.folder, max_tokens

    def to(self, device: torch.device) -> ProcessScorer:
        self.learned.to(device)
        return self

    def steps_of(self, completion: str) -> list[str]:
        """Return the steps of a completion; consecutive separators create no empty step."""
        return [part for part in completion.split(self.separator) if part.strip()] or [completion]

    @torch.no_grad()
    def step_scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the log-odds of each step, fp32, shape (steps,), and the index of its completion, on the CPU."""
        sequences = self._encoded(prompts, completions)
        device = next(self.learned.model.parameters()).device
        scores: dict[int, Tensor] = {}
        for cut in cut_micro_batches(sequences.lengths, MicroBatchLimits(max_tokens=self.max_tokens)):
            layout = padded_layout(select(sequences, cut)).to(device)
            grid = self.learned.model(layout._replace(predictors=layout.predictors + 1), per_token=True).float().cpu()
            for place, number in enumerate(cut):
                scores[number] = grid[place, layout.completion_mask[place].cpu()]
        ordered = [scores[number] for number in range(len(scores))]
        counts = torch.tensor([len(part) for part in ordered], dtype=torch.long)
        return torch.cat([torch.zeros(0), *ordered]), torch.arange(len(ordered)).repeat_interleave(counts)

    def _encoded(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Sequences:
        """Return the completions with a flag on each step's last token, encoded as in training."""
        tokenizer = self.learned.tokenizer
        encoded = [
            tokenization.encode_steps(tokenizer, self.steps_of(completion), self.separator, prompt)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return encoded_sequences(tokenizer, prompts, encoded)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        scores, row = self.step_scores(prompts, completions)
        logs = torch.nn.functional.logsigmoid(scores)
        if self.credit == "completion":
            return aggregated_steps(logs, row, len(completions), self.aggregate).exp()
        return [self._by_step(logs[row == number], text) for number, text in enumerate(completions)]

    def _by_step(self, logs: Tensor, completion: str) -> Judgement:
        """Return a completion's score, with the change of the score at each step as span rewards."""
        prefixes = torch.cat([logs[: step + 1] for step in range(len(logs))])
        rows = torch.arange(len(logs)).repeat_interleave(torch.arange(1, len(logs) + 1))
        so_far = [0.0, *aggregated_steps(prefixes, rows, len(logs), self.aggregate).exp().tolist()]
        spans, start = [], 0
        for step, before, now in zip(self.steps_of(completion), so_far, so_far[1:], strict=False):
            start = completion.index(step, start)
            spans.append((start, start + len(step), now - before))
            start += len(step)
        return Judgement(so_far[-1], span_rewards=spans if completion else ())


def scored_sequences(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[str]
) -> Sequences:
    """Encode prompts with their completions; every token of a completion is scored."""
    pairs = zip(prompts, completions, strict=True)
    encoded = [tokenization.encode_completion(tokenizer, completion, prompt)[0] for prompt, completion in pairs]
    return encoded_sequences(tokenizer, prompts, [(ids, [True] * len(ids)) for ids in encoded])


def encoded_sequences(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], encoded: Sequence[tuple[list[int], list[bool]]]
) -> Sequences:
    """Return prompts with their completions, given as token ids and flags of the scored tokens."""
    return Sequences(
        prompts=tuple(torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt in prompts),
        completions=tuple(torch.tensor(ids, dtype=torch.long) for ids, _ in encoded),
        parents=tuple(range(len(encoded))),
        supervised=tuple(torch.tensor(flags, dtype=torch.bool) for _, flags in encoded),
    )


def refuse_untrained_head(folder: str) -> None:
    """Refuse a model without trained weights of a scalar head, since transformers would initialise a random head.

    Raises:
        ModelError: the folder's weights have no head, or the config of a hub id names no sequence classifier.
    """
    path = Path(folder)
    if not path.is_dir():
        trained = bool(classifier_labels(folder))
    else:
        files = sorted(path.glob("*.safetensors"))
        with reading(folder, "reward model"):
            names = [name for file in files for name in safe_open(file, framework="pt").keys()]  # noqa: SIM118
        trained = not files or any(re.search(r"(^|\.)score\.", name) for name in names)
    if not trained:
        raise ModelError(
            "untrained-head",
            f"{folder} has no trained reward head: as a scorer it would give random scores; name a reward model's "
            "folder, or train one first (rlhf fit --config recipe:reward)",
        )


def stored_separator(folder: str) -> str | None:
    """Return the separator that a process reward model's folder was trained with; None for other folders."""
    record = Path(resolve_folder(folder)) / BACKBONE_FILE
    return read_record(record).get(STEP_SEPARATOR) if record.is_file() else None


def load_scorer(spec: Any) -> Scorer:
    """Return the scorer that ``spec`` describes.

    Args:
        spec: folder or hub id of a reward model or process reward model; or a spec for `loading.load`: a Scorer or a
            function, a class of this package such as ``MathAnswerScorer``, an import path such as
            ``my_scores.brevity``, or ``{"class_path": ..., "init_args": {...}}``.

    Raises:
        SettingError: see `loading.load`.
        MissingError: the folder does not exist.
    """
    spec = str(spec) if isinstance(spec, Path) else spec
    if isinstance(spec, str) and ".py" in (Path(spec).suffix, Path(spec.partition(":")[0]).suffix):
        module = Path(spec.partition(":")[0]).stem
        raise SettingError(
            "file-as-scorer", f"{spec!r} is a file: name its function by module and name, such as {module}.score"
        )
    if isinstance(spec, str) and (Path(spec).expanduser().is_dir() or "/" in spec):
        if stored_separator(spec):
            return ProcessScorer(spec)
        return EncoderScorer(spec) if is_encoder(resolve_folder(spec)) else LearnedScorer(spec)
    found = load(spec, Callable, shipped_classes("rlhf_lightning.scoring", Scorer), "scorer")
    return found if isinstance(found, Scorer) else FunctionScorer(found)
