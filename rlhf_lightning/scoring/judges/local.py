"""A local language model as judge and as writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import ModelError, SettingError
from rlhf_lightning.functional.judging import option_logprobs
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.causal_lm import CausalLM, DecodingStep, inference_mode_of
from rlhf_lightning.models.resolving import content_hash, resolve_folder
from rlhf_lightning.models.roles import load_frozen
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.slot_engine import load_engine
from rlhf_lightning.scoring.judges.judge import JudgeAnswer, Question, Written, as_text, first_paragraphs, no_answer
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.types import Message, MicroBatchLimits, Prompt

SPELLINGS = '{}| {}|({}| ({}|{})| {})|({})| ({})|{}.| {}.|{}:| {}:|"{}|*{}|**{}'.split("|")
"""Ways to write a letter as one token; all spellings that the tokenizer has are summed."""

SHARED_AT_LEAST = 16
"""Minimum number of saved tokens for which a separate forward pass over common prefixes pays off."""


def context_length(model: CausalLM) -> int | None:
    """Return the model's context length in tokens; None if its configuration does not state it."""
    found = getattr(model.model.config, "max_position_embeddings", None)
    return int(found) if found else None


class LocalWriter:
    """Answer, criticise and revise with a local model, with random numbers seeded by episode.

    Args:
        model: a loaded model.
        tokenizer: its tokenizer.
        settings: sampling settings.
        seed: seed of the sampling.
        name: source of the rows.
        engine: sampling engine; None for a `SlotEngine`.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        seed: int,
        name: str,
        engine: SamplingEngine | None = None,
    ) -> None:
        self.engine = load_engine(engine)
        self.model, self.tokenizer, self.settings, self.seed, self.name = model, tokenizer, settings, seed, name
        self.longest = context_length(model)

    def __call__(self, prompts: Sequence[Prompt], episodes: Sequence[int]) -> list[Written | None]:
        """Return a completion of each prompt; None if prompt and completion may exceed the context."""
        encoded = [torch.tensor(tokenization.encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        room = None if self.longest is None else self.longest - self.settings.max_new_tokens
        fit = [place for place, ids in enumerate(encoded) if room is None or len(ids) <= room]
        written: list[Written | None] = [None] * len(prompts)
        if not fit:
            return written
        ends, numbers = tokenization.end_token_ids(self.tokenizer), torch.tensor([episodes[place] for place in fit])
        drawn = self.engine.sample(
            self.model, [encoded[place] for place in fit], numbers, self.settings, self.seed, ends
        )
        for place, ids, finished in zip(fit, drawn.ids, drawn.finished.tolist(), strict=True):
            written[place] = Written(tokenization.completion_text(self.tokenizer, ids.tolist()), finished)
        return written


class LocalJudge:
    """Local language model that is asked for a letter; its probabilities are read, and nothing is sampled.

    The answer is prefilled ("The better answer is ("). The next-token probabilities of all spellings of A, and of B,
    are summed. The LM head is applied only to the last position of a question. A common prefix is prefilled once: that
    of all questions (examples), or that of the questions about one prompt. With reasoning the model first writes the
    reasoning, by greedy decoding. A model without a chat template reads a transcript.

    Args:
        model: folder (full weights or an adapter), .gguf file or hub id; or a loaded model, with its tokenizer.
        tokenizer: tokenizer of a loaded model; null loads the folder's own.
        dtype: precision of the weights, float32 or bfloat16.
        chat_template: template that replaces the tokenizer's own.
        template_args: variables of the chat template, such as enable_thinking.
        max_tokens: maximum number of positions in a forward pass: questions times the longest question.
        max_length: maximum length of a question, tokens; longer questions get no answer; null uses the context length.
        reasoning_tokens: maximum length of the reasoning, tokens.
        name: source of the labels; null uses the model's name.

    Raises:
        SettingError: a loaded model comes without its tokenizer.
        ModelError: the tokenizer has no token for a letter.
    """

    def __init__(
        self,
        model: str | CausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
        max_tokens: int = 8192,
        max_length: int | None = None,
        reasoning_tokens: int = 256,
        name: str | None = None,
    ) -> None:
        self.folder = resolve_folder(model) if isinstance(model, str) else None
        if isinstance(model, str):
            self.name = name or model
            self.model = load_frozen(model, dtype)
            self.tokenizer = load_tokenizer(str(self.folder), chat_template, template_args=template_args)
        else:
            if tokenizer is None:
                raise SettingError(
                    "no-tokenizer-given", "a loaded model was given without its tokenizer; pass tokenizer too"
                )
            self.name, self.model, self.tokenizer = name or model.source, model, tokenizer
        self.max_tokens = max_tokens
        self.max_length = max_length or context_length(self.model)
        self.letters = [letter_ids(self.tokenizer, letter) for letter in "AB"]
        settings = SamplingSettings(max_new_tokens=reasoning_tokens, temperature=0.0, batch_size=16)
        self.thinker = LocalWriter(self.model, self.tokenizer, settings, 0, self.name)

    def weights_hash(self) -> str | None:
        """Return the hash of the weights, to detect on resuming that they have changed."""
        return None if self.folder is None else content_hash(self.folder)

    def __call__(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """Answer the questions, in batches of similar length."""
        said = self._reasoning(questions)
        encoded = [self._encode(one, one.messages_with_answer(text)) for one, text in zip(questions, said, strict=True)]
        answers = [no_answer("too_long", text) for text in said]
        fit = [place for place, ids in enumerate(encoded) if self.max_length is None or len(ids) <= self.max_length]
        with inference_mode_of(self.model):
            for cut in cut_micro_batches(
                [len(encoded[place]) for place in fit], MicroBatchLimits(max_tokens=self.max_tokens)
            ):
                rows = [fit[place] for place in cut]
                prompts = [repr(questions[row].prompt) for row in rows]
                letters = self._letters([encoded[row] for row in rows], prompts)
                for row, (first, second) in zip(rows, letters, strict=True):
                    answers[row] = JudgeAnswer(first, second, said[row])
        return answers

    def _encode(self, question: Question, turns: list[Message]) -> Tensor:
        return torch.tensor(tokenization.encode_prompt(self.tokenizer, self._read(question, turns)))

    def _read(self, question: Question, turns: list[Message]) -> Prompt:
        return turns if self.tokenizer.chat_template else as_text(turns, question.wording)

    def _reasoning(self, questions: Sequence[Question]) -> list[str]:
        """Return the reasoning before each answer; empty for questions without reasoning."""
        said, asked = [""] * len(questions), [place for place, one in enumerate(questions) if one.reasons]
        if asked:
            begun = [self._read(questions[place], questions[place].messages_with_reasoning()) for place in asked]
            for place, one in zip(asked, self.thinker(begun, [0] * len(asked)), strict=True):
                text = "" if one is None else one.text
                said[place] = text if self.tokenizer.chat_template else first_paragraphs(text, questions[place].wording)
        return said

    def _letters(self, rows: list[Tensor], prompts: list[str]) -> list[tuple[float, float]]:
        """Return the log-probabilities of the two letters after each row of token ids."""
        logprobs = next_logits(self.model, rows, prompts).log_softmax(-1)
        first, second = (option_logprobs(logprobs[:, ids.to(logprobs.device)]) for ids in self.letters)
        return list(zip(first.tolist(), second.tolist(), strict=True))


def next_logits(model: CausalLM, rows: Sequence[Tensor], groups: Sequence[Any] | None = None) -> Tensor:
    """Return the logits of the token after each row, shape (rows, vocabulary).

    A common prefix is prefilled once: that of all rows, or those of the groups, whichever saves more tokens. The rest
    is padded on the left, so that the last position predicts the next token of every row.

    Args:
        model: the model.
        rows: token ids of each row, int64; no row may be empty.
        groups: the group of each row, such as its prompt; None for one group.
    """
    device = next(model.parameters()).device
    found = [shared_prefixes(rows, named) for named in ([0] * len(rows), groups) if named is not None]
    saved = [sum(len(prefixes[owner]) for owner in owners) - sum(map(len, prefixes)) for prefixes, owners in found]
    cache = DynamicCache(config=model.model.config)
    repeats = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)  # recurrent states cannot be shared
    if max(saved) < SHARED_AT_LEAST or not repeats:
        input_ids, mask, positions = left_padded(rows)
        return model(DecodingStep(input_ids.to(device), mask.to(device), positions.to(device)))
    prefixes, owners = found[saved.index(max(saved))]
    owner, (input_ids, shared, positions) = torch.tensor(owners), left_padded(prefixes)
    model(DecodingStep(input_ids.to(device), shared.to(device), positions.to(device), cache))
    cache.batch_select_indices(owner.to(device))
    starts = shared.sum(-1)[owner]
    input_ids, mask, positions = left_padded([ids[start:] for ids, start in zip(rows, starts.tolist(), strict=True)])
    attended, positions = torch.cat([shared[owner], mask], -1), positions + starts.unsqueeze(-1)
    return model(DecodingStep(input_ids.to(device), attended.to(device), positions.to(device), cache))


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids of rows padded on the left, their mask and their positions; int64, shape (rows, longest)."""
    lengths = torch.tensor([len(ids) for ids in rows]).unsqueeze(-1)
    width = int(lengths.max())
    mask = torch.arange(width) >= width - lengths
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    input_ids[mask] = torch.cat(list(rows)).long()
    return input_ids, mask.long(), (mask.long().cumsum(-1) - 1).clamp(min=0)


def shared_prefixes(rows: Sequence[Tensor], groups: Sequence[Any]) -> tuple[list[Tensor], list[int]]:
    """Return the common prefix of each group of rows, and the index of each row's group."""
    names = list(dict.fromkeys(groups))
    owners = [names.index(name) for name in groups]
    members = [[ids for ids, owner in zip(rows, owners, strict=True) if owner == place] for place in range(len(names))]
    return [some[0][: shared_length(some)] for some in members], owners


def shared_length(rows: Sequence[Tensor]) -> int:
    """Return the length of the rows' common prefix, leaving each row at least one token after it."""
    shortest = min(len(ids) for ids in rows) - 1
    grid = torch.stack([ids[:shortest] for ids in rows])
    return int((grid == grid[0]).all(0).long().cumprod(0).sum())


def letter_ids(tokenizer: PreTrainedTokenizerBase, letter: str) -> Tensor:
    """Return the ids of the tokens that spell a letter, alone or with a space, a bracket or a punctuation mark.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    unknown = tokenizer.unk_token_id
    spelt = (tokenizer(way.format(letter), add_special_tokens=False)["input_ids"] for way in SPELLINGS)
    found = {ids[0] for ids in spelt if len(ids) == 1 and ids[0] != unknown}
    if not found:
        raise ModelError(
            "no-letter-token",
            f"the tokenizer {tokenizer.name_or_path!r} has no token for the letter {letter}, which "
            "judges answer with; choose another judge model",
        )
    return torch.tensor(sorted(found))
