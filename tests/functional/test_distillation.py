import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.distillation import (
    chunked_over_tokens,
    common_vocabulary,
    distillation_advantages,
    forward_kl,
    generalized_jsd,
    head_logits,
    reverse_kl,
    top1_agreement,
    top_k_and_rest,
)
from rlhf_lightning.functional.logprobs import token_logprobs

from .worked import Worked, check, each, gradient, normal, property_test

STUDENT, TEACHER = [1, 0, -1], [2, 0, 0]


def advantage_of_each_id(t):
    every_id = torch.arange(3).unsqueeze(0)
    teacher, student = (token_logprobs(t(logits).expand(1, 3, 3), every_id) for logits in (TEACHER, STUDENT))
    return distillation_advantages(teacher, student, torch.ones(1, 3, dtype=torch.bool))


WORKED = [
    Worked("forward kl", lambda t: forward_kl(t(STUDENT), t(TEACHER)), 0.06155422),
    Worked("reverse kl", lambda t: reverse_kl(t(STUDENT), t(TEACHER)), 0.07666727),
    Worked("jsd 0.5", lambda t: generalized_jsd(t(STUDENT), t(TEACHER), 0.5), 0.01687359),
    Worked("jsd 0.1", lambda t: generalized_jsd(t(STUDENT), t(TEACHER), 0.1), 0.00563181),
    Worked("jsd 0 is forward kl", lambda t: generalized_jsd(t(STUDENT), t(TEACHER), 0.0), 0.06155422),
    Worked("jsd 1 is reverse kl", lambda t: generalized_jsd(t(STUDENT), t(TEACHER), 1.0), 0.07666727),
    Worked("advantages", advantage_of_each_id, [[0.16806120, -0.83193880, 0.16806120]]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


seeds = st.integers(0, 2**31)


@property_test
@given(seed=seeds, beta=st.floats(0, 1), temperature=st.floats(0.3, 3))
def test_divergences_are_zero_between_equals_and_positive_otherwise(seed, beta, temperature):
    student, teacher = normal(seed, 2, 4), normal(seed + 1, 2, 4)
    separate = generalized_jsd(student, teacher, beta, temperature)
    assert (separate >= 0).all()
    alike = generalized_jsd(student, student + 3, beta, temperature)
    torch.testing.assert_close(alike, torch.zeros_like(alike), atol=1e-12, rtol=0)
    warmer = generalized_jsd(student / temperature, teacher / temperature, beta)
    torch.testing.assert_close(separate, warmer)


@property_test
@given(seed=seeds, beta=st.floats(0.01, 0.99))
def test_exchanging_student_and_teacher_reverses_the_divergence(seed, beta):
    student, teacher = normal(seed, 4), normal(seed + 1, 4)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta), generalized_jsd(teacher, student, 1 - beta))
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))


@property_test
@given(seed=seeds)
def test_forward_kl_pulls_the_student_by_the_difference_of_probabilities(seed):
    student, teacher = normal(seed, 5), normal(seed + 1, 5)
    (slope,) = gradient(lambda z: forward_kl(z, teacher), student)
    torch.testing.assert_close(slope, student.softmax(-1) - teacher.softmax(-1))
    parity = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    torch.testing.assert_close(forward_kl(student, teacher), parity)


@property_test
@given(seed=seeds)
def test_sampled_advantages_average_to_minus_the_reverse_kl(seed):
    student, teacher = normal(seed, 5), normal(seed + 1, 5)
    every_id = torch.arange(5).unsqueeze(0)
    lp = token_logprobs(student.expand(1, 5, 5), every_id)
    lp_teacher = token_logprobs(teacher.expand(1, 5, 5), every_id)
    advantages = distillation_advantages(lp_teacher, lp, torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close((lp.exp() * advantages).sum(), -reverse_kl(student, teacher))


def test_advantages_are_zero_under_the_mask_and_carry_no_gradient():
    student = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    found = distillation_advantages(torch.tensor([[-0.5, -3.0]]), student, torch.tensor([[True, False]]))
    assert found.tolist() == [[0.5, 0.0]]
    assert not found.requires_grad


def test_tokens_outside_the_students_top_k_form_one_class():
    student, teacher = top_k_and_rest(torch.tensor([1.0, 0.0, -1.0, 3.0]), torch.tensor([2.0, 0.0, 0.0, 1.0]), 2)
    p, q = (torch.tensor(logits).softmax(-1) for logits in ([1.0, 0.0, -1.0, 3.0], [2.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(student.exp(), torch.stack([p[3], p[0], p[1] + p[2]]))
    torch.testing.assert_close(teacher.exp(), torch.stack([q[3], q[0], q[1] + q[2]]))


@property_test
@given(seed=seeds, beta=st.floats(0, 1), k=st.integers(1, 7), temperature=st.floats(0.3, 3))
def test_fewer_classes_bound_the_divergence_from_below(seed, beta, k, temperature):
    student, teacher = normal(seed, 3, 6), normal(seed + 1, 3, 6)
    whole = generalized_jsd(student, teacher, beta, temperature)
    parts = generalized_jsd(*top_k_and_rest(student, teacher, k, temperature), beta)
    assert (parts <= whole + 1e-12).all() and (parts >= 0).all()
    if k >= 5:  # one id is left over, so nothing is joined
        torch.testing.assert_close(parts, whole)
    (slope,) = gradient(lambda z: generalized_jsd(*top_k_and_rest(z, teacher, k), beta), student)
    assert slope.isfinite().all() and slope.sum(-1).abs().max() < 1e-9


def test_tokens_with_probability_zero_in_both_models_add_nothing():
    student, teacher = torch.tensor([1.0, 0.0, -torch.inf]), torch.tensor([0.0, 2.0, -torch.inf])
    for divergence in (forward_kl, reverse_kl, generalized_jsd):
        torch.testing.assert_close(divergence(student, teacher), divergence(student[:2], teacher[:2]))
        (slope,) = gradient(lambda z, d=divergence: d(z, teacher), student)
        assert slope.isfinite().all()


def test_padded_vocabularies_are_sliced_to_the_common_size():
    student, teacher = common_vocabulary(torch.zeros(2, 5), torch.ones(2, 4))
    assert student.shape == teacher.shape == (2, 4)
    with refused("shape-mismatch", "student_logits (2, 5), teacher_logits (2, 4)"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 4))


def test_agreement_compares_argmax_tokens():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    assert top1_agreement(student, teacher).tolist() == [1.0, 0.0]


def test_beta_outside_the_unit_interval_is_refused():
    with refused("setting-out-of-range", "beta is 1.5: it must be in [0, 1]"):
        generalized_jsd(torch.zeros(3), torch.zeros(3), 1.5)


def test_lm_head_logits_by_hand():
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.tensor([0.0, -0.5])
    torch.testing.assert_close(head_logits(hidden, weight, bias), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(head_logits(hidden, weight, bias, scale=0.5), torch.tensor([[0.5, 1.0]]))
    capped = head_logits(hidden, weight, bias, softcap=2.0, scale=0.5)
    torch.testing.assert_close(capped, 2 * torch.tensor([[0.25, 0.5]]).tanh())
    assert head_logits(hidden.bfloat16(), weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens):
    hidden, teacher = normal(0, 7, 4), normal(1, 7, 6)
    weight = normal(2, 6, 4).requires_grad_()
    upstream = normal(3, 7)
    calls = []

    def function(h, t):
        calls.append(len(h))
        student = head_logits(h, weight)
        with torch.no_grad():
            agreement = top1_agreement(student, t)
        return {"loss": generalized_jsd(student, t), "agreement": agreement}

    def run(size):
        leaf = hidden.clone().requires_grad_()
        found = chunked_over_tokens(function, leaf, teacher, chunk_tokens=size)
        return found, torch.autograd.grad((found["loss"] * upstream).sum(), (leaf, weight))

    whole, whole_grads = run(7)
    calls.clear()
    parts, grads = run(chunk_tokens)
    assert max(calls) == min(chunk_tokens, 7) and sum(calls) == 2 * 7, "once forward, once again backward"
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(grads, whole_grads)
    plain = generalized_jsd(hidden @ weight.T, teacher)
    torch.testing.assert_close(parts["loss"], plain)
    with torch.no_grad():
        calls.clear()
        chunked_over_tokens(function, hidden, teacher, chunk_tokens=chunk_tokens)
    assert sum(calls) == 7


def test_metrics_after_the_loss_are_not_recomputed_in_backward():
    leaf, after = normal(0, 4, 3).requires_grad_(), []

    def function(h):
        loss = (h * h).sum(-1)
        with torch.no_grad():
            after.append(len(h))
        return {"loss": loss}

    chunked_over_tokens(function, leaf, chunk_tokens=2)["loss"].sum().backward()
    assert after == [2, 2]
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach())


def test_empty_input_gives_empty_output():
    found = chunked_over_tokens(lambda h: {"loss": h.sum(-1)}, torch.zeros(0, 3))
    assert found["loss"].shape == (0,)
