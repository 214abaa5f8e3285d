"""Soft rounding against the official code's numbers and against plain sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.calibrated import CalibratedWeight
from galago.quantize.dorefa import DoReFaWeight
from galago.quantize.ewgs import EWGSWeight
from galago.quantize.group_wise import GroupWiseWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMaxWeight
from galago.quantize.quantizer import Grid, Quantizer
from galago.quantize.soft_rounding import (
    WARM_UP,
    Mixed,
    SoftWeight,
    beta_at,
    initial_v,
    partly_float,
    rectified_sigmoid,
    require_keeps_codes,
    softened,
    softly_rounded,
    undecided,
)


class Stored(Quantizer):
    """A grid that is given, unsigned with zero points."""

    def __init__(self, grid: Grid, bits: int) -> None:
        super().__init__()
        self._grid, self.bits = grid, bits

    def initialize(self, x):
        pass

    def forward(self, x):
        return self._grid.values(self.codes(x))

    def grid(self):
        return self._grid


@pytest.fixture
def want(golden):
    return golden("ptq")


@pytest.fixture
def stored(want):
    scale, zero, bits = want["mse_observer_expected_scale"], want["mse_observer_expected_zero_point"], want["ada_bits"]
    return Stored(Grid(scale.float(), zero.float(), 0, 2 ** int(bits) - 1, axis=0), int(bits))


def test_the_start_is_the_official_codes(want, stored):
    soft = SoftWeight(stored, want["ada_weight"])
    torch.testing.assert_close(soft.v.detach(), want["ada_expected_V_init"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(soft(want["ada_weight"]).detach(), want["ada_expected_soft_at_init"], rtol=0, atol=1e-5)
    torch.testing.assert_close(stored._grid.values(soft.codes()), want["ada_expected_nearest"], rtol=0, atol=1e-5)


def test_values_and_gradients_at_another_point_are_the_official_codes(want, stored):
    soft = SoftWeight(stored, want["ada_weight"])
    soft.v.data.copy_(want["ada_V"])
    torch.testing.assert_close(rectified_sigmoid(want["ada_V"].double()), want["ada_expected_h"], rtol=0, atol=1e-6)
    found = soft(want["ada_weight"])
    torch.testing.assert_close(found.detach(), want["ada_expected_soft"], rtol=0, atol=1e-5)
    found.backward(want["ada_grad_out"])
    torch.testing.assert_close(soft.v.grad, want["ada_expected_grad_V"], rtol=0, atol=1e-5)
    torch.testing.assert_close(stored._grid.values(soft.codes()), want["ada_expected_hard"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["b20", "b7p5", "b2"])
def test_the_regularizer_is_the_official_codes(want, name):
    v = want["ada_V"].clone().requires_grad_()
    value = undecided(v, float(want[f"reg_{name}_beta"]))
    assert value.item() == pytest.approx(want[f"reg_{name}_expected_value"].item(), rel=1e-5)
    value.backward()
    torch.testing.assert_close(v.grad, want[f"reg_{name}_expected_grad_V"], rtol=0, atol=1e-5)


def test_the_schedule_is_the_official_codes(want):
    steps = want["temp_t"].tolist()
    betas = [beta_at(step, 20_000) for step in steps]
    torch.testing.assert_close(torch.tensor(betas, dtype=torch.float64), want["temp_expected_beta"].double())
    assert [int(step >= WARM_UP * 20_000) for step in steps] == want["temp_expected_regularizer_on"].tolist()


@pytest.mark.parametrize("quantizer", [LSQWeight(3), LSQWeight(4, per_channel=False), CalibratedWeight(4)])
def test_at_the_start_the_soft_weight_is_the_float_weight_inside_the_range(quantizer):
    weight = torch.randn(6, 5, 3, 3)
    quantizer.initialize(weight)
    grid, soft = quantizer.grid(), SoftWeight(quantizer, weight)
    inside = (grid.values(torch.full_like(weight, grid.low)) <= weight) & (
        weight <= grid.values(torch.full_like(weight, grid.high))
    )
    assert 0.5 < inside.float().mean() < 1 or inside.all()
    torch.testing.assert_close(soft(weight)[inside], weight[inside], rtol=0, atol=1e-5)
    assert torch.equal(soft.codes(), quantizer.codes(weight))


def test_h_and_its_gradient_are_the_formulas_in_float64():
    v = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    h = rectified_sigmoid(v)
    h.sum().backward()
    for one, value, slope in zip(v.tolist(), h.tolist(), v.grad.tolist(), strict=True):
        sigmoid = 1 / (1 + 2.718281828459045**-one)
        open_ = 0 < 1.2 * sigmoid - 0.1 < 1
        assert value == pytest.approx(min(1.0, max(0.0, 1.2 * sigmoid - 0.1)), abs=1e-12)
        assert slope == pytest.approx(1.2 * sigmoid * (1 - sigmoid) if open_ else 0.0, abs=1e-12)


def test_h_starts_at_the_fraction_and_halves_go_up():
    fraction = torch.arange(0, 1, 1 / 64, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(initial_v(fraction)), fraction, rtol=0, atol=1e-12)
    assert torch.equal(initial_v(fraction) >= -1e-12, fraction >= 0.5)


def test_beyond_the_outermost_codes_nothing_moves():
    grid = Grid(torch.tensor(0.5), torch.tensor(0.0), -2, 1)
    v = torch.zeros(4, requires_grad=True)
    values = softly_rounded(torch.tensor([-3.0, -2.0, 0.0, 1.0]), v, grid)
    values.sum().backward()
    assert values.tolist() == pytest.approx([-1.0, -0.75, 0.25, 0.5])
    assert v.grad.tolist() == pytest.approx([0.0, 0.15, 0.15, 0.0])


def test_layers_have_their_quantizers_back_whatever_happens():
    layer = QuantLayer(nn.Conv2d(3, 4, 3), LSQWeight(4))
    before = layer.weight_quantizer
    with pytest.raises(ZeroDivisionError), softened({"conv": layer}) as soft:
        assert layer.weight_quantizer is soft["conv"]
        torch.testing.assert_close(
            layer(torch.ones(1, 3, 5, 5)), layer.layer(torch.ones(1, 3, 5, 5)), rtol=0, atol=1e-4
        )
        raise ZeroDivisionError
    assert layer.weight_quantizer is before


@pytest.mark.parametrize("quantizer", [LSQWeight(4), LSQWeight(2), CalibratedWeight(8), GroupWiseWeight(3)])
def test_stored_ranges_keep_what_is_written(quantizer):
    layer = QuantLayer(nn.Conv2d(3, 4, 3), quantizer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    require_keeps_codes({"conv": layer})
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("quantizer", [MinMaxWeight(8), MinMaxWeight(4), EWGSWeight(4), EWGSWeight(8), DoReFaWeight(4)])
def test_ranges_that_follow_the_weights_are_refused_before_any_work(quantizer):
    layer = QuantLayer(nn.Conv2d(3, 4, 3), quantizer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(UserError, match=r"head: .*CalibratedWeight"):
        require_keeps_codes({"head": layer})
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)


def test_a_share_of_the_values_stays_float():
    layer = QuantLayer(nn.Conv2d(3, 4, 3), LSQWeight(4), LSQ(2, signed=True))
    x = torch.randn(2, 3, 40, 40)
    layer.observe(x)
    quantizer, rounded = layer.input_quantizer, layer.input_quantizer(x)
    with partly_float(nn.Sequential(layer), 0.25):
        assert isinstance(layer.input_quantizer, Mixed)
        mixed = layer.input_quantizer(x)
        assert ((mixed == x) | (mixed == rounded)).all()
        assert (mixed == x).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert layer.input_quantizer is quantizer
    with partly_float(layer, 1.0):
        assert torch.equal(layer.input_quantizer(x), x)
    with partly_float(layer, 0.0):
        assert layer.input_quantizer is quantizer
