"""LSQ against the official code's numbers, the paper's formulas, and the promises of a quantizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.layer import QuantLayer
from galago.quantize.learned_step import learned_step
from galago.quantize.lsq import LSQ, LSQWeight, initial_step

CASES = [(bits, kind) for bits in (2, 4) for kind in ("weight", "weight_per_channel", "activation")]


def quantizer(bits, kind, values=None):
    made = LSQ(bits) if kind == "activation" else LSQWeight(bits, per_channel=kind.endswith("channel"))
    if values is not None:
        made.initialize(values)
    return made


@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_forward_and_gradients_are_the_official_codes(golden, bits, kind):
    want = {key.removeprefix(f"lsq_b{bits}_{kind}_"): value for key, value in golden("baselines_qat").items()}
    lsq = quantizer(bits, kind, want["v"])
    assert lsq.limits == (-want["Qn"], want["Qp"])
    torch.testing.assert_close(lsq.step.detach().reshape(-1), want["expected_init_step"], rtol=1e-5, atol=0)
    lsq.step.data.copy_(want["step"].reshape(lsq.step.shape))
    v = want["v"].clone().requires_grad_()
    y = lsq(v)
    y.backward(want["grad_out"])
    torch.testing.assert_close(y.detach(), want["expected_y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(v.grad.double(), want["expected_grad_v"], rtol=0, atol=1e-5)
    step_gradient = want["expected_grad_step_unscaled"].double() * want["expected_grad_scale"]
    torch.testing.assert_close(lsq.step.grad.double().reshape(-1), step_gradient, rtol=1e-4, atol=1e-6)


def test_exactly_on_the_bounds_the_papers_strict_inequalities_hold(golden):
    want = {key.removeprefix("lsq_edges_"): value for key, value in golden("baselines_qat").items()}
    v, step = want["v"].clone().requires_grad_(), want["step"].clone().requires_grad_()
    y = learned_step(v, step, -int(want["Qn"]), int(want["Qp"]))
    y.backward(want["grad_out"])
    torch.testing.assert_close(y.detach(), want["expected_y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(v.grad, want["expected_grad_v"], rtol=0, atol=1e-12)
    torch.testing.assert_close(step.grad.double(), want["expected_grad_step_unscaled"], rtol=1e-6, atol=0)


def test_step_gradient_is_the_closed_form_element_by_element():
    v, g = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    step, total = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 0.0
    learned_step(v, step, -4, 3).backward(g)
    for value, slope in zip(v.flatten().tolist(), g.flatten().tolist(), strict=True):
        scaled = value / 0.3
        total += slope * (-4 if scaled <= -4 else 3 if scaled >= 3 else round(scaled) - scaled)
    assert step.grad.item() == pytest.approx(total, rel=1e-9)


def test_gradient_scale_balances_step_and_weights():
    """At initialization the step moves, relative to its size, much as the weights do; without scaling far more."""
    weight = (0.05 * torch.randn(32, 32, 3, 3)).requires_grad_()
    lsq = quantizer(4, "weight", weight.detach())
    gradient = torch.randn_like(weight)
    lsq(weight).backward(gradient)
    ratio = (lsq.step.grad.abs() / lsq.step / (weight.grad.norm() / weight.detach().norm())).item()
    assert ratio < 10
    unscaled = lsq.step.detach().clone().requires_grad_()
    learned_step(weight.detach(), unscaled, *lsq.limits).backward(gradient)
    growth = (unscaled.grad / lsq.step.grad).item()
    assert growth == pytest.approx(math.sqrt(weight.numel() * lsq.limits[1]), rel=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["weight", "weight_per_channel", "activation", "signed"])
def test_evaluated_values_are_the_grids_values_of_the_codes(bits, kind):
    x = torch.randn(6, 5, 7, 7)
    x = x.relu() if kind == "activation" else x
    lsq = quantizer(bits, "activation" if kind == "signed" else kind, x)
    y, codes, grid = lsq.eval()(x), lsq.codes(x), lsq.grid()
    assert torch.equal(y, grid.values(codes))
    assert codes.unique().numel() <= 2**bits
    assert torch.equal(codes, codes.round())
    assert grid.low <= codes.min()
    assert codes.max() <= grid.high
    assert torch.equal(lsq(y), y), "quantizing twice changes values"
    assert torch.equal(lsq.train()(x), y)


def test_eight_bit_weights_can_be_negated():
    lsq = quantizer(8, "weight", torch.randn(4, 3, 3, 3))
    assert lsq.limits == (-127, 127)
    assert LSQ(8, signed=True).limits == (-128, 127)


def test_the_first_batch_decides_about_the_sign_once():
    lsq = LSQ(4)
    lsq.initialize(torch.randn(8, 8))
    assert lsq.signed is True
    unsigned = LSQ(4)
    unsigned.initialize(torch.rand(8, 8))
    assert unsigned.signed is False
    forced = LSQ(4, signed=True)
    forced.initialize(torch.rand(8, 8))
    assert forced.signed is True


def test_features_are_those_of_one_sample_unless_the_batch_counts():
    x, gradients = torch.rand(8, 3, 4, 4), []
    for count_batch in (False, True):
        lsq = LSQ(4, signed=False, count_batch=count_batch)
        lsq.initialize(x)
        lsq(x).sum().backward()
        gradients.append(lsq.step.grad.item())
    assert gradients[0] == pytest.approx(gradients[1] * math.sqrt(8), rel=1e-5)


def test_a_step_driven_below_zero_neither_negates_nor_divides_by_zero():
    lsq = LSQ(4, signed=True)
    lsq.step.data.fill_(-1.0)
    x = torch.randn(4, 4, requires_grad=True)
    y = lsq(x)
    y.sum().backward()
    assert (y * x >= 0).all()
    assert lsq.step.grad.isfinite()
    assert torch.equal(y.detach(), lsq.grid().values(lsq.codes(x.detach())))


def test_an_all_zero_tensor_initializes_to_something_usable():
    assert initial_step(torch.zeros(5), 7) > 0


def test_rebuilt_from_its_arguments_it_loads_its_state_and_answers_the_same():
    layer = QuantLayer(nn.Conv2d(3, 4, 3), LSQWeight(3), LSQ(3))
    x = torch.randn(2, 3, 8, 8)
    layer.observe(x)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    again = QuantLayer(
        nn.Conv2d(3, 4, 3),
        LSQWeight(weights.bits, weights.per_channel),
        LSQ(inputs.bits, inputs.signed, inputs.count_batch),
    )
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_in_half_precision_the_type_stays_and_codes_move_by_at_most_one():
    x = torch.randn(4, 5, 6, 6)
    lsq = quantizer(4, "activation", x)
    y = lsq(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() / lsq.step - lsq.codes(x)).abs().max() < 1.1
    y.float().sum().backward()
    assert lsq.step.grad.dtype == torch.float32


@pytest.mark.parametrize(("make", "text"), [(lambda: LSQ(9), "9"), (lambda: LSQWeight(1), "2 to 8")])
def test_impossible_bits_are_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()


def test_one_bit_inputs_that_turn_out_signed_are_refused():
    with pytest.raises(UserError, match="2 to 8"):
        LSQ(1).initialize(torch.randn(8))
