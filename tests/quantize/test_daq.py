"""DAQ against the official code's numbers, the paper's construction step by step, and what leaves as integers."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx, openvino
from galago.deploy.integer_layers import IntegerLayer
from galago.deploy.onnx import lowered
from galago.deploy.runtime import OnnxRuntime
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify
from galago.models.resnet import ResNet
from galago.probe import Deployed
from galago.quantize.daq import (
    DAQ,
    DAQWeight,
    distance_aware_assignment,
    distance_aware_gain,
    distance_aware_round,
    standardized,
)
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.testing import check_quantizer
from galago.trainer import finish

SETTINGS = [(2.0, 1.0), (2.0, 2.0), (4.0, 0.5), (0.3, 3.0), (8.0, 0.2)]


def rounded_level(t: Tensor, steps: int, gamma: float = 2.0, sigma: float = 1.0) -> Tensor:
    """R(t) in closed form: the level's number."""
    low, high = torch.zeros((), dtype=t.dtype), torch.tensor(float(steps), dtype=t.dtype)
    return (distance_aware_round(t, low, high, steps, gamma, sigma, centered=True) + 1) * steps / 2


def brute_force(t: float, gamma: float, sigma: float, controlled: bool = True) -> tuple[float, float]:
    """R and its derivative by a difference quotient, with the temperature held (or not) where it is at t."""

    def scores(f: float) -> list[float]:
        m = [math.exp(-abs(f - q)) for q in (0, 1)]
        nearest = max((0, 1), key=lambda q: math.exp(-abs(f0 - q)))
        return [m[q] * math.exp(-((q - nearest) ** 2) / sigma**2) for q in (0, 1)]

    def assigned(f: float) -> float:
        s = scores(f)
        temperature = gamma / abs(scores(f0)[0] - scores(f0)[1]) if controlled else gamma / abs(s[0] - s[1])
        weights = [math.exp(temperature * (one - max(s))) for one in s]
        beyond = 1 / (math.exp(gamma) - 1)
        return floor + (weights[0] * -beyond + weights[1] * (1 + beyond)) / sum(weights)

    floor, h = math.floor(t), 1e-6
    f0 = t - floor
    return assigned(f0), (assigned(f0 + h) - assigned(f0 - h)) / (2 * h)


def golden_layer(want, prefix=None):
    """The golden convolution, quantized, with the parameters of `prefix` if there is one."""
    conv = nn.Conv2d(5, 6, 3, stride=int(want["layer_stride"]), padding=int(want["layer_padding"]), bias=False)
    conv.weight.data.copy_(want["layer_weight"])
    bits = int(want["layer_bits"])
    gammas, sigmas = ([float(want[f"layer_{name}_{kind}"]) for kind in "wa"] for name in ("gamma", "sigma"))
    layer = QuantLayer(conv, DAQWeight(bits, gammas[0], sigmas[0]), DAQ(bits, gammas[1], sigmas[1]))
    if prefix is not None:
        layer.weight_quantizer.low.data.copy_(want[f"{prefix}_lW"])
        layer.weight_quantizer.high.data.copy_(want[f"{prefix}_uW"])
        layer.input_quantizer.high.data.copy_(want[f"{prefix}_uA"])
        layer.output_scale.data.copy_(want[f"{prefix}_beta"])
    return layer


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_rounding_and_its_gradient_are_the_official_codes(golden, bits, number):
    """Levels, ties and ends included."""
    file = golden("daq")
    want = {key.removeprefix(f"dasr_b{bits}_"): value for key, value in file.items()}
    gamma, sigma, steps = float(file[f"dasr_gamma{number}"]), float(file[f"dasr_sigma{number}"]), 2**bits - 1
    t = want["t"].clone().requires_grad_()
    found = rounded_level(t, steps, gamma, sigma)
    found.backward(want["grad_out"])
    torch.testing.assert_close(found.detach(), want["expected_R"], rtol=0, atol=1e-6)
    expected = want[f"expected_grad_t_{number}"]
    torch.testing.assert_close(t.grad, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert {0.0, 0.5, float(steps)} <= set(want["t"].tolist())


def test_initialization_is_the_official_codes(golden):
    want = golden("daq")
    layer = golden_layer(want)
    layer.observe(want["layer_x"])
    found = {
        "lW": layer.weight_quantizer.low,
        "uW": layer.weight_quantizer.high,
        "uA": layer.input_quantizer.high,
        "beta": layer.output_scale,
    }
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), want[f"init_{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prefix", ["init", "moved"])
def test_output_and_every_gradient_are_the_official_codes(golden, prefix):
    want = golden("daq")
    layer = golden_layer(want, prefix)
    x = want["layer_x"].clone().requires_grad_()
    y = layer(x)
    y.backward(want["layer_grad_out"])
    found = {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weight": layer.layer.weight.grad,
        "grad_lW": layer.weight_quantizer.low.grad,
        "grad_uW": layer.weight_quantizer.high.grad,
        "grad_uA": layer.input_quantizer.high.grad,
        "grad_beta": layer.output_scale.grad,
    }
    for name, value in found.items():
        expected = want[f"{prefix}_expected_{name}"]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    codes = layer.weight_quantizer.codes(layer.layer.weight.detach())
    assert torch.equal(codes, want[f"{prefix}_expected_weight_quantized"].float())
    torch.testing.assert_close(layer.eval()(x), y, rtol=0, atol=0)


@pytest.mark.parametrize(("gamma", "sigma"), SETTINGS)
def test_the_closed_form_is_the_soft_assignment_step_by_step(gamma, sigma):
    levels = torch.arange(0, 4, dtype=torch.float64)
    t = torch.cat([3 * torch.rand(200, dtype=torch.float64), levels, levels[:3] + 0.5])
    soft, hard = t.clone().requires_grad_(), t.clone().requires_grad_()
    literal, closed = distance_aware_assignment(soft, gamma, sigma), rounded_level(hard, 3, gamma, sigma)
    literal.sum().backward()
    closed.sum().backward()
    assert (literal - (t - 0.5).ceil()).abs().max() < 1e-6
    assert torch.equal(closed.detach(), (t - 0.5).ceil())
    torch.testing.assert_close(hard.grad, soft.grad, rtol=1e-9, atol=1e-9)
    for place in (0.2, 1.0001, 1.49, 1.7, 2.51):
        value, slope = brute_force(place, gamma, sigma)
        one = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        rounded_level(one, 3, gamma, sigma).backward()
        assert value == pytest.approx(round(place), abs=1e-6)
        assert one.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_a_temperature_that_is_not_held_leaves_no_gradient():
    for place in (0.2, 0.45, 1.7):
        assert brute_force(place, 2.0, 1.0, controlled=False)[1] == pytest.approx(0, abs=1e-6)
        assert brute_force(place, 2.0, 1.0)[1] > 0.3


def test_the_gain_is_even_around_levels_grows_toward_transitions_and_is_positive():
    distance = torch.linspace(0, 0.5, 51, dtype=torch.float64)
    for gamma, sigma in SETTINGS:
        gain = distance_aware_gain(distance.clone(), gamma, sigma)
        assert (gain > 0).all()
        assert (gain.diff() > 0).all()
        assert gain.isfinite().all()
        t = torch.cat([1 - distance, 1 + distance]).requires_grad_()
        rounded_level(t, 3, gamma, sigma).sum().backward()
        torch.testing.assert_close(t.grad[:51], t.grad[51:])
        torch.testing.assert_close(t.grad[51:], gain)


@pytest.mark.parametrize(("sigma", "ends"), [(1.0, (0.362, 0.597, 0.448)), (2.0, (0.497, 2.217, 0.922))])
def test_the_published_settings_give_these_gains(sigma, ends):
    """On a level, at a transition, and on average."""
    gain = distance_aware_gain(torch.linspace(0, 0.5, 1001), 2.0, sigma)
    assert (gain[0].item(), gain[-1].item(), gain.mean().item()) == pytest.approx(ends, abs=2e-3)


def test_a_narrow_kernel_is_a_scaled_straight_through_estimator():
    distance = torch.linspace(0, 0.5, 11)
    for gamma in (0.5, 2.0, 800.0):
        scale = gamma / 2 / math.sinh(gamma) if gamma < 700 else 0.0
        found = distance_aware_gain(distance.clone(), gamma, sigma=1e-3)
        torch.testing.assert_close(found, torch.full_like(distance, scale))
    torch.testing.assert_close(distance_aware_gain(distance, 1e-6, 1e-3), torch.full((11,), 0.5))


def test_the_ends_of_the_interval_belong_to_it_and_nothing_beyond_does():
    x = torch.tensor([-0.1, 0.0, 1.0, 1.1], requires_grad=True)
    distance_aware_round(x, None, torch.tensor(1.0), 3, 2.0, 1.0).sum().backward()
    at_a_level = distance_aware_gain(torch.zeros(()), 2.0, 1.0).item()
    assert x.grad.tolist() == pytest.approx([0.0, at_a_level, at_a_level, 0.0])


@pytest.mark.parametrize("learned_low", [True, False])
def test_gradients_of_the_bounds_are_those_of_the_construction(learned_low):
    """Against automatic differentiation of all of it in float64, where nothing lies on a bound."""
    x, g = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    low, high = torch.tensor(-0.7, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    ours = [tensor.clone().requires_grad_() for tensor in (x, low, high)]
    theirs = [tensor.clone().requires_grad_() for tensor in (x, low, high)]
    distance_aware_round(ours[0], ours[1] if learned_low else None, ours[2], 7, 2.0, 2.0, learned_low).backward(g)
    zero = theirs[1] if learned_low else 0 * theirs[1]
    place = (7 * (theirs[0] - zero) / (theirs[2] - zero)).clamp(0, 7)
    level = distance_aware_assignment(place, 2.0, 2.0) / 7
    (2 * level - 1 if learned_low else level).backward(g)
    assert learned_low or ours[1].grad is None
    for one, other in zip(ours, theirs, strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_a_gradient_can_be_differentiated_once_more():
    x, high = torch.rand(40, dtype=torch.float64, requires_grad=True), torch.tensor(0.8, dtype=torch.float64)
    y = distance_aware_round(x, None, high.requires_grad_(), 3, 2.0, 2.0)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    slope = torch.autograd.grad(distance_aware_round(x, None, high, 3, 2.0, 2.0).sum(), x)[0]
    torch.testing.assert_close(second, 2 * slope**2)  # the gain itself is a constant


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [DAQ, DAQWeight])
def test_what_trains_is_what_is_evaluated_and_the_grids_values_of_the_codes(bits, kind):
    x = torch.randn(6, 5, 7, 7)
    quantizer = kind(bits)
    quantizer.initialize(x)
    if kind is DAQWeight:
        quantizer.low.data.fill_(-1.1)
        quantizer.high.data.fill_(1.7)
    x = 2 * x + 0.3  # beyond both ends
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(quantizer.train()(x), y)
    assert set(codes.unique().tolist()) <= set(range(grid.low, grid.high + 1, grid.step))
    assert codes.unique().numel() <= 2**bits
    assert y.min().item() == pytest.approx(0 if kind is DAQ else -1)
    assert y.max().item() == pytest.approx(1)


def test_at_one_bit_weights_are_plus_or_minus_one_and_inputs_zero_or_one():
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3), DAQWeight(1), DAQ(1)), torch.randn(4, 5, 9, 9).relu()
    layer.observe(x)
    assert layer.weight_quantizer(layer.layer.weight).unique().tolist() == [-1, 1]
    assert layer.input_quantizer(x).unique().tolist() == [0, 1]


def test_at_one_bit_the_threshold_lies_in_the_middle_of_the_learned_bounds():
    quantizer, weight = DAQWeight(1), torch.randn(500)
    quantizer.low.data.fill_(-2.5)
    quantizer.high.data.fill_(2.9)
    place = (weight - weight.mean()) / weight.std()
    assert torch.equal(quantizer(weight) > 0, place > 0.2)


def test_weights_halfway_go_down_and_inputs_to_even_in_training_evaluation_and_codes():
    weights, inputs = DAQWeight(2), DAQ(2)
    inputs.high.data.fill_(3.0)
    halves = torch.tensor([0.5, 1.5, 2.5])
    assert rounded_level(halves, 3).round().tolist() == [0, 1, 2]
    assert (3 * inputs(halves)).round().tolist() == inputs.codes(halves).tolist() == [0, 2, 2]
    middle = torch.tensor([-1.0, 0.0, 1.0])  # its mean lies halfway between codes -1 and 1
    for mode in (True, False):
        assert (3 * weights.train(mode)(middle)).round().tolist() == weights.codes(middle).tolist() == [-1, -1, 1]
    assert DAQ(1)(halves[:1]).item() == rounded_level(halves[:1], 1).item() == 0


def test_weights_are_standardized_by_constants():
    weight, g = torch.randn(6, 5, 3, 3) * 0.2 + 0.1, torch.randn(6, 5, 3, 3)
    weight.requires_grad_()
    found = standardized(weight)
    found.backward(g)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std().item() == pytest.approx(1)
    torch.testing.assert_close(weight.grad, g / weight.detach().std())


def test_codes_do_not_depend_on_the_size_of_weights_nor_on_their_mean():
    quantizer, weight = DAQWeight(3), torch.randn(6, 5, 3, 3, dtype=torch.float64)
    assert torch.equal(quantizer.codes(weight), quantizer.codes(0.02 * weight + 7))


def test_weights_of_double_precision_get_the_codes_that_their_floats_get():
    """So that a network verified in float64 is the one that was exported."""
    quantizer, weight = DAQWeight(4), torch.randn(64, 64, 3, 3)
    codes, grid = quantizer.codes(weight), quantizer.grid()
    double = copy.deepcopy(quantizer).double()(weight.double())
    assert double.dtype == torch.float64
    assert torch.equal((double / grid.scale).round().float(), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_weights_encoder_names_the_nearest_code_of_the_grid(bits):
    weight, quantizer = torch.randn(400), DAQWeight(bits)
    encoder, grid = quantizer.encoder(), quantizer.grid()
    places = ((standardized(weight) - encoder.offset) / encoder.scale).clamp(grid.low, grid.high)
    assert (places - quantizer.codes(weight)).abs().max() <= grid.step / 2 + 1e-3


def test_eight_bit_weights_have_a_zero_and_fit_a_byte():
    grid = DAQWeight(8).grid()
    assert (grid.step, grid.low, grid.high) == (1, -127, 127)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_integers_times_one_factor_reproduce_the_layer(bits):
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3, bias=False), DAQWeight(bits), DAQ(bits)), torch.randn(4, 5, 9, 9).relu()
    layer.observe(x)
    layer.output_scale.data.neg_()  # only its size counts
    weights, inputs, steps = layer.weight_quantizer, layer.input_quantizer, 2**bits - 1
    codes = nn.functional.conv2d(inputs.codes(x).double(), weights.codes(layer.layer.weight.detach()).double())
    factor = layer.output_scale.detach().abs().double() / steps**2
    torch.testing.assert_close(layer.eval()(x).double(), codes * factor, rtol=1e-5, atol=1e-5)


def test_one_bit_obeys_the_laws_too():
    """Other bits with all quantizers, in `test_quantizer_laws`; the engines' part is below."""
    check_quantizer(lambda: DAQ(1), deployable=False)
    check_quantizer(lambda: DAQWeight(1), for_weights=True, deployable=False)


def trained(bits: int) -> Deployed:
    """A small residual network that tells three colors apart: DAQ inside, 8 bits at the edges and between."""
    edges = {"edge_weight": MinMaxWeight(), "edge_input": MinMax(), "stream": MinMax()}
    data = TinyImages(batch_size=16)
    trial = Trial(
        lambda: ResNet([1, 1], [7, 9], classes=3),
        classify(),
        data,
        lambda: [Quantize(DAQWeight(bits), DAQ(bits), **edges)],
    )
    losses = [trial.step(number % 3).loss.item() for number in range(30)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    return Deployed(finish(trial.learner), data.normalize, classify()).eval()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_trained_network_leaves_as_integers_that_engines_compute(tmp_path, bits):
    whole, data = trained(bits), TinyImages()
    files = {"onnxruntime": tmp_path / "model.onnx"} | ({"openvino": tmp_path / "model.xml"} if bits == 1 else {})
    onnx.export(whole, data.example(), files["onnxruntime"])
    if bits == 1:
        openvino.export(whole, data.example(), files["openvino"])
    outcome = compare(whole, files, Parts(classify(), data, ()), images=48)
    for name in ("integer", *files):
        assert outcome[name]["passed"], (name, outcome[name]["first_diverging"])
    layers = [part for part in lowered(whole, data.example()).network.modules() if isinstance(part, IntegerLayer)]
    assert Counter(layer.bits for layer in layers) == {bits: 4, 8: 2}
    kinds = Counter(operation.kind for operation in OnnxRuntime(files["onnxruntime"]).operations())
    assert kinds["QLinearConv"] == 5
    assert not kinds["Conv"] + kinds["FusedConv"]


def test_collapsed_ranges_and_constant_weights_stay_finite():
    quantizer = DAQ(4)
    quantizer.initialize(torch.zeros(10))
    assert quantizer(torch.zeros(10)).isfinite().all()
    quantizer.high.data.fill_(-1.0)
    x = torch.randn(10, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert quantizer.high.grad.isfinite()
    for weight in (torch.full((4, 4), 0.3), torch.ones(1)):
        assert DAQWeight(2)(weight).isfinite().all()


def test_ranges_learn_slowly_and_do_not_decay():
    assert DAQ().own_rates() == (0.1, 0.0)
    assert QuantLayer(nn.Linear(2, 2), DAQWeight(learning_rate_factor=0.5)).own_rates() == (0.5, 0.0)


def test_rebuilt_from_its_state_a_layer_answers_the_same():
    layer, x = QuantLayer(nn.Conv2d(3, 4, 3), DAQWeight(2), DAQ(2)), torch.randn(2, 3, 8, 8).relu()
    layer.observe(x)
    layer.weight_quantizer.low.data.fill_(-1.3)
    again = QuantLayer(nn.Conv2d(3, 4, 3), DAQWeight(2), DAQ(2))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", [DAQ, DAQWeight])
def test_in_half_precision_the_type_stays_and_ranges_learn_in_full(kind):
    x, quantizer = torch.randn(6, 5, 7, 7), kind(4)
    quantizer.initialize(x)
    y = quantizer(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert quantizer.high.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 9}, "bits is 9, .* 1 to 8"), ({"gamma": 0.0}, "gamma is 0.0, .* positive"), ({"sigma": -1.0}, "sigma")],
)
def test_impossible_arguments_are_refused_in_plain_words(arguments, message):
    with pytest.raises(UserError, match=message):
        DAQWeight(**arguments)
