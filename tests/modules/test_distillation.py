"""Test distillation: divergences by an independent formula, a memory bound, the source of completions,
frozen weights.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from faulty_environment import Talks
from many_ends import ManyEnds
from tiny_models import (
    EOS,
    MetricsLog,
    assert_same,
    demonstration_step,
    evaluate,
    fit,
    gradients_of_step,
    plain_logprobs,
    prompt_step,
    random_rows,
    save_policy,
    sequences,
    tiny_tokenizer,
    weights_of,
    within,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.frozen import check_same_vocabulary
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import GKDModule, OnPolicyDistillationModule, SelfDistillationModule
from rlhf_lightning.modules.distillation import address_of
from rlhf_lightning.modules.self_distillation import solutions_of, with_context
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import (
    DemonstrationBatch,
    DistillationLogits,
    Episode,
    Judgement,
    Loss,
    MultiTurn,
    Reply,
    Rollout,
    Sequences,
    Step,
)

ROWS = random_rows(5, seed=31)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a wider teacher with other weights and a vocabulary padded to a rounder size."""
    return save_policy(
        tmp_path_factory.mktemp("teacher") / "model", seed=9, hidden_size=48, vocab_size=128, intermediate_size=64
    )


def gkd(folder: str, teacher: str, kind: type[GKDModule] = GKDModule, **settings: Any) -> GKDModule:
    defaults: dict[str, Any] = {"on_policy_fraction": 0.0, "max_new_tokens": 6, "lr_schedule": "constant", "warmup": 0}
    return kind(init_from=folder, teacher=teacher, **defaults | settings)


def distributions(folder: str, rows: Any = ROWS) -> list[Tensor]:
    """Return log-probabilities over the common vocabulary at each completion token, one unpadded row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, completion in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1, :120]
        found.append(logits.double().log_softmax(-1))
    return found


def divergences(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return forward KL, reverse KL and Jensen-Shannon divergence of each token, from probabilities."""
    q, p = student.exp(), teacher.exp()
    m = 0.5 * (p + q)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return forward, reverse, 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)


# -- generalized knowledge distillation -------------------------------------------------------------------------------


class Hinted(GKDModule):
    """The teacher reads additional text before each prompt, of a different length in each row."""

    def teacher_sequences(self, sequences: Sequences) -> Sequences:
        prompts = (torch.cat([torch.arange(20, 21 + len(one)), one]) for one in sequences.prompts)
        return sequences._replace(prompts=tuple(prompts))


class Shuffling(GKDModule):
    def teacher_sequences(self, sequences: Sequences) -> Sequences:
        return sequences._replace(completions=sequences.completions[::-1])


@pytest.mark.parametrize("packs", [False, True])
def test_a_teacher_may_read_other_prompts(policy_folder: str, teacher_folder: str, packs: bool) -> None:
    hinted = [([*range(20, 21 + len(prompt)), *prompt], completion) for prompt, completion in ROWS]
    rows = zip(distributions(policy_folder), distributions(teacher_folder, hinted), strict=True)
    expected = torch.cat([divergences(*row)[1] for row in rows]).mean()
    module = gkd(policy_folder, teacher_folder, Hinted, beta=1.0, pack_rows=packs)
    assert evaluate(module, [demonstration_step(ROWS)])["val/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_that_reads_other_completions_is_refused(policy_folder: str, teacher_folder: str) -> None:
    with refused("teacher-completions", "only prompts"):
        evaluate(gkd(policy_folder, teacher_folder, Shuffling), [demonstration_step(ROWS)])


@pytest.mark.parametrize(("micro", "chunk_tokens"), [(None, 1024), (2, 3)])
def test_loss_and_metrics_are_means_over_all_tokens(
    policy_folder: str, teacher_folder: str, micro: int | None, chunk_tokens: int
) -> None:
    rows = zip(distributions(policy_folder), distributions(teacher_folder), strict=True)
    forward, reverse, jsd = (torch.cat(part) for part in zip(*(divergences(*row) for row in rows), strict=True))
    module = gkd(policy_folder, teacher_folder, chunk_tokens=chunk_tokens)
    logged = MetricsLog()
    fit(module, [demonstration_step(ROWS, micro)], callbacks=[logged])
    found = logged.rows[0]
    assert found["train/loss"] == pytest.approx(float(jsd.mean()), rel=1e-4)
    assert found["distill/kl_forward"] == pytest.approx(float(forward.mean()), rel=1e-4)
    assert found["distill/kl_reverse"] == pytest.approx(float(reverse.mean()), rel=1e-4)
    held_out = evaluate(gkd(policy_folder, teacher_folder, beta=0.0), [demonstration_step(ROWS, micro)])
    assert held_out["val/loss"] == pytest.approx(float(forward.mean()), rel=1e-4)
    assert held_out["val/distill/kl_reverse"] == pytest.approx(float(reverse.mean()), rel=1e-4)
    agreed = [
        (s.argmax(-1) == t.argmax(-1)).float()
        for s, t in zip(distributions(policy_folder), distributions(teacher_folder), strict=True)
    ]
    assert held_out["val/distill/top1_agreement"] == pytest.approx(float(torch.cat(agreed).mean()))


def test_row_weights_scale_losses_but_not_the_token_count(policy_folder: str, teacher_folder: str) -> None:
    weights = [2.0, 0.0, 1.0, 0.5, 3.0]
    rows = zip(distributions(policy_folder), distributions(teacher_folder), strict=True)
    sums = [float(divergences(*row)[1].sum()) for row in rows]
    expected = sum(w * s for w, s in zip(weights, sums, strict=True)) / sum(len(c) for _, c in ROWS)
    logged = MetricsLog()
    fit(gkd(policy_folder, teacher_folder, beta=1.0), [demonstration_step(ROWS, 2, weights)], callbacks=[logged])
    loss = logged.rows[0]["train/loss"]
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_the_gradient_equals_that_of_the_plain_mean(
    policy_folder: str, teacher_folder: str, lora: LoraSettings | None
) -> None:
    def gradients(micro: int | None, chunk_tokens: int) -> dict[str, Tensor]:
        module = gkd(policy_folder, teacher_folder, chunk_tokens=chunk_tokens, lora=lora, max_grad_norm=None)
        return gradients_of_step(module, demonstration_step(ROWS, micro))

    whole = gradients(None, 1024)
    assert_same(gradients(2, 3), whole, rtol=1e-3, atol=1e-6)
    if lora is not None:
        return
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    total: Tensor = torch.zeros(())
    for (prompt, completion), teacher in zip(ROWS, distributions(teacher_folder), strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        total = total + divergences(logits.log_softmax(-1), teacher.float())[2].sum()
    (total / sum(len(completion) for _, completion in ROWS)).backward()
    expected = {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(whole, expected, rtol=1e-3, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the maximum rows of any tensor of vocabulary width, except the head's own weight."""

    def __init__(self, *heads: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.rows = heads, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            wide = isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] in (120, 128)
            if wide and tuple(tensor.shape) not in self.heads:
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return made


def test_at_most_one_chunk_of_logits_is_materialised(policy_folder: str, teacher_folder: str) -> None:
    module = gkd(policy_folder, teacher_folder, chunk_tokens=4)
    module.configure_model()
    (batch,) = demonstration_step(random_rows(12, seed=3)).micro_batches
    assert sum(len(ids) for ids in batch.sequences.completions) > 40
    with Largest((32, 120), (48, 128)) as seen:
        module.loss_sum(batch, Meter()).backward()
    assert seen.rows == 4


def test_the_student_converges_to_the_teacher(policy_folder: str, other_folder: str) -> None:
    module = gkd(policy_folder, other_folder, learning_rate=3e-3)
    steps = [demonstration_step(ROWS)]
    before = evaluate(module, steps)
    fit(module, steps * 40)
    after = evaluate(module, steps)
    assert after["val/distill/kl_forward"] < 0.2 * before["val/distill/kl_forward"]
    assert after["val/distill/top1_agreement"] > before["val/distill/top1_agreement"]


def test_a_student_equal_to_its_teacher_has_gradient_zero(policy_folder: str) -> None:
    gradients = gradients_of_step(gkd(policy_folder, policy_folder), demonstration_step(ROWS))
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


class Crossed(GKDModule):
    """Cross-entropy with the teacher's most likely token, and a metric."""

    def distillation_loss(self, logits: DistillationLogits) -> Loss:
        best = logits.teacher_logits.argmax(-1, keepdim=True)
        values = -logits.student_logits.log_softmax(-1).gather(-1, best).squeeze(-1)
        return Loss(values, {"seen": (logits.targets == EOS).float()})


def test_a_custom_distillation_objective_trains(policy_folder: str, teacher_folder: str) -> None:
    rows = zip(distributions(policy_folder), distributions(teacher_folder), strict=True)
    expected = torch.cat([-s.gather(-1, t.argmax(-1, keepdim=True)) for s, t in rows]).mean()
    logged = MetricsLog()
    fit(gkd(policy_folder, teacher_folder, Crossed), [demonstration_step(ROWS, 2)], callbacks=[logged])
    assert logged.rows[0]["train/loss"] == pytest.approx(float(expected), rel=1e-4)
    assert logged.rows[0]["train/seen"] == pytest.approx(len(ROWS) / sum(len(c) for _, c in ROWS))


# -- whose completions ------------------------------------------------------------------------------------------------


def test_samples_come_from_the_student_and_do_not_depend_on_the_batch(policy_folder: str, teacher_folder: str) -> None:
    module = gkd(policy_folder, teacher_folder, on_policy_fraction=1.0)
    module.configure_model()
    fit(module, [demonstration_step(ROWS[:1])])  # a trainer to ask
    module.updates = 7

    def drawn(order: list[int], micro: int | None) -> dict[int, list[int]]:
        step = module.with_samples(demonstration_step([ROWS[i] for i in order], micro))
        ids = [ids.tolist() for batch in step.micro_batches for ids in batch.sequences.completions]
        assert step.tokens == sum(map(len, ids)) and step.rows == len(order)
        return dict(zip(order, ids, strict=True))

    whole = drawn([0, 1, 2, 3, 4], None)
    assert drawn([4, 2, 0, 1, 3], 2) == whole
    assert any(whole[i] != ROWS[i][1] for i in whole)
    module.updates = 8
    assert drawn([0, 1, 2, 3, 4], None) != whole


def test_the_sampling_address_depends_on_update_prompt_and_completion() -> None:
    prompt, completion = torch.tensor([5, 6]), torch.tensor([7])
    here = address_of(3, prompt, completion)
    others = [(4, prompt, completion), (3, prompt, torch.tensor([8])), (3, torch.tensor([5]), torch.tensor([6, 7]))]
    assert 0 <= here < 2**63 and address_of(3, prompt, completion) == here
    assert len({here, *(address_of(*other) for other in others)}) == 4


def test_on_policy_updates_are_chosen_by_seed_and_update(policy_folder: str, teacher_folder: str) -> None:
    def coins(**settings: Any) -> list[bool]:
        module = gkd(policy_folder, teacher_folder, **settings)
        return [module.learns_from_samples(update) for update in range(200)]

    half = coins(on_policy_fraction=0.5)
    assert coins(on_policy_fraction=0.5) == half != coins(on_policy_fraction=0.5, seed=1)
    assert 70 < sum(half) < 130
    assert all(often for often, rare in zip(half, coins(on_policy_fraction=0.2), strict=True) if rare)
    assert not any(coins(on_policy_fraction=0.0)) and all(coins(on_policy_fraction=1.0))


def test_a_step_on_samples_counts_the_sampled_tokens(policy_folder: str, teacher_folder: str) -> None:
    module = gkd(policy_folder, teacher_folder, on_policy_fraction=1.0, learning_rate=1e-20)
    module.configure_model()
    seen: list[int] = []
    original = module.with_samples
    module.with_samples = lambda step: (found := original(step), seen.append(found.tokens))[0]  # type: ignore[method-assign]
    fit(module, [demonstration_step(ROWS, 2)] * 2)
    assert module.tokens == sum(seen) and module.episodes == 2 * len(ROWS)


def test_a_rank_without_rows_samples_nothing(policy_folder: str, teacher_folder: str) -> None:
    module = gkd(policy_folder, teacher_folder, on_policy_fraction=1.0)
    fit(module, [demonstration_step(ROWS[:1])])
    none = DemonstrationBatch(sequences([]), torch.zeros(0))
    assert module.with_samples(Step((none,), 4, 9)) == Step((none,), 4, 0)


# -- what stays frozen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GKDModule, OnPolicyDistillationModule])
def test_the_teacher_is_frozen_and_not_in_checkpoints(
    kind: Any, policy_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    module = kind(init_from=policy_folder, teacher=teacher_folder, max_new_tokens=4, learning_rate=1e-2)
    module.configure_model()
    (teacher,) = module.frozen_models()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    step = demonstration_step(ROWS) if kind is GKDModule else prompt_step([prompt for prompt, _ in ROWS])
    fit(module, [step] * 2)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert_same(dict(teacher.named_parameters()), before, rtol=0, atol=0)
    assert (
        set(module.state_dict())
        == set(weights_of(module))
        == {f"policy.{n}" for n, _ in module.policy.named_parameters()}
    )
    student = load_policy(str(module.export(tmp_path / "student")))
    layout = padded_layout(demonstration_step(ROWS).micro_batches[0].sequences)
    torch.testing.assert_close(student(layout).logprobs, module.policy(layout).logprobs)


def test_a_teacher_with_another_tokenizer_is_refused(policy_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_policy(other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w17"', '"z17"'))
    module = gkd(policy_folder, str(other))
    with refused("other-tokenizer", "id 17 is 'z17' to the teacher and 'w17' to the student", "1 of 120 ids"):
        module.configure_model()
    longer = tiny_tokenizer()
    longer.add_tokens(["w120"])
    check_same_vocabulary(tiny_tokenizer(), longer, "longer")  # tokens after the end are removed


@pytest.mark.parametrize("name", ["beta", "on_policy_fraction"])
def test_fractions_outside_the_unit_interval_are_refused(name: str) -> None:
    with refused("setting-out-of-range", name, "1.5", "[0, 1]"):
        gkd("unread", "unread", **{name: 1.5})


# -- on-policy distillation -------------------------------------------------------------------------------------------


def sampled_distillation(folder: str, teacher: str, **settings: Any) -> OnPolicyDistillationModule:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}
    return OnPolicyDistillationModule(init_from=folder, teacher=teacher, **defaults | settings)


PROMPTS = [prompt for prompt, _ in random_rows(6, seed=41)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_advantages_are_teacher_minus_student_logprobs(
    policy_folder: str, teacher_folder: str, temperature: float
) -> None:
    module = sampled_distillation(policy_folder, teacher_folder, temperature=temperature)
    fit(module, [prompt_step(PROMPTS)])
    module.updates = 0
    module.configure_model()
    rollout = module.collect(*prompt_step(PROMPTS).micro_batches)
    found = module.advantages(rollout, module.shape_rewards(rollout)).advantages
    student, teacher = module.policy.model, AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    with torch.no_grad():
        for row, (prompt, ids) in enumerate(zip(PROMPTS, rollout.sequences.completions, strict=True)):
            expected = plain_logprobs(teacher, prompt, ids, temperature) - plain_logprobs(
                student, prompt, ids, temperature
            )
            torch.testing.assert_close(found[row, : len(ids)], expected, rtol=1e-4, atol=1e-4)
            assert not found[row, len(ids) :].any()


def test_scores_are_logged_only_with_a_scorer(policy_folder: str, teacher_folder: str) -> None:
    logged = MetricsLog()
    fit(sampled_distillation(policy_folder, teacher_folder), [prompt_step(PROMPTS)], callbacks=[logged])
    assert not [name for name in logged.rows[0] if "score" in name and "invariant" not in name]
    assert logged.rows[0]["rollout/kl"] != 0 and not math.isnan(logged.rows[0]["distill/kl_reverse"])
    logged = MetricsLog()
    ones = sampled_distillation(policy_folder, teacher_folder, scorer=lambda prompts, texts, **_: [2.5] * len(texts))
    fit(ones, [prompt_step(PROMPTS)], callbacks=[logged])
    assert logged.rows[0]["rollout/score"] == 2.5
    held_out = evaluate(sampled_distillation(policy_folder, teacher_folder), [prompt_step(PROMPTS)])
    assert {"val/kl", "val/distill/kl_reverse"} <= set(held_out) and "val/score" not in held_out


def test_training_on_samples_reduces_the_reverse_kl(policy_folder: str, other_folder: str) -> None:
    module = sampled_distillation(policy_folder, other_folder, learning_rate=2e-3)
    logged = MetricsLog()
    fit(module, [prompt_step(PROMPTS * 8, first_episode=48 * i) for i in range(40)], callbacks=[logged])
    kl = logged.column("distill/kl_reverse")
    assert sum(kl[-5:]) < 0.65 * sum(kl[:5])


# -- self-distillation ------------------------------------------------------------------------------------------------

TEXTS = [" ".join(f"w{index}" for index in prompt) for prompt in PROMPTS]


def words(prompts: Any, completions: list[str], **columns: Any) -> list[Judgement]:
    """Feedback on texts that begin with an even word; others are fine."""
    first = [int((text.split() or ["w10"])[0][1:]) for text in completions]
    return [Judgement(n % 2, feedback=None if n % 2 else f"w{n} w11") for n in first]


def taught(folder: str, **settings: Any) -> SelfDistillationModule:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant", "scorer": words}
    return SelfDistillationModule(init_from=folder, **defaults | settings)


def text_step(first_episode: int = 0, **columns: Any) -> Step[Any]:
    return prompt_step(PROMPTS, first_episode, TEXTS, **columns)


class Learned(SelfDistillationModule):
    """Records the rollout and its gradients."""

    def learn(self, rollout: Rollout, *rest: Any) -> float:
        self.__dict__["kept"] = rollout
        return super().learn(rollout, *rest)


def reads(context: str, prompt: list[int], feedback: str | None) -> list[int]:
    told = [int(word[1:]) for word in context.format(feedback=feedback).split()]
    return [*prompt, *told]


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize(("beta", "top_k", "temperature"), [(1.0, None, 1.0), (0.0, None, 0.7), (1.0, 5, 1.0)])
def test_the_gradient_equals_that_of_the_divergence_from_a_teacher_with_feedback(
    policy_folder: str, beta: float, top_k: int | None, temperature: float, micro: int | None
) -> None:
    context = "w40 {feedback} w41"
    settings = {"beta": beta, "top_k": top_k, "temperature": temperature, "max_grad_norm": None, "chunk_tokens": 4}
    module = Learned(init_from=policy_folder, context=context, scorer=words, max_new_tokens=6, **settings)
    (step,) = within([text_step()], micro)
    found = gradients_of_step(module, step)
    rollout = module.kept
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    total, tokens = torch.zeros(()), 0
    for row, (prompt, ids) in enumerate(zip(PROMPTS, rollout.sequences.completions, strict=True)):
        if rollout.feedback[row] is None:
            continue
        ids = ids.tolist()

        def logprobs(prompt: list[int], ids: list[int] = ids) -> Tensor:
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            return (logits / temperature).log_softmax(-1)

        student, teacher = logprobs(prompt), logprobs(reads(context, prompt, rollout.feedback[row])).detach()
        q, p = student.exp(), teacher.exp()
        if top_k is not None:
            top = student.topk(top_k).indices
            q, p = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (q, p))
        each = (q * (q / p).log()).sum(-1) if beta else (p * (p / q).log()).sum(-1)
        total, tokens = total + each.sum(), tokens + len(ids)
    assert 0 < tokens < int(rollout.completion_mask.sum()), "some completions have feedback"
    (total / tokens).backward()
    expected = {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    assert_same(found, expected, rtol=2e-3, atol=2e-6)


def test_without_context_the_gradient_is_zero(policy_folder: str) -> None:
    gradients = gradients_of_step(taught(policy_folder, context="", scorer=None), text_step())
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


@pytest.mark.parametrize("teacher", ["policy", "ema", "start", "other"])
def test_context_distillation_converges_to_the_policy_with_context(
    policy_folder: str, other_folder: str, teacher: str
) -> None:
    module = taught(
        policy_folder, context="w40 w41 w42", place="system", scorer=None, learning_rate=3e-3,
        teacher=other_folder if teacher == "other" else teacher, ema_decay=0.5,
    )  # fmt: skip
    log = MetricsLog()
    fit(module, [text_step(6 * number) for number in range(30)], callbacks=[log])
    kl = log.column("distill/kl_reverse")
    assert sum(kl[-5:]) / 5 < 0.8 * sum(kl[:5]) / 5, kl
    assert log.rows[0]["distill/taught"] == 1.0 and "rollout/score" not in log.rows[0]
    held_out = evaluate(module, [text_step()])
    assert held_out["val/distill/kl_reverse"] < kl[0] and "val/score" not in held_out


def test_the_ema_teacher_follows_the_policy_and_is_resumed(policy_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": "ema", "ema_decay": 0.75, "context": "w40 {feedback}"}
    module, start = taught(policy_folder, **settings), load_policy(policy_folder)
    fit(module, [text_step()])
    name, moved = next(iter(module.policy.named_parameters()))
    before, teacher = start.get_parameter(name), module.teacher.models[0].get_parameter(name)
    torch.testing.assert_close(teacher, 0.75 * before + 0.25 * moved.detach(), atol=1e-7, rtol=1e-6)
    assert float((moved - before).abs().max()) > 1e-4
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    again = taught(policy_folder, **settings)
    again.configure_model()
    again.reference.restore(checkpoint["reference"])  # type: ignore[union-attr]
    torch.testing.assert_close(again.teacher.models[0].get_parameter(name), teacher, rtol=0, atol=0)


def test_a_rollout_without_context_changes_nothing_and_warns(policy_folder: str) -> None:
    module = taught(policy_folder, scorer=lambda prompts, completions, **_: [1.0] * len(completions))
    module.configure_model()
    before, log = weights_of(module), MetricsLog()
    with pytest.warns(UserWarning, match="no text for any completion"):
        fit(module, [text_step()], callbacks=[log])
    assert_same(weights_of(module), before, rtol=0, atol=0)
    assert log.rows[0]["distill/taught"] == 0.0


def test_context_texts_apply_only_if_their_fields_are_known(policy_folder: str) -> None:
    context = ["Right: {solution}", "Wrong: {completion}. {feedback}", "Hint {{here}}: {hint}.", "Again."]
    module = taught(policy_folder, context=context, success=0.5)
    rollout = Rollout(
        sequences([]), torch.zeros(4, 1), torch.zeros(4, 1), None, None, torch.tensor([1.0, 0.5, 0.0, torch.nan]),
        torch.ones(4), torch.tensor([0, 0, 0, 1]), feedback=(None, None, "Bad", None), texts=("a", "b", "c", "d"),
        columns={"hint": ["", None, 7, ""]},
    )  # fmt: skip
    assert solutions_of(rollout, 0.5) == ["b", "a", "a", None]
    assert module.contexts(rollout) == [
        "Right: b\n\nAgain.",
        "Right: a\n\nAgain.",
        "Right: a\n\nWrong: c. Bad\n\nHint {here}: 7.\n\nAgain.",
        None,
    ]
    with refused("missing-data-column", "{hint}"):
        module.contexts(rollout._replace(columns={}))
    for wrong in ("{", "{0}", "{a.b}"):
        with refused("wrong-context", "context is"):
            taught(policy_folder, context=wrong)


def test_context_is_placed_after_the_question_or_in_the_system_turn() -> None:
    assert with_context("Q", "c", "after") == "Q\n\nc" and with_context("Q", "c", "system") == "c\n\nQ"
    user, said = {"role": "user", "content": "Q", "tools": ["t"]}, {"role": "assistant", "content": "A"}
    assert with_context([user, said], "c", "after") == [{**user, "content": "Q\n\nc"}, said]
    plain = {"role": "user", "content": "Q"}
    assert with_context([user], "c", "system") == [{"role": "system", "content": "c", "tools": ["t"]}, plain]
    system = {"role": "system", "content": "S"}
    assert with_context([system, plain], "c", "system") == [{"role": "system", "content": "S\n\nc"}, plain]
    assert user["content"] == "Q"


def test_environment_feedback_is_seen_only_by_the_teacher(policy_folder: str) -> None:
    class Corrects(Talks):
        def reply(self, episode: Episode) -> Reply:
            return super().reply(episode)._replace(feedback=f"w{20 + episode.turn}")

    (batch,) = text_step().micro_batches
    step = Step((batch._replace(multi_turn=MultiTurn(Corrects(), max_turns=3)),), len(PROMPTS), 0)
    module = Learned(
        init_from=policy_folder, context="{feedback}", max_new_tokens=5, engine=ManyEnds(), learning_rate=1e-3
    )
    log = MetricsLog()
    fit(module, [step], callbacks=[log])
    rollout = module.kept
    read, rows = module.read_by_teacher(rollout)
    assert rows == list(range(len(PROMPTS))) and log.rows[0]["train/loss"] > 0 and "rollout/score" in log.rows[0]
    for row, prompt in enumerate(PROMPTS):
        assert rollout.turns is not None
        said = [20 + turn for turn in range(int(rollout.turns[row]))]
        assert read.prompts[row].tolist() == [*prompt, *said]
    assert not bool(torch.cat([part for part in rollout.sequences.supervised]).all()), "replies are not learned"
