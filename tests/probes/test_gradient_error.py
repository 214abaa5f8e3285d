"""The error of quantized gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.layers import swap
from galago.probe import Deployed
from galago.probes.gradient_error import GradientError, gradient_errors
from galago.quantize.gradient_quantizer import QuantGradient
from galago.quantize.lbt import FixedInterval
from galago.testing import check_probe


def quantized_network(bits: int = 4) -> nn.Module:
    model = tiny_network()
    for path, layer in [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Conv2d)]:
        model = swap(model, path, QuantGradient(layer, FixedInterval(bits)))
    return model


def measured(model: nn.Module, probe: GradientError | None = None) -> dict[str, float]:
    data = TinyImages()
    return (probe or GradientError())(Deployed(model, data.normalize, classify()), classify(), data)


def test_large_ones_are_those_of_the_largest_size() -> None:
    gradient, error = torch.randn(1000), torch.rand(1000)
    every, large = gradient_errors(gradient, gradient + error, 0.01)
    assert every == pytest.approx(error.mean().item(), rel=1e-3)
    assert large == pytest.approx(error[gradient.abs().argsort(descending=True)[:10]].mean().item(), rel=1e-3)


def test_fewer_bits_have_larger_errors() -> None:
    torch.manual_seed(0)
    found = []
    for bits in (2, 4, 8):
        torch.manual_seed(0)
        found.append(measured(quantized_network(bits)))
    assert [one["gradient_error"] for one in found] == sorted((one["gradient_error"] for one in found), reverse=True)
    assert all(one["gradient_error_large"] < 2.0 for one in found)
    assert found[0]["gradient_interval"] == 1.0


def test_a_network_without_quantized_gradients_has_no_such_number() -> None:
    assert measured(tiny_network()) == {}
    assert measured(quantized_network(32)) == {}


def test_a_moving_average_of_the_network_which_does_not_train_is_measured_too() -> None:
    torch.manual_seed(0)
    model = quantized_network()
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert measured(frozen) == measured(model)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="alpha is 0"):
        GradientError(alpha=0.0)


def test_the_laws_of_probes_hold_with_and_without_quantized_gradients() -> None:
    check_probe(GradientError)
    check_probe(GradientError, make_model=quantized_network, same_on_artifact=False)
