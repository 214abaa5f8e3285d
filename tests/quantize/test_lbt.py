"""LBT against the official code's numbers, the paper's formulas and claims, and the promises of its quantizers."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

from galago.errors import UserError
from galago.probes.gradient_error import gradient_errors
from galago.quantize import gradient_quantizer
from galago.quantize.gradient_quantizer import (
    OFF,
    GradientQuantizer,
    QuantGradient,
    largest_code,
    noise_like,
    quantized_gradient,
    stochastically_rounded,
)
from galago.quantize.layer import QuantLayer
from galago.quantize.lbt import LBT, AdaptiveInterval, FixedInterval, LBTWeight, first_gamma, learned_bound

FORWARD = [(bits, kind) for bits in (2, 4) for kind in ("unsigned", "signed")]


def part(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden("lbt").items() if key.startswith(prefix)}


def near(found, expected, relative=1e-5):
    torch.testing.assert_close(
        found.detach(), expected, rtol=0, atol=relative * max(1.0, expected.abs().max().item()), check_dtype=False
    )


def golden_layer(want, bits, stride):
    conv = nn.Conv2d(4, 5, 3, stride=stride, padding=1, bias=False)
    conv.weight.data.copy_(want["weight"])
    return QuantLayer(conv, LBTWeight(bits), LBT(bits))


@pytest.mark.parametrize(("bits", "kind"), FORWARD)
def test_bounds_start_where_the_official_codes_do(golden, bits, kind):
    want = part(golden, f"fwd_b{bits}_{kind}_")
    layer = golden_layer(want, bits, 2)
    layer.observe(want["x"])
    assert layer.input_quantizer.signed is (kind == "signed")
    near(layer.weight_quantizer.bound, want["init_s_w"])
    near(layer.input_quantizer.bound, want["init_u_a"])


@pytest.mark.parametrize(("bits", "kind"), FORWARD)
def test_forward_and_every_gradient_are_the_official_codes(golden, bits, kind):
    want = part(golden, f"fwd_b{bits}_{kind}_")
    layer = golden_layer(want, bits, 2)
    layer.observe(want["x"])
    layer.weight_quantizer.bound.data.copy_(want["s_w"])
    layer.input_quantizer.bound.data.copy_(want["u_a"])
    near(layer.weight_quantizer(layer.layer.weight), want["expected_weight_q"])
    near(layer.input_quantizer(want["x"]), want["expected_x_q"])
    x = want["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(want["grad_out"])
    near(y, want["expected_y"])
    near(x.grad, want["expected_grad_x"])
    near(layer.layer.weight.grad, want["expected_grad_weight"])
    near(layer.weight_quantizer.bound.grad, want["expected_grad_s_w"])
    near(layer.input_quantizer.bound.grad, want["expected_grad_u_a"])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("number", [0, 1])
def test_the_gradient_quantizer_is_the_official_codes(golden, monkeypatch, bits, number):
    want = part(golden, f"gradq_b{bits}_{number}_")
    given = want["G"].clone()
    monkeypatch.setattr(gradient_quantizer, "noise_like", lambda x: want["U"])
    found, share, usable = quantized_gradient(given, want["gamma"], bits)
    torch.testing.assert_close(found, want["expected_Gq"], rtol=0, atol=1e-6 * given.abs().max().item())
    assert share.item() == pytest.approx(want["expected_ratio"].item(), abs=1e-7)
    assert usable
    assert torch.equal(given, want["G"]), "the gradient that arrives may be somebody else's too"


def test_a_whole_layer_is_the_official_codes(golden, monkeypatch):
    want = part(golden, "layer_")
    monkeypatch.setattr(gradient_quantizer, "noise_like", lambda x: want["U"])
    layer = golden_layer(want, int(want["bits_w"]), 1)
    layer.observe(want["x"])
    layer.weight_quantizer.bound.data.copy_(want["s_w"])
    layer.input_quantizer.bound.data.copy_(want["u_a"])
    quant = QuantGradient(layer, FixedInterval(int(want["bits_g"]), float(want["gamma"])))
    x = want["x"].clone().requires_grad_()
    y = quant(x)
    y.retain_grad()
    y.backward(want["grad_out"])
    near(y, want["expected_y"])
    assert torch.equal(y.grad, want["grad_out"])
    near(x.grad, want["expected_grad_x"])
    near(layer.layer.weight.grad, want["expected_grad_weight"])
    near(layer.weight_quantizer.bound.grad, want["expected_grad_s_w"])
    near(layer.input_quantizer.bound.grad, want["expected_grad_u_a"])


def follow(quantizer, gradient):
    """One step in which this gradient arrives; the quantized one."""
    y = torch.zeros_like(gradient, requires_grad=True)
    quantizer(y).backward(gradient)
    quantizer.adapt()
    return y.grad


def test_gamma_starts_and_moves_as_the_official_codes_does(golden):
    want = part(golden, "update_")
    quantizer = AdaptiveInterval(int(want["bits_g"]), float(want["alpha"]))
    quantizer.start(want["G"][0])
    assert quantizer.gamma.item() == pytest.approx(1 - 1e-3 * (int(want["expected_init_iterations"]) - 2), abs=1e-4)
    found = [quantizer.gamma.item()]
    for gradient in want["G"][1:]:
        follow(quantizer, gradient)
        found.append(quantizer.gamma.item())
    np.testing.assert_allclose(found, want["expected_gamma"].numpy(), atol=1e-4)


def test_gamma_starts_where_the_loop_written_out_plainly_stops():
    gradient, target = torch.distributions.StudentT(3.0).sample((4000,)).double(), 0.004
    gamma, average, largest = 1.0, 0.0, gradient.abs().max()
    while True:
        average = 0.999 * average + 0.001 * (gradient.abs() > gamma * largest).double().mean().item()
        gamma += 1e-3 if average > target else -1e-3
        if average > target:
            break
    assert first_gamma(gradient, target) == pytest.approx(gamma, abs=1e-9)
    assert first_gamma(gradient.eq(gradient.max()).double(), 0.5) == 1e-3  # would go on below zero


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_lie_on_symmetric_levels_zero_among_them(bits):
    gradient, gamma = torch.randn(20_000), torch.tensor(0.4)
    found, _, _ = quantized_gradient(gradient, gamma, bits)
    codes = found.double() / (0.4 * gradient.abs().max().double() / largest_code(bits))
    assert (codes - codes.round()).abs().max() < 1e-4
    levels = set(codes.round().int().tolist())
    assert 0 in levels
    assert len(levels) <= 2**bits - 1
    assert max(levels) == -min(levels) == largest_code(bits)
    assert not quantized_gradient(torch.zeros(9), gamma, bits)[0].any()


def test_zero_stays_zero_so_that_what_a_rectifier_stopped_stays_stopped():
    gradient = torch.randn(50_000).relu()
    found, _, _ = quantized_gradient(gradient, torch.tensor(1.0), 4)
    assert not found[gradient == 0].any()


def test_rounding_is_unbiased_inside_the_interval_and_clips_beyond_it():
    draws, bound = 4000, torch.tensor(1.0)
    step = bound / largest_code(3)
    gradient = torch.linspace(-1 + step.item() / 2, 1 - step.item() / 2, 41)
    repeated = gradient.expand(draws, -1)
    found = stochastically_rounded(repeated, bound, 3, noise_like(repeated))
    spread = found.std(0) / draws**0.5
    assert ((found.mean(0) - gradient).abs() <= 4.5 * spread + 1e-6).all()
    assert ((found - repeated).abs() < step + 1e-6).all()
    far = torch.tensor([[-3.0, 3.0]]).expand(100, -1)
    assert torch.equal(stochastically_rounded(far, bound, 3, noise_like(far)), far / 3)


def test_noise_is_uniform_uncorrelated_new_each_time_and_of_the_processs_generator():
    like = torch.empty(16, 128, 256)
    torch.manual_seed(1)
    first, second = noise_like(like), noise_like(like)
    torch.manual_seed(1)
    assert torch.equal(noise_like(like), first)
    assert -0.5 <= first.min() < -0.499 < 0.499 < first.max() < 0.5
    counts = torch.histc(first, 512, -0.5, 0.5)
    assert 0.7 < ((counts - counts.mean()) ** 2 / counts.mean()).mean() < 1.3  # chi squared, a degree of freedom
    pairs = [(first, second), *((first.roll(by), first) for by in (1, 2, 256, 128 * 256))]
    for one, other in pairs:
        assert abs(12 * (one * other).mean()) < 5 / like.numel() ** 0.5
    assert noise_like(like.double()).dtype == torch.float64


def test_clipping_before_the_noise_would_be_biased_and_is_not_what_happens():
    """Just below the bound the noise may push a value beyond it; only then is it clipped."""
    value = torch.full((1,), 0.9)
    found = {stochastically_rounded(value, torch.tensor(1.0), 2, torch.tensor([u])).item() for u in (-0.49, 0.0, 0.49)}
    assert found == {0.0, 1.0}


def test_both_products_of_the_backward_pass_are_integer_products():
    """∂L/∂x and ∂L/∂W of a layer, from int64 codes and one scale each, against automatic differentiation."""
    layer = QuantLayer(nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), LBTWeight(4), LBT(4)).double()
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64).relu()
    layer.observe(x)
    layer.double()
    layer.weight_quantizer.bound.data.fill_(10.0)  # nothing is clipped, so that no mask hides an element
    layer.input_quantizer.bound.data.fill_(10.0)
    quant = QuantGradient(layer, FixedInterval(4, 0.5)).double()
    arrived, x = torch.randn(3, 5, 5, 5, dtype=torch.float64), x.requires_grad_()
    torch.manual_seed(1)
    quant(x).backward(arrived)
    torch.manual_seed(1)
    rounded, _, _ = quantized_gradient(arrived, quant.gradient_quantizer.gamma, 4)
    step = 0.5 * arrived.abs().max() / largest_code(4)
    codes = (rounded / step).round().long()
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    weight_codes = (weight(layer.layer.weight) / weight.grid().scale).round().detach().long()
    input_codes = (inputs(x) / inputs.grid().scale).round().detach().long()
    for found, wanted, scale in (
        (conv2d_input(x.shape, weight_codes.double(), codes.double(), 2, 1), x.grad, step * weight.grid().scale),
        (
            conv2d_weight(input_codes.double(), weight_codes.shape, codes.double(), 2, 1),
            layer.layer.weight.grad,
            step * inputs.grid().scale,
        ),
    ):
        assert torch.equal(found, found.round())
        torch.testing.assert_close(found * scale, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("make", [lambda bits: AdaptiveInterval(bits), lambda bits: FixedInterval(bits, 0.5)])
def test_the_forward_pass_is_untouched_and_32_bits_leave_gradients_alone(make):
    x, g = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
    plain = nn.Conv2d(3, 5, 3, padding=1)
    plain(x).backward(g)
    for bits, exact in ((4, False), (OFF, True)):
        layer = copy.deepcopy(plain)
        layer.zero_grad()
        quant = QuantGradient(layer, make(bits))
        y = quant(x)
        y.backward(g)
        assert torch.equal(y, plain(x))
        assert torch.equal(layer.weight.grad, plain.weight.grad) is exact
        assert quant.eval()(x).equal(y)
    assert quant.stride == plain.stride


def test_the_bias_has_the_rounded_gradient_and_what_follows_the_layer_the_true_one():
    layer, norm, x = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), torch.randn(4, 3, 6, 6)
    quant, seen = QuantGradient(layer, FixedInterval(3)), []
    quant.gradient_quantizer.register_forward_hook(lambda m, i, y: y.register_hook(seen.append) and None)
    torch.manual_seed(2)
    norm(quant(x)).square().sum().backward()
    (arrived,) = seen
    torch.manual_seed(2)
    rounded, _, _ = quantized_gradient(arrived, torch.ones(()), 3)
    torch.testing.assert_close(layer.bias.grad, rounded.sum((0, 2, 3)))
    twin = copy.deepcopy(norm)
    twin.zero_grad()
    twin(layer(x)).square().sum().backward()
    assert torch.equal(twin.weight.grad, norm.weight.grad)


def test_gamma_settles_where_half_of_the_steps_clip_more_than_wanted():
    quantizer, drawn = AdaptiveInterval(4), torch.distributions.StudentT(3.0).sample((100, 50_000))
    quantizer.start(drawn[0])
    excess, gammas = [], []
    for number in torch.randint(100, (800,)):
        gradient = drawn[number]
        excess.append((gradient.abs() > quantizer.gamma * gradient.abs().max()).float().mean() > quantizer.target)
        follow(quantizer, gradient)
        gammas.append(quantizer.gamma.item())
    assert max(abs(a - b) for a, b in pairwise(gammas)) <= 1e-3 + 1e-6
    later = torch.stack(excess[400:]).float().mean().item()
    assert 0.35 < later < 0.65
    assert 0.1 < np.mean(gammas[400:]) < 0.7


def test_more_clipped_widens_less_narrows_and_neither_leaves_the_interval():
    quantizer, gradient = AdaptiveInterval(4, alpha=0.15), torch.linspace(-1, 1, 1000)  # wanted: 0.01 clipped
    for start, expected in ((0.9, 0.901), (0.999, 0.998), (1e-3, 2e-3)):
        quantizer.gamma.fill_(start)
        follow(quantizer, gradient)
        assert quantizer.gamma.item() == pytest.approx(expected)
    quantizer.gamma.fill_(1.0)
    quantizer.follow(torch.tensor(0.1))
    assert quantizer.gamma == 1
    quantizer.follow(torch.tensor(0.0))
    assert quantizer.gamma == 1


def test_gradients_of_another_size_give_the_same_interval():
    gradient = torch.distributions.StudentT(3.0).sample((9000,))
    found = []
    for scale in (1.0, 2.0**-20, 2.0**10):  # loss scaling
        quantizer = AdaptiveInterval(4, alpha=0.1)
        quantizer.start(scale * gradient)
        follow(quantizer, scale * gradient)
        found.append(quantizer.gamma.item())
    assert found[0] == found[1] == found[2] < 1


def test_gradients_that_are_zero_or_not_finite_leave_gamma_alone():
    for gradient in (torch.zeros(5, 5), torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("nan")])):
        quantizer = AdaptiveInterval(4)
        quantizer.gamma.fill_(0.5)
        quantizer.start(gradient)
        follow(quantizer, gradient)
        assert quantizer.gamma == 0.5


def test_accumulated_batches_and_processes_are_averaged():
    """Two backward passes in a step, one clipping far too much and one a little too little: the interval widens."""
    quantizer = AdaptiveInterval(4, alpha=0.15)
    quantizer.gamma.fill_(0.5)
    for gradient in (torch.linspace(-1, 1, 1000), torch.eye(40).flatten()):
        y = torch.zeros_like(gradient, requires_grad=True)
        quantizer(y).backward(gradient)
        shares = (gradient.abs() > 0.5 * gradient.abs().max()).float().mean() - quantizer.target
    assert shares > 0
    quantizer.adapt()
    assert quantizer.gamma > 0.5
    assert quantizer.report.grad is None, "the optimizer would move it"
    quantizer.adapt()  # nothing arrived since
    assert quantizer.gamma == pytest.approx(0.501)


def test_large_gradients_are_served_by_the_papers_condition_and_not_by_the_least_error_of_all():
    gradient = torch.distributions.StudentT(3.0).sample((400_000,))
    size, target = gradient.abs(), 1e-3 / 15
    condition = size.topk(round(target * size.numel())).values[-1] / size.max()

    def errors(gamma):
        rounded, _, _ = quantized_gradient(gradient, torch.as_tensor(gamma), 4)
        return gradient_errors(gradient, rounded, 1e-3)

    tried = {gamma: errors(gamma) for gamma in (0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5)}
    least = min(tried, key=lambda gamma: tried[gamma][0])
    assert errors(condition)[1] < 0.5 * tried[least][1]
    assert errors(condition)[1] < 0.9 * errors(1.0)[1]
    assert tried[least][0] < errors(condition)[0] < errors(1.0)[0]


def test_compiled_a_step_gives_the_same_gradients_and_the_same_report():
    layer = QuantLayer(nn.Conv2d(5, 6, 3), LBTWeight(4), LBT(4))
    x = torch.randn(3, 5, 8, 8).relu()
    layer.observe(x)
    net = nn.Sequential(QuantGradient(layer, AdaptiveInterval(4, alpha=0.2)), nn.ReLU(inplace=True))
    net[0].gradient_quantizer.gamma.fill_(0.5)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for run in (net, compiled):
        torch.manual_seed(4)
        run(x).square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    assert net[0].gradient_quantizer.report.grad != 0
    for one in (net, twin):
        one[0].gradient_quantizer.adapt()
    assert torch.equal(net[0].gradient_quantizer.gamma, twin[0].gradient_quantizer.gamma)


def test_large_tensors_in_blocks_and_channels_last_are_rounded_alike(monkeypatch):
    monkeypatch.setattr(gradient_quantizer, "noise_like", lambda x: torch.zeros_like(x))
    gradient = torch.randn(40, 64, 16, 16)
    gamma = torch.tensor(0.3)
    found, share, _ = quantized_gradient(gradient.to(memory_format=torch.channels_last), gamma, 4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    bound = 0.3 * gradient.abs().max()
    assert torch.equal(found, stochastically_rounded(gradient, bound, 4, torch.zeros_like(gradient)))
    assert share == (gradient.abs() > bound).float().mean()


def test_in_bfloat16_the_type_stays_and_the_report_is_exact():
    quantizer, y = AdaptiveInterval(4), torch.zeros(100, dtype=torch.bfloat16, requires_grad=True)
    quantizer.gamma.fill_(0.5)
    quantizer(y).backward(torch.linspace(-1, 1, 100).bfloat16())
    assert y.grad.dtype == torch.bfloat16
    assert quantizer.report.grad.item() == pytest.approx((0.5 - quantizer.target) * 2**-20, rel=1e-5)


def test_a_backward_pass_that_is_differentiated_again_is_not_rounded():
    x = torch.randn(8, requires_grad=True)
    (first,) = torch.autograd.grad(AdaptiveInterval(2)(x * x).pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 4 * x**3)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 12 * x**2)


def test_the_bounds_gradient_is_automatic_differentiations_where_nothing_is_rounded_away():
    """With the rounding passed straight through, in float64, and no value on an end."""
    v, g = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    ours = [t.clone().requires_grad_() for t in (v, torch.tensor(1.3, dtype=torch.float64))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    learned_bound(*ours, -7, 7).backward(g)
    scaled = (7 * theirs[0] / theirs[1]).clamp(-7, 7)
    (theirs[1] / 7 * (scaled + (scaled.round() - scaled).detach())).backward(g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_ends_belong_to_the_interval_so_that_zeros_behind_a_rectifier_learn():
    v = torch.tensor([-0.1, 0.0, 0.7, 1.0, 1.1], requires_grad=True)
    learned_bound(v, torch.tensor(1.0), 0, 15).sum().backward()
    assert v.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_bound_driven_below_zero_does_not_negate_the_layer():
    weight, quantizer = torch.randn(4, 3, 3, 3, requires_grad=True), LBTWeight(4)
    quantizer.bound.data.fill_(-2.0)
    y = quantizer(weight)
    assert (y * weight >= 0).all()
    y.backward(weight.sign())
    positive = LBTWeight(4)
    positive.bound.data.fill_(2.0)
    positive(weight).backward(weight.sign())
    assert quantizer.bound.grad == -positive.bound.grad


def test_impossible_arguments_are_refused_by_name():
    for make, text in (
        (lambda: LBT(9), "bits is 9"),
        (lambda: LBTWeight(1), "2 to 8"),
        (lambda: AdaptiveInterval(1), "bits is 1"),
        (lambda: AdaptiveInterval(4, alpha=0.0), "alpha is 0"),
        (lambda: AdaptiveInterval(4, rate=1.0), "rate is 1"),
        (lambda: FixedInterval(4, share=1.5), "share is 1.5"),
        (lambda: LBT(1).initialize(torch.randn(9)), "2 to 8"),
    ):
        with pytest.raises(UserError, match=text):
            make()


def test_all_of_the_interval_is_min_max():
    gradient = torch.randn(5000)
    quantizer: GradientQuantizer = FixedInterval(4)
    for _ in range(3):
        found = follow(quantizer, gradient)
    assert found.abs().max() <= gradient.abs().max()
    assert ((found - gradient).abs() <= gradient.abs().max() / 7).all()
    assert quantizer.gamma == 1
