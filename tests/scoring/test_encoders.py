"""Encoders and foreign classifiers as scorers: their own tokenizer and template, their labels as parts."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import CHAT_TEMPLATE, FIRST_WORD, SPECIAL, VOCABULARY, save_policy, save_reward_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

from rlhf_lightning.models.loading import LoadSettings, load_hf_model
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.scoring import EncoderScorer, LearnedScorer, checked_scores, load_scorer
from rlhf_lightning.scoring.scorer import ask_scorer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(40)), ":", "user", "assistant"]
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **SIZES),
    "deberta": DebertaV2Config(
        vocab_size=len(WORDS), max_position_embeddings=24, relative_attention=True, pos_att_type=["c2p", "p2c"], **SIZES
    ),
    "modernbert": ModernBertConfig(
        vocab_size=len(WORDS), max_position_embeddings=24, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, **SIZES,
    ),
}  # fmt: skip


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=24,
    )  # fmt: skip


def save_encoder(folder: Path, kind: str, labels: int = 1) -> str:
    torch.manual_seed(0)
    config = CONFIGS[kind].__class__(**{**CONFIGS[kind].to_dict(), "num_labels": labels})
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return str(folder)


PROMPTS = ["w1 w2", [{"role": "user", "content": "w3"}], "w1 w2 w4 w5"]
TEXTS = ["w6", "w7 w8 w9", "w10 w11"]
PAIRS = [("w1 w2", "w6"), ("w3", "w7 w8 w9"), ("w1 w2 w4 w5", "w10 w11")]


@pytest.mark.parametrize("kind", CONFIGS)
def test_encoder_scores_equal_transformers(kind: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / kind, kind)
    scorer = load_scorer(folder)
    assert isinstance(scorer, EncoderScorer)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [float(model.eval()(**tokenizer(*pair, return_tensors="pt")).logits) for pair in PAIRS]
    assert float(torch.tensor(expected).std()) > 1e-3
    assert checked_scores(scorer(PROMPTS, TEXTS), 3, "x").tolist() == pytest.approx(expected, abs=1e-5)
    small = EncoderScorer(folder, max_tokens=8)
    assert checked_scores(small(PROMPTS, TEXTS), 3, "x").tolist() == pytest.approx(expected, abs=1e-5)


def test_a_pair_beyond_the_context_has_no_score_and_is_counted(tmp_path: Path) -> None:
    scorer = EncoderScorer(save_encoder(tmp_path / "bert", "bert"))
    found = scorer(["w1", "w1"], ["w2 " * 30, "w2"])
    assert found[0] is None and found[1] is not None
    assert scorer.take_metrics()["score_too_long"].tolist() == [1.0, 0.0]


def test_control_tokens_in_a_completion_are_encoded_as_text(tmp_path: Path) -> None:
    scorer = EncoderScorer(save_encoder(tmp_path / "bert", "bert"))
    ids = scorer._encode("w1", "w2 [SEP] w3")["input_ids"]
    assert ids.count(3) == 2


def test_labels_become_parts_and_one_is_the_score(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "five", "bert", labels=5)
    with pytest.warns(UserWarning, match="the score is the first, LABEL_0: set label"):
        first = load_scorer(folder)
    judged = ask_scorer(first, PROMPTS, TEXTS, {}, "x")
    assert sorted(judged.parts) == [f"LABEL_{n}" for n in range(5)]
    assert judged.scores.tolist() == judged.parts["LABEL_0"].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = EncoderScorer(folder, label="LABEL_3")
    assert ask_scorer(third, PROMPTS, TEXTS, {}, "x").scores.tolist() == judged.parts["LABEL_3"].tolist()
    with refused("unknown-choice", "has no label 'x'; it has LABEL_0, LABEL_1"):
        EncoderScorer(folder, label="x")


def test_a_multi_label_decoder_scores_with_parts(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "five", num_labels=5)
    scorer = LearnedScorer(folder, label="LABEL_2")
    judged = ask_scorer(scorer, ["w20 w21"], ["w30"], {}, "x")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([[20, 21, 30, 3]])).logits[0].tolist()
    assert [judged.parts[f"LABEL_{n}"].item() for n in range(5)] == pytest.approx(expected, abs=1e-5)
    assert judged.scores.item() == pytest.approx(expected[2], abs=1e-5)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    for build in (load_scorer, LearnedScorer):
        with refused("untrained-head", "has no trained reward head", "random scores"):
            build(policy)
    adapter = add_lora(load_hf_model(policy, _causal(), LoadSettings()), LoraSettings(r=2), "CAUSAL_LM")
    adapter.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    with refused("untrained-head", "has no trained reward head"):
        load_scorer(str(tmp_path / "adapter"))


def test_an_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "bert", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(folder, state_dict=weights)
    with refused("untrained-head", "classifier"):
        load_scorer(folder)(["w1"], ["w2"])


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, num_labels=1)
    T5ForSequenceClassification(config).save_pretrained(tmp_path)
    with refused("encoder-decoder", "t5"):
        load_scorer(str(tmp_path))


def test_an_encoder_as_learned_scorer_is_refused_with_encoder_scorer(tmp_path: Path) -> None:
    with refused("encoder-as-decoder", "EncoderScorer"):
        LearnedScorer(save_encoder(tmp_path / "bert", "bert"))


def test_a_reward_models_own_template_and_tokenizer_are_used(tmp_path: Path) -> None:
    """Its vocabulary and its template differ from the policy's."""
    folder = Path(save_reward_model(tmp_path / "reward"))
    own = tiny_tokenizer()
    words = [*SPECIAL, *(f"w{index}" for index in reversed(range(FIRST_WORD, VOCABULARY)))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", bos_token="<|bos|>", eos_token="<|eos|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE.replace("message['content']", "message['content'] + ' w9'"),
    )  # fmt: skip
    other.save_pretrained(folder)
    scorer = LearnedScorer(str(folder))
    assert not scorer.shares_tokenizer(own)
    messages = [{"role": "user", "content": "w20"}]
    whole = [*messages, {"role": "assistant", "content": "w30"}]
    ids = other.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert ids != own.apply_chat_template(whole, tokenize=True, return_dict=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    assert checked_scores(scorer([messages], ["w30"]), 1, "x").item() == pytest.approx(expected, abs=1e-5)


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM
