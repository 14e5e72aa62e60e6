"""A tabular causal language model: one row of next-token logits per prefix, behind the interface of transformers.

The table can represent any policy over the completions of an `EnumerableWorld`, so that every optimum is reachable.
Modules load it from a folder like any other model, without changes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
"""Chat template: the contents of all turns, concatenated."""

IMPOSSIBLE = -1e4
"""Logit of tokens that occur in no completion: their probability is exactly 0, and so is its gradient."""


_READ: dict[str, Any] = {}
"""Configs by their contents."""


class TabularConfig(PretrainedConfig):
    """Sizes of the table.

    Args:
        prompts: number of prompts, each of one token.
        tokens: number of completion tokens, including the end token.
        max_new_tokens: maximum length of a completion.
    """

    model_type = "tabular"

    def __init__(self, prompts: int = 2, tokens: int = 3, max_new_tokens: int = 2, **kwargs: Any) -> None:
        self.prompts, self.tokens, self.max_new_tokens = prompts, tokens, max_new_tokens
        self.num_hidden_layers, self.num_attention_heads = 1, 1
        self.vocab_size = self.hidden_size = 1 + tokens + prompts
        # Ids: 0 is padding, 1 is the end token, 2 .. tokens are the other answer tokens, the rest are prompts.
        defaults = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1}
        super().__init__(**{**defaults, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config, cached by its contents: transformers formats each config for its log, which takes longest."""
        key = str((sorted(config_dict.items()), sorted(kwargs.items())))
        if key not in _READ:
            _READ[key] = super().from_dict(dict(config_dict), **kwargs)
        return copy.deepcopy(_READ[key])

    @property
    def sizes(self) -> dict[str, int]:
        """Constructor arguments that recreate the same table: prompts, tokens and maximum length."""
        return {"prompts": self.prompts, "tokens": self.tokens, "max_new_tokens": self.max_new_tokens}

    def transitions(self) -> Tensor:
        """Return the next prefix for each prefix and token, int64, shape (prefixes, vocabulary).

        Prefix 0 is the empty context; prefix 1 stands for every context that sampling cannot reach. A prompt token
        starts a new context. Anything a teacher reads before the prompt, including unknown words, therefore has no
        effect.
        """
        rows: list[list[int]] = [[0] + [1] * (self.vocab_size - 1), [1] * self.vocab_size]
        level: list[int] = []
        for prompt in range(self.prompts):
            rows[0][1 + self.tokens + prompt] = len(rows)
            level.append(len(rows))
            rows.append([1] * self.vocab_size)
        for _ in range(self.max_new_tokens):
            following: list[int] = []
            for prefix in level:
                for token in range(1, self.tokens + 1):
                    rows[prefix][token] = len(rows)
                    if token != 1:
                        following.append(len(rows))
                    rows.append([1] * self.vocab_size)
            level = following
        table = torch.tensor(rows)
        table[:, 1 + self.tokens :] = table[0, 1 + self.tokens :]
        table[:, 0] = torch.arange(len(table))
        return table


class _IdentityHead(nn.Module):
    """Identity, as the table's rows are the logits. The weight is a buffer: a trained head would be a second table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.eye(size))
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight)


class TabularPreTrainedModel(PreTrainedModel):
    """Base of the three classes below."""

    config_class = TabularConfig
    base_model_prefix = "model"
    _tied_weights_keys: Any = None
    _read: dict[tuple[str, ...], Any] = {}

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a folder, cached per process while it is unchanged: the checks create a hundred instances of a class."""
        changed = max(path.stat().st_mtime_ns for path in Path(name).iterdir())
        written = "" if config is None else config.to_json_string(use_diff=False)
        key = (cls.__name__, str(name), str(changed), written, str(sorted(kwargs.items())))
        if key not in cls._read:
            cls._read[key] = super().from_pretrained(name, *args, config=config, **kwargs)
        return copy.deepcopy(cls._read[key])

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the default initialisation of tables and set linear layers to 0."""
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)


class TabularModel(TabularPreTrainedModel):
    """Map token ids to the table row of each prefix."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        transitions = config.transitions()
        self.register_buffer("transitions", transitions)
        self.table = nn.Embedding(len(transitions), config.vocab_size)
        self.layers = nn.ModuleList([nn.Identity()])  # its outputs are recorded for classes with hidden_layers
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.table

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Walk along each row of ids. Padding in front has no effect; the cache holds the prefixes walked so far."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        rows = len(input_ids)
        if seen:
            prefix = past_key_values.layers[0].keys[:, 0, -1, 0].round().long()
        else:
            prefix = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        walked = []
        for position in range(input_ids.shape[1]):
            prefix = self.transitions[prefix, input_ids[:, position]]
            walked.append(prefix)
        prefixes = torch.stack(walked, dim=1)
        if past_key_values is not None:
            keys = prefixes.to(torch.float64)[:, None, :, None]
            past_key_values.update(keys, keys, 0)
        states = self.table(prefixes)
        self.layers[0](states.clamp_min(-10.0))  # clamped, as impossible tokens have huge logits
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)


class TabularForCausalLM(TabularPreTrainedModel):
    """The policy."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = _IdentityHead(config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the identity head."""
        return self.lm_head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Return the next-token logits."""
        outputs = self.model(input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


class TabularForSequenceClassification(TabularPreTrainedModel):
    """A reward model or critic: linear outputs of each prefix's row."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.score = nn.Linear(config.vocab_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> SequenceClassifierOutputWithPast:
        """Return the score at the last id that is not padding."""
        outputs = self.model(input_ids, **kwargs)
        last = (input_ids != 0).long().cumsum(-1).argmax(-1)
        logits = self.score(outputs.last_hidden_state[torch.arange(len(input_ids)), last])
        return SequenceClassifierOutputWithPast(logits=logits)


def register() -> None:
    """Register the table with transformers' Auto classes."""
    AutoConfig.register("tabular", TabularConfig, exist_ok=True)
    AutoModel.register(TabularConfig, TabularModel, exist_ok=True)
    AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(TabularConfig, TabularForSequenceClassification, exist_ok=True)


def make_tokenizer(config: TabularConfig) -> Any:
    """Return a tokenizer whose words are single letters (answers) and p0, p1 ... (prompts)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(ord("a") + index) for index in range(config.tokens - 1)]
    words = ["<|pad|>", "<|eos|>", *letters, *(f"p{index}" for index in range(config.prompts))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|eos|>", chat_template=TEMPLATE
    )


register()
