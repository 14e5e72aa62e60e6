"""The product and gradients of an adapted layer equal peft's, for every form of a layer."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from rlhf_lightning.models.adapters import add_adapter, with_adapter
from rlhf_lightning.models.low_rank import LowRankLinear, LowRankProduct, use_low_rank_products


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["first", "second"], **options)
    model = get_peft_model(Two(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def outcome(model: Any, x: Tensor) -> list[Tensor]:
    """The output, the gradient of the input and of each weight that trains."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in trained)
    return [output.detach(), x.grad, *trained]  # type: ignore[list-item]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of this project's low-rank product."""
    calls: list[int] = []
    apply = LowRankProduct.apply
    monkeypatch.setattr(LowRankProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_equal_pefts(counted: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, x = adapted().to(dtype), torch.randn(shape, dtype=dtype)
    expected = outcome(model, x)
    assert not counted
    use_low_rank_products(model)
    found = outcome(model, x)
    assert len(counted) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_mixed_precision_gradients_are_as_accurate_as_pefts(counted: list[int], base: torch.dtype) -> None:
    """Relative to single precision, the error is at most 1.5 times that of peft's implementation."""
    model, x = adapted(), torch.randn(16, 6)
    exact = outcome(model, x)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model, x)
        assert not counted
        use_low_rank_products(model)
        found = outcome(model, x)
    assert len(counted) == 2
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = true.abs().max()
        assert (ours - true).abs().max() <= 1.5 * (theirs - true).abs().max() + 0.01 * scale


def test_dropout_masks_equal_pefts(counted: list[int]) -> None:
    model, x = adapted(dropout=0.5), torch.randn(5, 6)
    found = []
    for _ in range(2):
        for mode in (True, False):
            torch.manual_seed(3)
            found.append(outcome(model.train(mode), x))
        use_low_rank_products(model)
    assert len(counted) == 4
    for one, other in zip((*found[2], *found[3]), (*found[0], *found[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_double_precision_under_autocast_falls_back_to_peft(counted: list[int]) -> None:
    model = adapted().double()
    use_low_rank_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 6, dtype=torch.float64)).dtype == torch.float64
    assert not counted


@pytest.mark.parametrize("form", ["off", "bias", "dora", "merged", "trained base", "two adapters"])
def test_other_adapter_forms_fall_back_to_peft(counted: list[int], form: str) -> None:
    options = {"bias": {"lora_bias": True}, "dora": {"use_dora": True}}
    torch.manual_seed(1)
    x = torch.randn(5, 6)
    found = []
    for fused in (False, True):
        model = adapted(**options.get(form, {}))  # type: ignore[arg-type]
        if fused:
            use_low_rank_products(model)
        if form == "merged":
            model.merge_adapter()
        if form == "trained base":
            model.requires_grad_(True)
        if form == "two adapters":
            add_adapter(model, "other", model.peft_config["default"])
            model.base_model.set_adapter(["default", "other"])
        torch.manual_seed(2)
        with torch.no_grad():
            if form == "off":
                with with_adapter(model, None):
                    found.append(model(x))
            else:
                found.append(model(x))
    assert not counted
    torch.testing.assert_close(found[1], found[0])


def test_fused_layers_keep_pefts_names_weights_and_merging() -> None:
    model, plain = adapted(), adapted()
    use_low_rank_products(model)
    assert type(model.base_model.model.first) is LowRankLinear and isinstance(model.base_model.model.first, Linear)
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, 6)
    before = model(x)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), before)


def test_four_bit_layers_equal_bitsandbytes(counted: list[int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": True}
            self.first = bitsandbytes.nn.Linear4bit(64, 128, bias=True, **settings)
            self.second = bitsandbytes.nn.Linear4bit(128, 64, bias=False, **settings)
            self.is_loaded_in_4bit = True

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    base = Four().to("cpu")
    model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(5, 64)
    expected = outcome(model, x)
    use_low_rank_products(model)
    found = outcome(model, x)
    assert len(counted) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
