import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rlhf_lightning.functional import logprobs as logprobs_module
from rlhf_lightning.functional.logprobs import (
    at_least_float32,
    chunk_size,
    chunked_logprobs,
    kl_estimate,
    kl_k1,
    log1mexp,
    masked_mean,
    masked_sum,
    masked_whiten,
    require_shape,
    token_entropy,
    token_logprobs,
)
from rlhf_lightning.functional.surrogates import token_ratio

from .worked import Worked, check, each, gradient, normal, property_test, right_padded_mask

LOGITS = [[2, 1, 0], [0, 1, 0], [1, 0, -1]]
TARGETS = torch.tensor([0, 1, 2])
LAST_TWO = torch.tensor([False, True, True])
POLICY, REFERENCE = [-1, -0.5, -2], [-1.2, -0.4, -2.05]
ADVANTAGES, REWARDS = [0.64349375, 0.582625, 0.3975], [-0.01, 0.005, 0.9975]
ALL_THREE = torch.ones(3, dtype=torch.bool)


def one_hot_head(t):
    """Return hidden states and a head whose logits are LOGITS."""
    return t(LOGITS), torch.eye(3, dtype=t(0.0).dtype)


WORKED = [
    Worked("nll", lambda t: -token_logprobs(t(LOGITS), TARGETS), [0.40760596, 0.55144471, 2.40760596]),
    Worked("mean nll", lambda t: -token_logprobs(t(LOGITS), TARGETS).mean(), 1.12221888),
    Worked("masked nll", lambda t: masked_mean(-token_logprobs(t(LOGITS), TARGETS), LAST_TWO), 1.47952534),
    Worked("entropy", lambda t: token_entropy(t(LOGITS)), [0.83239558, 0.97532783, 0.83239558]),
    Worked("temperature 1", lambda t: token_logprobs(t([[2, 1, 0]]), torch.tensor([0])), [-0.40760596]),
    Worked("temperature 0.7", lambda t: token_logprobs(t([[2, 1, 0]]), torch.tensor([0]), 0.7), [-0.26011840]),
    Worked("k1", lambda t: kl_k1(t(POLICY), t(REFERENCE)), [0.2, -0.1, 0.05]),
    Worked("k2", lambda t: kl_estimate(t(POLICY), t(REFERENCE), "k2").sum(), 0.02625),
    Worked("k3 of a policy that moved", lambda t: kl_estimate(t(-0.9), t(-1.2), "k3"), 0.04081822),
    Worked("ratio times k3", lambda t: token_ratio(t(-0.9), t(-1.0)) * kl_estimate(t(-0.9), t(-1.2), "k3"), 0.04511111),
    Worked("k3", lambda t: kl_estimate(t(POLICY), t(REFERENCE), "k3"), [0.01873075, 0.00517092, 0.00122942]),
    Worked(
        "whitened advantages",
        lambda t: masked_whiten(t(ADVANTAGES), ALL_THREE),
        [0.97779841, 0.39593487, -1.37373328],
    ),
    Worked(
        "whitened advantages, unbiased variance",
        lambda t: masked_whiten(t(ADVANTAGES), ALL_THREE, var=t(ADVANTAGES).var()),
        [0.79836918, 0.32327952, -1.12164869],
    ),
    Worked(
        "whitened rewards keep their mean",
        lambda t: masked_whiten(t(REWARDS), ALL_THREE, shift_mean=False),
        [-0.39212234, -0.36030522, 1.74492755],
    ),
    Worked("chunked nll", lambda t: -chunked_logprobs(*one_hot_head(t), TARGETS, chunk_tokens=2)[0].mean(), 1.12221888),
    Worked(
        "chunked entropy",
        lambda t: chunked_logprobs(*one_hot_head(t), TARGETS, with_entropy=True, chunk_tokens=2)[1],
        [0.83239558, 0.97532783, 0.83239558],
    ),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


def test_a_wrong_shape_is_refused_with_the_shape():
    with refused("shape-mismatch", "(rows, length)", "logprobs (2, 3), mask (2, 4)"):
        require_shape("rows length", logprobs=torch.zeros(2, 3), mask=torch.zeros(2, 4), missing=None)
    with refused("shape-mismatch", "(pairs)", "margin (2, 3)"):
        require_shape("pairs", margin=torch.zeros(2, 3))
    require_shape("...", x=torch.zeros(2, 3), y=torch.zeros(2, 3))


def test_low_precision_is_upcast_to_fp32_and_fp64_kept():
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert masked_sum(torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bool)) == 1000
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.bfloat16)  # exact in bfloat16
    torch.testing.assert_close(token_logprobs(logits, torch.tensor([0])), torch.tensor([-0.40760596]))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_positive(temperature):
    with refused("setting-out-of-range", f"temperature is {temperature}: it must be positive"):
        token_logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), temperature)
    with refused("setting-out-of-range", f"temperature is {temperature}: it must be positive"):
        chunked_logprobs(torch.zeros(1, 3), torch.zeros(5, 3), torch.zeros(1, dtype=torch.long), None, temperature)


# --- masked reductions -----------------------------------------------------------------------------------------------


def test_masked_reductions_ignore_masked_nan_and_pass_it_no_gradient():
    x = torch.tensor([[1.0, 3.0, float("nan")], [float("nan"), 5.0, 6.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert masked_sum(x, mask).tolist() == [4.0, 5.0]
    assert masked_mean(x, mask, dim=-1).tolist() == [2.0, 5.0]
    mean = masked_mean(x, mask)
    assert mean.item() == 3.0
    mean.backward()
    torch.testing.assert_close(x.grad, mask / 3)


def test_empty_reductions_are_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(torch.full((2, 3), float("nan")), nothing).item() == 0
    assert masked_whiten(torch.ones(2, 3), nothing).abs().sum().item() == 0


@property_test
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 5), length=st.integers(2, 6), pads=st.integers(0, 3))
def test_whitening_does_not_depend_on_padding_or_ranks(seed, rows, length, pads):
    x, mask = 3 * normal(seed, rows, length) + 2, right_padded_mask(seed, rows, length, least=2)
    whitened = masked_whiten(x, mask)
    torch.testing.assert_close(whitened[mask].mean(), torch.zeros((), dtype=x.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close((whitened[mask] ** 2).mean(), torch.ones((), dtype=x.dtype), atol=1e-5, rtol=0)
    padded = masked_whiten(F.pad(x, (0, pads), value=1e6), F.pad(mask, (0, pads)))
    torch.testing.assert_close(padded, F.pad(whitened, (0, pads)))
    mean, var = x[mask].mean(), x[mask].var(correction=0)
    first_rank = masked_whiten(x[:1], mask[:1], mean=mean, var=var)
    torch.testing.assert_close(first_rank, whitened[:1])


# --- log-probabilities and entropy -----------------------------------------------------------------------------------


@property_test
@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3), temperature=st.floats(0.1, 5))
def test_probabilities_sum_to_one_and_ignore_a_constant(seed, shift, temperature):
    logits = 4 * normal(seed, 5)
    every_id = torch.arange(5)
    logprobs = token_logprobs(logits.expand(5, 5), every_id, temperature)
    torch.testing.assert_close(logprobs.exp().sum(), torch.ones((), dtype=logits.dtype))
    torch.testing.assert_close(token_logprobs((logits + shift).expand(5, 5), every_id, temperature), logprobs)
    torch.testing.assert_close(token_entropy(logits, temperature), -(logprobs.exp() * logprobs).sum())


def test_huge_logits_give_exact_logprobs():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert token_logprobs(logits, torch.tensor([0])).item() == 0.0
    assert token_logprobs(logits, torch.tensor([2])).item() == -2e4
    assert token_entropy(logits).item() == 0.0


def test_tokens_with_logit_minus_infinity_do_not_change_entropy_or_its_gradient():
    possible = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    blocked = torch.cat([possible, torch.tensor([-math.inf], dtype=torch.float64)])
    torch.testing.assert_close(token_entropy(blocked), token_entropy(possible))
    (with_blocked,), (without,) = gradient(token_entropy, blocked), gradient(token_entropy, possible)
    torch.testing.assert_close(with_blocked, F.pad(without, (0, 1)))
    assert token_logprobs(blocked, torch.tensor(3)).item() == -math.inf


def test_uniform_entropy_is_log_vocabulary():
    torch.testing.assert_close(token_entropy(torch.zeros(7, dtype=torch.float64)).item(), math.log(7))


def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-10, -0.5, -1.0, -50.0, -800.0], dtype=torch.float64)
    expected = torch.tensor(
        [math.log(1e-10), math.log(1 - math.exp(-0.5)), math.log(1 - math.exp(-1)), -math.exp(-50), 0]
    )
    torch.testing.assert_close(log1mexp(x), expected.double(), rtol=1e-6, atol=0)
    (slope,) = gradient(log1mexp, torch.tensor([0.0, -0.1, -1.0, -1e4]))
    torch.testing.assert_close(slope, torch.tensor([0.0, -9.5083, -0.58198, 0.0]), rtol=1e-4, atol=1e-6)
    assert log1mexp(torch.zeros(1)).isfinite().all()


# --- KL estimators ---------------------------------------------------------------------------------------------------


k2, k3 = partial(kl_estimate, estimator="k2"), partial(kl_estimate, estimator="k3")


def exact_kl(p, q):
    return (p.exp() * (p - q)).sum()


@property_test
@given(seed=st.integers(0, 2**31))
def test_k1_and_k3_average_to_the_kl_and_k3_is_never_negative(seed):
    p, q = normal(seed, 6).log_softmax(-1), normal(seed + 1, 6).log_softmax(-1)
    for estimator in (kl_k1, k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact_kl(p, q))
    assert (k3(p, q) >= 0).all()
    assert (k2(p, q) >= 0).all()


@property_test
@given(seed=st.integers(0, 2**31))
def test_kl_estimator_gradients_by_hand(seed):
    logits, q = normal(seed, 6), normal(seed + 1, 6).log_softmax(-1)
    samples = logits.softmax(-1)  # expected frequency of each id, without gradient

    def slope(estimator):
        return gradient(lambda z: samples * estimator(z.log_softmax(-1), q), logits)[0]

    reverse = gradient(lambda z: exact_kl(z.log_softmax(-1), q), logits)[0]
    forward = gradient(lambda z: exact_kl(q, z.log_softmax(-1)), logits)[0]
    torch.testing.assert_close(slope(kl_k1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope(k2), reverse)
    torch.testing.assert_close(slope(k3), forward)


def test_equal_policies_have_kl_zero():
    logprobs = torch.tensor([-1.0, -30.0])
    for estimator in (kl_k1, k2, k3):
        assert estimator(logprobs, logprobs).tolist() == [0, 0]


def test_log_ratios_are_clamped_on_both_sides_unless_null():
    far = (torch.tensor([-500.0, -1.0]), torch.tensor([-1.0, -500.0]))
    torch.testing.assert_close(k3(*far), torch.tensor([math.exp(20) - 21, 19.0]))
    torch.testing.assert_close(k2(*far, clamp=3.0), torch.tensor([4.5, 4.5]))
    assert kl_estimate(*far, "k1", clamp=None).tolist() == [-499.0, 499.0]
    assert float(k3(torch.tensor(-20.0), torch.tensor(0.0), clamp=None)) == pytest.approx(4.9e8, rel=0.02)


# --- the chunked head ------------------------------------------------------------------------------------------------

TOKENS, WIDTH, VOCABULARY = 7, 3, 11


def head_inputs(seed=0):
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    return normal(seed, TOKENS, WIDTH), normal(seed + 1, VOCABULARY, WIDTH), normal(seed + 2, VOCABULARY), targets


def plain_head(hidden, weight, bias, targets, temperature, softcap, scale):
    logits = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = (logits / temperature).softmax(-1)
    return p[torch.arange(len(targets)), targets].log(), -(p * p.log()).sum(-1)


@pytest.mark.parametrize("kept_logits", [0, 2**24], ids=["recomputed", "kept"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 2.0, 1.3)])
def test_chunked_head_equals_the_plain_head(
    monkeypatch, kept_logits, with_bias, chunk_tokens, temperature, softcap, scale
):
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", kept_logits)
    hidden, weight, bias, targets = head_inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    upstream = normal(9, 2, TOKENS)

    def chunked(hidden, weight, bias=None):
        found = chunked_logprobs(hidden, weight, targets, bias, temperature, True, chunk_tokens, softcap, scale)
        return (upstream * torch.stack(found)).sum()

    def plain(hidden, weight, bias=None):
        return (upstream * torch.stack(plain_head(hidden, weight, bias, targets, temperature, softcap, scale))).sum()

    torch.testing.assert_close(chunked(*leaves), plain(*leaves))
    expected = gradient(plain, *leaves)
    torch.testing.assert_close(gradient(chunked, *leaves), expected)
    frozen = gradient(lambda h: chunked(h, *leaves[1:]), hidden)
    torch.testing.assert_close(frozen, expected[:1])
    only_weight = gradient(lambda w: chunked(hidden, w, *leaves[2:]), weight)
    torch.testing.assert_close(only_weight, expected[1:2])


@pytest.mark.parametrize("kept_logits", [0, 2**24], ids=["recomputed", "kept"])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_chunked_head_passes_gradcheck(monkeypatch, kept_logits, with_entropy):
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", kept_logits)
    hidden, weight, bias, targets = head_inputs()

    def outputs(hidden, weight, bias):
        return tuple(
            x for x in chunked_logprobs(hidden, weight, targets, bias, 0.7, with_entropy, 3, 2.0, 1.3) if x is not None
        )

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradcheck(lambda h: outputs(h, weight.detach(), bias.detach()), leaves[:1])


def test_chunk_size_bounds_logits_for_any_vocabulary(monkeypatch):
    assert [chunk_size(1024, vocabulary) for vocabulary in (49_152, 65_536, 131_072, 262_144)] == [1024, 1024, 512, 256]
    assert chunk_size(1024, 2**30) == 1 and chunk_size(3, 11) == 3
    hidden, weight, bias, targets = head_inputs()
    expected = plain_head(hidden, weight, bias, targets, 1.0, None, 1.0)
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 2 * VOCABULARY)
    shapes = []
    monkeypatch.setattr(logprobs_module.F, "linear", lambda x, *rest: shapes.append(len(x)) or x @ rest[0].T + rest[1])
    torch.testing.assert_close(chunked_logprobs(hidden, weight, targets, bias, with_entropy=True), expected)
    assert max(shapes) == 2


@pytest.mark.parametrize("head_trains", [True, False])
def test_each_output_can_be_used_alone(head_trains):
    hidden, weight, _, targets = head_inputs()
    weight.requires_grad_(head_trains)
    for output in (0, 1):
        found = gradient(lambda h, o=output: chunked_logprobs(h, weight, targets, with_entropy=True)[o], hidden)
        expected = gradient(lambda h, o=output: plain_head(h, weight, None, targets, 1.0, None, 1.0)[o], hidden)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("head_trains", [True, False])
def test_chunked_head_of_no_tokens(head_trains):
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    weight = torch.zeros(VOCABULARY, WIDTH, requires_grad=head_trains)
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH)
    if head_trains:
        assert weight.grad.abs().sum().item() == 0


def test_chunked_head_without_gradient_saves_no_tensors():
    hidden, weight, bias, targets = head_inputs()
    weight.requires_grad_()
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, bias)
    assert entropy is None
    assert not logprobs.requires_grad
    assert saved == []
    torch.testing.assert_close(logprobs, plain_head(hidden, weight, bias, targets, 1.0, None, 1.0)[0].detach())


def test_chunked_head_under_autocast_computes_logits_in_its_dtype_and_returns_gradients_in_the_parameters():
    hidden, weight, _, targets = head_inputs()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = chunked_logprobs(hidden, weight, targets, chunk_tokens=2)
        logits = F.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits, targets))
    found = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    expected = torch.autograd.grad(token_logprobs(logits, targets).sum(), [hidden, weight])
    assert [g.dtype for g in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class LiveElements(TorchDispatchMode):
    """Tracks the number of elements of live tensors created while active, and records the maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor] = tensor.untyped_storage()
        storages = {s.data_ptr(): s.nbytes() // 4 for s in self.alive.values()}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("head_trains", [True, False])
def test_neither_pass_materialises_all_logits(monkeypatch, head_trains):
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS", 0)
    tokens, width, vocabulary, chunk = 512, 4, 256, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=head_trains)
    targets = torch.randint(vocabulary, (tokens,))
    saved = []
    with LiveElements() as live, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, with_entropy=True, chunk_tokens=chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert live.peak < 5 * chunk * vocabulary + 6 * tokens * width
    assert sum(x.numel() for x in saved) < 4 * tokens * width
    with LiveElements() as plain:
        token_logprobs(F.linear(hidden, weight), targets).sum().backward()
    assert plain.peak > tokens * vocabulary  # the tracker sees the full logits
