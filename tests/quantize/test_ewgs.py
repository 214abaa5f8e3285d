"""EWGS against the official code's numbers, the paper's formula, and the promises of a quantizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.ewgs import EWGS, EWGSWeight, scaled_gradient_round
from galago.quantize.layer import QuantLayer

ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


def golden_layer(want, prefix="layer"):
    """The golden convolution, quantized, with the parameters of `prefix` unless that is "layer"."""
    conv = nn.Conv2d(5, 6, 3, stride=int(want["layer_stride"]), padding=int(want["layer_padding"]), bias=False)
    conv.weight.data.copy_(want["layer_weight"])
    bits = [int(want[f"layer_levels_{kind}"]).bit_length() - 1 for kind in "wa"]
    deltas = [float(want[f"layer_delta_{kind}"]) for kind in "wa"]
    layer = QuantLayer(conv, EWGSWeight(bits[0], deltas[0]), EWGS(bits[1], deltas[1]))
    if prefix != "layer":
        for quantizer, kind in ((layer.weight_quantizer, "W"), (layer.input_quantizer, "A")):
            quantizer.low.data.copy_(want[f"{prefix}_l{kind}"])
            quantizer.high.data.copy_(want[f"{prefix}_u{kind}"])
        layer.output_scale.data.copy_(want[f"{prefix}_output_scale"])
    return layer


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_discretizer_is_the_official_codes(golden, bits, number):
    want = {key.removeprefix(f"disc_b{bits}_"): value for key, value in golden("ewgs").items()}
    steps, x = 2**bits - 1, want["x"].clone().requires_grad_()
    q = scaled_gradient_round(x, ZERO, ONE, want[f"delta{number}"], steps)
    q.backward(want["grad_out"])
    # The encoder divides by the step where the official code multiplies by N: exact ties may fall the other way.
    tie = ((want["x"].double() * steps) % 1 - 0.5).abs() < 1e-5
    assert (~tie).sum() > 30
    torch.testing.assert_close(q[~tie].detach(), want["expected_x_q"][~tie], rtol=0, atol=1e-6)
    assert ((q - want["expected_x_q"]).abs() * steps).max() < 1 + 1e-5
    expected = want[f"expected_grad_x_delta{number}"]
    torch.testing.assert_close(x.grad[~tie], expected[~tie], rtol=0, atol=1e-6)
    flipped = (q - want["expected_x_q"]).abs() > 1e-4
    torch.testing.assert_close(x.grad[~flipped], expected[~flipped], rtol=0, atol=1e-6)


def test_initialization_is_the_official_codes(golden):
    want = golden("ewgs")
    layer = golden_layer(want)
    layer.observe(want["layer_x"])
    found = {
        "uW": layer.weight_quantizer.high,
        "lW": layer.weight_quantizer.low,
        "uA": layer.input_quantizer.high,
        "lA": layer.input_quantizer.low,
        "output_scale": layer.output_scale,
    }
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), want[f"init_{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prefix", ["init", "moved"])
def test_output_and_every_gradient_are_the_official_codes(golden, prefix):
    want = golden("ewgs")
    layer = golden_layer(want, prefix)
    x = want["layer_x"].clone().requires_grad_()
    y = layer(x)
    y.backward(want["layer_grad_out"])
    found = {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weight": layer.layer.weight.grad,
        "grad_uW": layer.weight_quantizer.high.grad,
        "grad_lW": layer.weight_quantizer.low.grad,
        "grad_uA": layer.input_quantizer.high.grad,
        "grad_lA": layer.input_quantizer.low.grad,
        "grad_output_scale": layer.output_scale.grad,
    }
    for name, value in found.items():
        expected = want[f"{prefix}_expected_{name}"]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("steps", [1, 3, 15])
def test_gradient_is_the_papers_formula_element_by_element(steps):
    n, g = torch.rand(500), torch.randn(500)
    n.requires_grad_()
    q = scaled_gradient_round(n, ZERO, ONE, torch.tensor(0.3), steps)
    q.backward(g)
    torch.testing.assert_close(n.grad, g * (1 + 0.3 * g.sign() * (n - q).detach()))


def test_no_delta_is_exactly_straight_through():
    n, g = torch.rand(500), torch.randn(500)
    n.requires_grad_()
    scaled_gradient_round(n, ZERO, ONE, ZERO, 3).backward(g)
    assert torch.equal(n.grad, g)


def test_a_step_is_larger_than_straight_through_exactly_where_the_value_has_yet_to_travel():
    n, g = torch.rand(500), torch.randn(500)
    n[:2], g[2] = torch.tensor([0.0, 1.0]), 0.0
    n.requires_grad_()
    q = scaled_gradient_round(n, ZERO, ONE, torch.tensor(0.5), 3)
    q.backward(g)
    ahead = g.sign() * (n - q).detach()
    assert (n.grad.abs()[ahead > 1e-6] > g.abs()[ahead > 1e-6]).all()
    assert (n.grad.abs()[ahead < -1e-6] < g.abs()[ahead < -1e-6]).all()
    assert torch.equal(n.grad[ahead == 0], g[ahead == 0])
    assert n.grad[2] == 0


def test_the_ends_of_the_interval_belong_to_it_and_nothing_beyond_does():
    x = torch.tensor([-0.1, 0.0, 1.0, 1.1], requires_grad=True)
    scaled_gradient_round(x, ZERO, ONE, ZERO, 3).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_gradients_of_the_bounds_are_those_of_the_normalization():
    """Against automatic differentiation of clip((x - l) / (u - l)) in float64, where nothing lies on a bound."""
    x, g = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    low, high = torch.tensor(-0.7, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    ours = [tensor.clone().requires_grad_() for tensor in (x, low, high)]
    theirs = [tensor.clone().requires_grad_() for tensor in (x, low, high)]
    scaled_gradient_round(*ours, ZERO.double(), 7, centered=True).backward(g)
    (2 * ((theirs[0] - theirs[1]) / (theirs[2] - theirs[1])).clamp(0, 1) - 1).backward(g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [EWGS, EWGSWeight])
def test_evaluated_values_are_the_grids_values_of_the_codes(bits, kind):
    x = torch.randn(6, 5, 7, 7)
    quantizer = kind(bits)
    quantizer.initialize(x)
    x = 2 * x  # beyond both ends
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(quantizer.train()(x), y)
    assert set(codes.unique().tolist()) <= set(range(grid.low, grid.high + 1, grid.step))
    assert codes.unique().numel() <= 2**bits
    assert y.min().item() == pytest.approx(0 if kind is EWGS else -1)
    assert y.max().item() == pytest.approx(1)


@pytest.mark.parametrize("bits", range(1, 8))
def test_weight_codes_below_eight_bits_are_odd_and_fit_a_byte(bits):
    grid = EWGSWeight(bits).grid()
    assert (grid.step, grid.low % 2, -grid.low) == (2, 1, 2**bits - 1)
    assert grid.scale.item() == pytest.approx(1 / (2**bits - 1))


def test_eight_bit_weights_have_a_zero_and_fit_a_byte():
    grid = EWGSWeight(8).grid()
    assert (grid.step, grid.low, grid.high) == (1, -127, 127)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_weights_encoder_names_the_nearest_code_of_the_grid(bits):
    weight, quantizer = torch.randn(400), EWGSWeight(bits)
    quantizer.initialize(weight)
    encoder, grid = quantizer.encoder(), quantizer.grid()
    places = ((weight - encoder.offset) / encoder.scale).clamp(grid.low, grid.high)
    assert (places - quantizer.codes(weight)).abs().max() <= grid.step / 2 + 1e-3


def test_right_after_initialization_the_mean_output_is_as_large_as_in_float():
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3, bias=False), EWGSWeight(2), EWGS(2)), torch.randn(4, 5, 9, 9).relu()
    layer.observe(x)
    assert layer(x).abs().mean().item() == pytest.approx(layer.layer(x).abs().mean().item(), rel=1e-5)


def test_integers_times_one_factor_reproduce_the_layer():
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3, bias=False), EWGSWeight(2), EWGS(3)), torch.randn(4, 5, 9, 9).relu()
    layer.observe(x)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    codes = nn.functional.conv2d(inputs.codes(x).double(), weights.codes(layer.layer.weight.detach()).double())
    factor = layer.output_scale.detach().abs().double() * weights.grid().scale * inputs.grid().scale
    torch.testing.assert_close(layer.eval()(x).double(), codes * factor, rtol=1e-5, atol=1e-5)


def test_a_collapsed_interval_stays_finite():
    quantizer = EWGS(4)
    quantizer.initialize(torch.zeros(10))
    assert quantizer(torch.zeros(10)).isfinite().all()
    quantizer.high.data.fill_(-1.0)
    x = torch.randn(10, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert quantizer.high.grad.isfinite()


def test_ranges_learn_slowly_and_do_not_decay():
    assert EWGS().own_rates() == (0.01, 0.0)
    assert QuantLayer(nn.Linear(2, 2), EWGSWeight(learning_rate_factor=0.1)).own_rates() == (0.1, 0.0)


def test_delta_rides_in_the_state_and_everything_rebuilds_from_arguments():
    layer, x = QuantLayer(nn.Conv2d(3, 4, 3), EWGSWeight(2), EWGS(2)), torch.randn(2, 3, 8, 8).relu()
    layer.observe(x)
    layer.weight_quantizer.delta.fill_(0.25)
    again = QuantLayer(nn.Conv2d(3, 4, 3), EWGSWeight(2), EWGS(2))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert again.weight_quantizer.delta == 0.25
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", [EWGS, EWGSWeight])
def test_in_half_precision_the_type_stays_and_codes_move_by_at_most_one(kind):
    x, quantizer = torch.randn(6, 5, 7, 7), kind(4)
    quantizer.initialize(x)
    y, grid = quantizer(x.bfloat16()), quantizer.grid()
    assert y.dtype == torch.bfloat16
    assert (y.float() / grid.scale - quantizer.codes(x)).abs().max() < 1.1 * grid.step
    y.float().sum().backward()
    assert quantizer.high.grad.dtype == torch.float32


def test_impossible_bits_are_refused_in_plain_words():
    with pytest.raises(UserError, match="1 to 8"):
        EWGSWeight(9)
