import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.distillation import (
    common_vocabulary,
    distillation_advantages,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    top1_agreement,
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
    apart = generalized_jsd(student, teacher, beta, temperature)
    assert (apart >= 0).all()
    alike = generalized_jsd(student, student + 3, beta, temperature)
    torch.testing.assert_close(alike, torch.zeros_like(alike), atol=1e-12, rtol=0)
    warmer = generalized_jsd(student / temperature, teacher / temperature, beta)
    torch.testing.assert_close(apart, warmer)


@property_test
@given(seed=seeds, beta=st.floats(0.01, 0.99))
def test_exchanging_student_and_teacher(seed, beta):
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


def test_tokens_that_neither_model_can_say_add_nothing():
    student, teacher = torch.tensor([1.0, 0.0, -torch.inf]), torch.tensor([0.0, 2.0, -torch.inf])
    for divergence in (forward_kl, reverse_kl, generalized_jsd):
        torch.testing.assert_close(divergence(student, teacher), divergence(student[:2], teacher[:2]))
        (slope,) = gradient(lambda z, d=divergence: d(z, teacher), student)
        assert slope.isfinite().all()


def test_a_padded_vocabulary_is_cut_to_the_common_size():
    student, teacher = common_vocabulary(torch.zeros(2, 5), torch.ones(2, 4))
    assert student.shape == teacher.shape == (2, 4)
    with pytest.raises(ValueError, match=r"student_logits \(2, 5\), teacher_logits \(2, 4\)"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 4))


def test_agreement_compares_the_likeliest_ids():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    assert top1_agreement(student, teacher).tolist() == [1.0, 0.0]


def test_beta_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="beta must be in .0, 1., found 1.5"):
        generalized_jsd(torch.zeros(3), torch.zeros(3), 1.5)
