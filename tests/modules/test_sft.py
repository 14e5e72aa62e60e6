import math
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    EOS,
    MetricsLog,
    StepData,
    demonstration_step,
    evaluate,
    fit,
    plain_logprobs,
    preference_step,
    prompt_step,
    quiet_trainer,
    random_pairs,
    random_rows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.types import Loss, TokenLogprobs

ROWS = random_rows(6, seed=11)


@pytest.fixture(scope="module")
def plain(policy_folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def nll(plain: Any) -> list[Tensor]:
    """Negative log-probability of each completion token, by hand."""
    with torch.no_grad():
        return [-plain_logprobs(plain, *row) for row in ROWS]


def first_loss(folder: str, *args: Any, kind: type[SFTModule] = SFTModule, **options: Any) -> dict[str, float]:
    logged = MetricsLog()
    fit(kind(init_from=folder), [demonstration_step(*args, **options)], callbacks=[logged])
    return logged.rows[0]


@pytest.mark.parametrize("micro", [None, 4])
def test_the_first_loss_is_the_token_mean_of_the_step(policy_folder: str, nll: list[Tensor], micro: int | None) -> None:
    expected = float(torch.cat(nll).mean())
    assert first_loss(policy_folder, ROWS, micro)["train/loss"] == pytest.approx(expected, rel=1e-5)
    rows_apart = sum(float(row.mean()) for row in nll) / len(nll)
    assert rows_apart != pytest.approx(expected, rel=1e-3)


def test_row_weights_scale_token_losses_but_not_the_token_count(policy_folder: str, nll: list[Tensor]) -> None:
    weights = [2.0, 0.0, 1.0, 0.5, 1.0, 3.0]
    weighted = sum(w * float(row.sum()) for w, row in zip(weights, nll, strict=True))
    expected = weighted / sum(len(row) for row in nll)
    metrics = first_loss(policy_folder, ROWS, 2, weights)
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["train/negative_logprob"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def test_only_supervised_tokens_enter_the_loss(policy_folder: str, nll: list[Tensor]) -> None:
    flags = [[index % 2 == 0 for index in range(len(row))] for row in nll]
    kept = torch.cat([row[torch.tensor(flag)] for row, flag in zip(nll, flags, strict=True)])
    metrics = first_loss(policy_folder, ROWS, 3, supervised=flags)
    assert metrics["train/loss"] == pytest.approx(float(kept.mean()), rel=1e-5)
    assert metrics["progress/tokens"] == len(kept)


class CountedModule(SFTModule):
    """Loss 1 and 3 in the first micro-batch, six of 0.5 in the second."""

    def token_loss(self, logprobs: TokenLogprobs) -> Loss:
        short = logprobs.completion_mask.shape[1] == 2
        losses = torch.tensor([[1.0, 3.0]]) if short else torch.full((1, 6), 0.5)
        return Loss(losses + 0 * logprobs.logprobs, {"doubled": 2 * losses, "length": logprobs.lengths.float()})


def test_micro_batches_are_weighted_by_token_count(policy_folder: str) -> None:
    rows = [([10, 11], [12, EOS]), ([10, 11], [12, 13, 14, 15, 16, EOS])]
    metrics = first_loss(policy_folder, rows, 1, kind=CountedModule)
    assert metrics["train/loss"] == pytest.approx(7 / 8)  # the mean of the two means would be 1.25
    assert metrics["train/doubled"] == pytest.approx(14 / 8)
    assert metrics["train/length"] == pytest.approx(4.0)  # one value a row: rows are averaged


def test_validation_metrics_are_token_means(policy_folder: str, plain: Any, nll: list[Tensor]) -> None:
    steps = [demonstration_step(ROWS[:2]), demonstration_step(ROWS[2:], 3)]
    metrics = evaluate(SFTModule(init_from=policy_folder), steps)
    every = torch.cat(nll)
    matches, entropies = [], []
    for prompt, completion in ROWS:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        matches.append((logits.argmax(-1) == torch.tensor(completion)).float())
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert metrics["val/loss"] == pytest.approx(float(every.mean()), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(float(every.mean())), rel=1e-4)
    assert metrics["val/token_accuracy"] == pytest.approx(float(torch.cat(matches).mean()), abs=1e-6)
    assert metrics["val/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)


def test_validation_and_test_agree_and_change_no_state(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder)
    steps = [demonstration_step(ROWS)]
    trainer = quiet_trainer()
    validated = trainer.validate(module, StepData(steps, steps), verbose=False)[0]
    tested = trainer.test(module, StepData(steps, steps), verbose=False)[0]
    metrics = {name.removeprefix("val/"): value for name, value in validated.items() if name.startswith("val/")}
    assert metrics == {n.removeprefix("test/"): value for n, value in tested.items() if n.startswith("test/")}
    assert metrics and module.updates == 0


def test_sft_learns_to_generate_a_fixed_answer(policy_folder: str) -> None:
    rows = [([20, 21, 22], [30, 31, 32, EOS]), ([20, 23, 22], [40, 41, EOS])]
    module = SFTModule(init_from=policy_folder, learning_rate=1e-2)
    fit(module, [demonstration_step(rows)] * 25)
    greedy = SamplingSettings(max_new_tokens=6, temperature=0)
    answers = module.complete([torch.tensor(p) for p, _ in rows], torch.arange(2), greedy, seed=0)
    assert [ids.tolist() for ids in answers.ids] == [c for _, c in rows]
    assert answers.texts == ("w30 w31 w32", "w40 w41")
    assert answers.finished.all()


def test_messages_are_answered_through_the_chat_template(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder)
    module.configure_model()
    settings = SamplingSettings(max_new_tokens=5, temperature=0)
    conversation = [{"role": "user", "content": "w20 w21"}]
    answered = module.answer([conversation], settings)
    by_ids = module.complete([torch.tensor([2, 4, 20, 21, 5])], torch.arange(1), settings, 0)
    assert answered.texts == by_ids.texts and answered.ids[0].tolist() == by_ids.ids[0].tolist()
    assert answered.logprobs[0].tolist() == by_ids.logprobs[0].tolist()
    assert len(answered.logprobs[0]) == len(answered.ids[0])


def test_predict_writes_a_row_for_each_prompt(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder, seed=4)
    prompts = [[20, 21], [30]]
    rows = quiet_trainer().predict(module, StepData([], [prompt_step(prompts, texts=["first", "second"])]))
    module.configure_model()
    answers = module.complete([torch.tensor(p) for p in prompts], torch.arange(2), module.sampling, seed=4)
    assert rows == [
        [
            {"prompt": prompt, "completion": text, "logprob": sum(logprobs.tolist()), "finished": bool(finished)}
            for prompt, text, logprobs, finished in zip(
                ("first", "second"), answers.texts, answers.logprobs, answers.finished, strict=True
            )
        ]
    ]


def test_a_datamodule_of_the_wrong_kind_is_refused_before_loading_weights(policy_folder: str) -> None:
    module = SFTModule(init_from=policy_folder)
    with refused("wrong-batch-type", "SFTModule takes DemonstrationBatch", "PreferenceBatch"):
        fit(module, [preference_step(random_pairs(2))])
    assert not hasattr(module, "policy")
