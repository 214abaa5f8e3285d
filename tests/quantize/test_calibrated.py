"""Ranges that are found once: the searches as a quantizer uses them, and that nothing moves them afterwards."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.calibrated import Calibrated, CalibratedWeight, Search
from galago.quantize.layer import QuantLayer
from galago.quantize.ranges import least_error, rounding, rows_of, symmetric
from galago.quantize.rounding import write_codes
from galago.testing import check_quantizer

SEARCHES = get_args(Search)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("make", [Calibrated, CalibratedWeight])
def test_values_lie_on_the_grid_whatever_the_search(make, search):
    x = torch.randn(6, 5, 3, 3)
    for bits in (2, 8):
        quantizer = make(bits, search)
        quantizer.initialize(x)
        assert torch.equal(quantizer.train()(x), quantizer.grid().values(quantizer.codes(x)))
        assert torch.equal(quantizer(quantizer(x)), quantizer(x))


def test_one_range_for_all_channels_obeys_the_laws():
    check_quantizer(lambda: CalibratedWeight(4, per_channel=False), for_weights=True, idempotent=True)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_range_stays_through_training(search):
    quantizer = Calibrated(8, search).train()
    quantizer.initialize(torch.randn(4, 3, 8, 8))
    before = quantizer.grid()
    quantizer(100 * torch.randn(4, 3, 8, 8))
    assert (quantizer.scale, quantizer.zero_point) == (before.scale, before.zero_point)


@pytest.mark.parametrize("search", SEARCHES)
def test_zero_is_exact(search):
    for x in (torch.randn(4, 50), torch.rand(4, 50) + 2, -torch.rand(4, 50)):
        quantizer = Calibrated(8, search)
        quantizer.initialize(x)
        assert quantizer(torch.zeros(3)).tolist() == [0.0] * 3


def test_percentile_of_everything_is_min_max():
    x = torch.randn(2000)
    whole, clipped = Calibrated(8, "min_max"), Calibrated(8, "percentile", share=1.0)
    whole.initialize(x)
    clipped.initialize(x)
    assert torch.equal(whole.scale, clipped.scale)
    assert torch.equal(whole.zero_point, clipped.zero_point)


def test_values_that_are_never_negative_get_every_code():
    quantizer = Calibrated(4, "min_max")
    quantizer.initialize(torch.linspace(0, 3, 31))
    assert quantizer.zero_point == 0
    torch.testing.assert_close(quantizer.scale, torch.tensor(3 / 15))


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_search_by_error_costs_no_more_than_min_max(power):
    x = torch.randn(8, 300).pow(3)
    errors = []
    for search in ("mse", "min_max"):
        quantizer = CalibratedWeight(4, search, power=power)
        quantizer.initialize(x)
        errors.append((quantizer(x) - x).abs().pow(power).mean(1))
    assert (errors[0] <= errors[1]).all()
    assert errors[0].mean() < 0.99 * errors[1].mean()


def test_weights_take_the_range_of_the_search(golden):
    weight = golden("ptq")["ada_weight"]
    quantizer = CalibratedWeight(4)
    quantizer.initialize(weight)
    rows = rows_of(weight, per_channel=True)
    expected = symmetric(least_error(rows, rounding(rows, symmetric, -8, 7), 2.4), -8, 7).scale
    assert torch.equal(quantizer.scale, expected)
    assert quantizer.limits == (-8, 7)
    assert CalibratedWeight(8).limits == (-127, 127)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_written_into_a_layer_stay_what_they_are(bits):
    layer = QuantLayer(nn.Conv2d(3, 5, 3), CalibratedWeight(bits))
    grid = layer.weight_quantizer.grid()
    write_codes("conv", layer, torch.randint(grid.low, grid.high + 1, layer.layer.weight.shape))


def test_gradients_pass_where_nothing_is_clipped():
    quantizer = Calibrated(4, "percentile", share=0.9)
    x = torch.randn(1000)
    quantizer.initialize(x)
    x.requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(x.grad, ((y - x).abs() <= 0.5001 * quantizer.scale).float())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Calibrated(9), "1 to 8"),
        (lambda: CalibratedWeight(1), "2 to 8"),
        (lambda: Calibrated(search="mean"), "min_max, percentile, mse, entropy, std"),
        (lambda: Calibrated(share=0.0), "share is 0"),
        (lambda: CalibratedWeight(power=-1.0), "power is -1"),
        (lambda: CalibratedWeight(deviations=0.0), "deviations is 0"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
