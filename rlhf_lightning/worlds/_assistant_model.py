"""The tokenizer, chat template and model configuration of the assistant world: a small Llama to train from scratch."""

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.worlds import _assistant_text as text
from rlhf_lightning.worlds._assistant_gold import WORD_OR_MARK

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('The roles of this chat template are system, user and assistant; found ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")


def vocabulary(further: Sequence[str] = ()) -> list[str]:
    """Return every word and mark of the world, sorted, after the special tokens.

    Args:
        further: what a world that builds on this one says besides.
    """
    said = [*further, *text.SUBJECTS, *text.COURTEOUS_OPENINGS, *text.CURT_OPENINGS, *text.FILLERS]
    said += [*text.COURTEOUS_CLOSINGS, *text.CURT_CLOSINGS]
    for kind in text.KINDS.values():
        said += [*kind.requests, *kind.cores, *kind.details]
    words = {token for sentence in said for token in WORD_OR_MARK.findall(sentence.replace("{s}", ""))}
    return [*SPECIAL_TOKENS, *sorted(words)]


def make_tokenizer(further: Sequence[str] = ()) -> Any:
    """Return the world's word-level tokenizer, a ``PreTrainedTokenizerFast`` with a chat template.

    Words outside the world become ``<|unk|>``; text of the world survives encoding and decoding unchanged.

    Args:
        further: what a world that builds on this one says besides.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary(further))}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.WordPiece(cleanup=True)  # joins words by spaces, none before a mark
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_config(
    hidden_size: int = 96, layers: int = 2, heads: int = 4, intermediate_size: int = 256, further: Sequence[str] = ()
) -> Any:
    """Return a Llama configuration for training from scratch on this world.

    Args:
        hidden_size: width.
        layers: decoder layers.
        heads: attention heads.
        intermediate_size: width of the feed-forward layers.
        further: what a world that builds on this one says besides.
    """
    from transformers import LlamaConfig

    tokenizer = make_tokenizer(further)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
