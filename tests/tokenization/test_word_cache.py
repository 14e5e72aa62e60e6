"""Ids that are looked up word by word are those of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.tokenization import word_cache
from rlhf_lightning.tokenization.word_cache import WordCache, word_cache_of, words_of

TEXT = ["The quick brown fox, the dog. It's 12 345; don't (ever) go!\n\nA  tab\tand é e\u0301 x.", "<|end|> a b"] * 4
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


ALONE = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "tiktoken": split(TIKTOKEN),
    "Metaspace": pre_tokenizers.Metaspace(),
}


def trained(cuts, **parts):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = cuts
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    special = ["<unk>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<unk>")


def of_library(tokenizer, texts):
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="module", params=ALONE)
def tokenizer(request):
    return trained(ALONE[request.param], normalizer=normalizers.NFC() if request.param == "tiktoken" else None)


PIECES = ["the", "Fox,", "don't", "'", "12345", "(", "<|end|>", " ", "  ", "\n", "\u00a0", "\u0301", "é", "你", "\0"]


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map(" ".join), max_size=6))
def test_words_have_the_ids_of_the_whole_text(tokenizer, texts):
    cache = word_cache_of(tokenizer)
    assert cache is not None and word_cache_of(tokenizer) is cache
    for _ in range(2):
        assert cache.encode(texts, lambda words: of_library(tokenizer, words)) == of_library(tokenizer, texts)


def test_texts_are_cut_only_at_single_spaces_between_visible_characters():
    assert words_of("a bc, d") == ["a", " bc,", " d"]
    for whole in ("", " a", "a ", "a  b", "a\n b", "é b", "a é", "a\u00a0b"):
        assert words_of(whole) == [whole]


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(lambda: trained(split(r"[^.]+|\.")), id="sentences"),
        pytest.param(lambda: trained(split(r"Z [a-z]+| ?\S+|\s")), id="some words are joined"),
        pytest.param(lambda: trained(split(r"[^ ]+ ?| ")), id="the space ends a word"),
        pytest.param(lambda: trained(None), id="one part"),
        pytest.param(lambda: trained(ALONE["GPT-2"], normalizer=normalizers.NFKC()), id="rewritten text"),
        pytest.param(lambda: trained(pre_tokenizers.Whitespace()), id="no spaces"),
    ],
)  # fmt: skip
def test_tokenizers_that_join_words_have_no_cache(tokenizer):
    assert word_cache_of(tokenizer()) is None


def test_changed_tokenizers_lose_their_cache():
    tokenizer = trained(ALONE["GPT-2"])
    before = word_cache_of(tokenizer)
    tokenizer.add_tokens([AddedToken("Fox,")])
    assert word_cache_of(tokenizer) not in (before, None)
    tokenizer.add_tokens([AddedToken("lazy", rstrip=True)])
    assert word_cache_of(tokenizer) is None
    random = trained(ALONE["GPT-2"])
    random.backend_tokenizer.model.dropout = 0.1
    assert word_cache_of(random) is None


def test_a_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(word_cache, "MOST_CHARACTERS", 10)
    cache = WordCache()
    lengths = lambda words: [[len(word)] for word in words]
    assert cache.encode(["a bb", "a ccc"], lengths) == [[1, 3], [1, 4]]
    assert set(cache.ids) == {"a", " bb", " ccc"}
    assert cache.encode(["a dd"], lengths) == [[1, 3]] and not cache.ids
