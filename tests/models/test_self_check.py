"""A model is compared with its own forward pass; disagreement causes a reported fallback or a refusal."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import plain_logprobs, save_policy, sequences, tiny_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from models.families import build
from rlhf_lightning.models import self_check
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model, prepare_for_training
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.self_check import check_class, check_weights
from rlhf_lightning.sampling import decoding_check
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine, sample

ROWS = [([7, 8, 9, 10], [11, 12, 13]), ([14], [15, 16])]


class Doubled(LlamaForCausalLM):
    """A user's own forward, which changes the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 2.0 * found.logits
        return found


class SeesIds(LlamaForCausalLM):
    """A model whose logits depend on token ids as well as on hidden states."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        found = super().forward(input_ids=input_ids, **kwargs)
        found.logits = found.logits + torch.nn.functional.one_hot(input_ids, found.logits.shape[-1])
        return found


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("kind", "path"), [(LlamaForCausalLM, "product"), (Doubled, "head"), (SeesIds, "forward")])
def test_logits_equal_those_of_the_models_own_forward(kind: Any, path: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    policy = CausalLM(kind(tiny_config())).eval()
    with caplog.at_level(logging.INFO):
        check_class(policy)
    assert policy.logits_path == path
    assert ("logits come from" in told(caplog)) == (path != "product")
    with torch.no_grad():
        found = policy(padded_layout(sequences(ROWS))).logprobs
        drawn = SlotEngine().sample(policy, [torch.tensor(ROWS[0][0])], torch.arange(1), SamplingSettings(5), 0, [3])
        for row, (prompt, completion) in enumerate(ROWS):
            torch.testing.assert_close(
                found[row, : len(completion)], plain_logprobs(policy.model, prompt, completion), atol=1e-4, rtol=1e-4
            )
        expected = plain_logprobs(policy.model, ROWS[0][0], drawn.ids[0])
    torch.testing.assert_close(drawn.logprobs[0], expected, atol=1e-4, rtol=1e-4)


def test_gradients_through_the_models_own_head_equal_those_of_its_forward() -> None:
    torch.manual_seed(1)
    policy = CausalLM(Doubled(tiny_config()))
    check_class(policy)
    policy(padded_layout(sequences(ROWS[:1]))).logprobs.sum().backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.zero_grad()
    plain_logprobs(policy.model, *ROWS[0]).sum().backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_self_check_results_are_cached_by_class_and_config(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    self_check._found.clear()
    load_policy(policy_folder)
    self_check._found.clear()
    monkeypatch.setattr(self_check, "examine", lambda *_: pytest.fail("examined again"))
    started = time.perf_counter()
    check_class(CausalLM(AutoModelForCausalLM.from_pretrained(policy_folder)))
    assert time.perf_counter() - started < 1
    with pytest.raises(pytest.fail.Exception):
        check_class(CausalLM(LlamaForCausalLM(tiny_config(hidden_size=48))))


def seconds_of(action: Callable[[], Any]) -> float:
    """Return processor seconds of this process on one thread, so that machine load does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        action()
    finally:
        torch.set_num_threads(threads)
    return time.process_time() - started


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "deepseek_v4"])
def test_the_self_check_takes_seconds_and_runs_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    self_check._found.clear()
    policy = CausalLM(build(name, AutoModelForCausalLM)).eval()

    def checks() -> None:
        policy.decoding = None
        check_class(policy)
        decoding_check.settle_decoding(policy, sample)

    assert seconds_of(checks) < 3
    self_check._found.clear()  # the next run finds them on disk
    assert seconds_of(checks) < 0.1


def test_real_weights_are_checked_in_under_a_second(smollm2: Any) -> None:
    policy = load_policy(smollm2.name_or_path, LoadSettings(self_check=False)).eval()
    check_weights(policy)
    assert seconds_of(lambda: check_weights(policy)) < 1


def test_weights_that_fail_the_check_fall_back_and_are_then_refused(caplog: pytest.LogCaptureFixture) -> None:
    policy = CausalLM(SeesIds(tiny_config()))
    with caplog.at_level(logging.INFO):
        check_weights(policy)
    assert not policy.reads_trees and policy.logits_path == "forward"
    assert "logits come from the model's own forward" in told(caplog)

    class Drifts(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits.roll(int(torch.randint(1, 100, (1,))), -1)
            return found

    with refused("self-check-failed", "in torch.float32, for every way of computing them"):
        check_weights(CausalLM(Drifts(tiny_config(initializer_range=1.0))))


def test_encoders_are_refused_by_name(tmp_path: Path) -> None:
    build("bert", AutoModelForCausalLM).save_pretrained(tmp_path / "bert")
    with refused("not-causal", "BertLMHeadModel is an encoder"):
        load_policy(str(tmp_path / "bert"))
    assert load_policy(str(tmp_path / "bert"), LoadSettings(self_check=False)).logits_path == "product"
    with refused("no-score-head", "BertForSequenceClassification has no head named score"):
        load_reward_hf_model(str(tmp_path / "bert"), LoadSettings(from_scratch=True))
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    with refused("encoder-decoder", "is an encoder-decoder (t5)"):
        load_policy(str(tmp_path / "t5"), LoadSettings(from_scratch=True))
    build("mamba", AutoModelForCausalLM).save_pretrained(tmp_path / "mamba")
    with refused("unsupported-class", "no SequenceClassification class for a mamba model"):
        load_reward_hf_model(str(tmp_path / "mamba"), LoadSettings())


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "xglm", "biogpt", "bloom", "falcon", "persimmon", "phimoe"])
def test_every_kind_of_dropout_is_disabled(name: str) -> None:
    model = build(name, AutoModelForCausalLM)
    for holder in (model.config, *model.modules()):
        for field, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in field or "jitter" in field):
                setattr(holder, field, 0.5)
        if isinstance(holder, nn.Dropout):
            holder.p = 0.5
    prepare_for_training(model)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        trained, evaluated = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    torch.testing.assert_close(trained, evaluated)


def test_reward_models_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_policy(tmp_path / "policy")
    from rlhf_lightning.models.roles import scalar_model

    model = scalar_model(load_reward_hf_model(folder, LoadSettings()), LoadSettings())
    assert model.reads_trees and model.pads_rows
