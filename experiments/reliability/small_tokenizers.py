"""Small tokenizers of three families, each with its own way to mistake contents for control tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = (
    "{% for m in messages %}{{ '<<' + m['role'] + '>>' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + '<<end>>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<<assistant>>' }}{% endif %}"
)
SENTENCES = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)


def _wrapped(backend: Tokenizer, template: str, **special: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **special
    )


def _bytes() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "im", "end"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("i", "m")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_level() -> Any:
    """Byte-level BPE, whose turn markers are special tokens."""
    backend = _bytes()
    backend.add_special_tokens(["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrapped(backend, CHATML, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|endoftext|>")


def unmarked() -> Any:
    """Lowercasing byte-level BPE, whose turn markers are added tokens that are not marked special."""
    backend = _bytes()
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<pad>", "<eos>"])
    markers = ("<<user>>", "<<assistant>>", "<<system>>", "<<end>>", "<think>", "</think>")
    backend.add_tokens([AddedToken(marker, special=False, normalized=True) for marker in markers])
    return _wrapped(backend, UNMARKED, pad_token="<pad>", eos_token="<eos>")


def sentence_pieces() -> Any:
    """A unigram model over words with a space marker, with control tokens in its vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", *(f"▁{word}" for word in ("a", "the", "yes", "no"))]
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzINSTHW<>|/[]_:.,?!'\"0123456789é漢字\n"})
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in [*pieces, *letters]], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _wrapped(backend, SENTENCES, **special)


TOKENIZERS = {"byte_level": byte_level, "unmarked": unmarked, "sentence_pieces": sentence_pieces}
