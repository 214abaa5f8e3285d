"""Integers written into a layer are those its quantizer then makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.ewgs import EWGSWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMaxWeight
from galago.quantize.quantizer import Quantizer
from galago.quantize.rounding import weight_quantized, weight_quantizer_of, write_codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_come_back_whatever_they_are(bits: int) -> None:
    layer = QuantLayer(nn.Conv2d(3, 5, 3), LSQWeight(bits))
    grid = weight_quantizer_of(layer).grid()
    codes = torch.randint(grid.low, grid.high + 1, layer.layer.weight.shape)
    write_codes("conv", layer, codes)
    assert torch.equal(weight_quantizer_of(layer).codes(layer.layer.weight), codes.float())
    assert torch.equal(layer.parameters_used()["weight"], layer.layer.weight)


@pytest.mark.parametrize("quantizer", [MinMaxWeight(4), EWGSWeight(4)])
def test_a_quantizer_that_would_change_them_is_refused_and_nothing_changed(quantizer: Quantizer) -> None:
    layer = QuantLayer(nn.Conv2d(3, 5, 3), quantizer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(UserError, match=r"head: \w+ does not keep the integers"):
        write_codes("head", layer, quantizer.codes(layer.layer.weight) * 0 + quantizer.grid().step)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_only_quantized_weights_are_meant() -> None:
    model = nn.Sequential(QuantLayer(nn.Linear(2, 3), LSQWeight(4)), QuantLayer(nn.Linear(3, 3)), nn.Linear(3, 1))
    assert [*weight_quantized(model)] == ["0"]
    with pytest.raises(UserError, match="behind Quantize"):
        weight_quantized(model[2])
