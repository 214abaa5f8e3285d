"""EWGS's delta against the official code's Hessians, and as a Method: schedule, state, side effects."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.method import Forward
from galago.quantize.calibration import undisturbed
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.ewgs_delta import EWGSDelta, captured, curvatures, hessian_of, hutchinson, ratio
from galago.quantize.layer import QuantLayer
from galago.tasks.classify import Classify
from galago.testing import check_method
from samples import quantized_tiny_network

PLACES = {
    "c1_weight": "conv1.weight_quantizer",
    "c1_act": "conv1.input_quantizer",
    "c2_weight": "conv2.weight_quantizer",
    "c2_act": "conv2.input_quantizer",
}


class GoldenNet(nn.Module):
    """The network of the golden Hessians."""

    def __init__(self, want: dict[str, Tensor], delta_weight: float, delta_act: float) -> None:
        super().__init__()
        self.conv1 = self.quantized(nn.Conv2d(5, 4, 3, padding=1, bias=False), want, "c1", delta_weight, delta_act)
        self.conv2 = self.quantized(
            nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), want, "c2", delta_weight, delta_act
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.fc.weight.data.copy_(want["fc_weight"])
        self.fc.bias.data.copy_(want["fc_bias"])

    def quantized(self, conv, want, name, delta_weight, delta_act):
        conv.weight.data.copy_(want[f"{name}_weight"])
        layer = QuantLayer(conv, EWGSWeight(2, delta_weight), EWGS(2, delta_act))
        for quantizer, kind in ((layer.weight_quantizer, "W"), (layer.input_quantizer, "A")):
            quantizer.low.data.copy_(want[f"{name}_l{kind}"])
            quantizer.high.data.copy_(want[f"{name}_u{kind}"])
        layer.output_scale.data.copy_(want[f"{name}_output_scale"])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def golden_case(golden):
    """Expected values, the network, a batch.

    The file also has a case `hess_*` with positive traces, but not its input: `hess_x` is that of `hessneg_*` (three
    standard deviations of it are `hessneg_c1_uA`, not `hess_c1_uA`). A brute-force reference stands in for it below.
    """
    arrays = golden("ewgs")
    want = {key.removeprefix("hess_"): value for key, value in arrays.items() if key.startswith("hess_")}
    want |= {key.removeprefix("hessneg_"): value for key, value in arrays.items() if key.startswith("hessneg_")}
    batch = Batch(want["x"], nn.functional.one_hot(want["target"], 3).float())
    return want, GoldenNet(want, float(want["delta_in_w"]), float(want["delta_in_a"])), batch


def gradient_and_hessian(net, batch, path):
    """In units of the rounded values in [0, 1], for one quantizer."""
    with captured(net) as outputs:
        loss = Forward(net, Classify(3))(batch).loss
    (output,) = outputs[path]
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    span = net.get_submodule(path).span
    product = hessian_of(gradient, output)
    return loss, span * gradient, lambda v: span**2 * product(v)


@pytest.mark.parametrize("name", PLACES)
def test_gradient_hessian_and_delta_are_the_official_codes(golden_case, name):
    want, net, batch = golden_case
    loss, gradient, product = gradient_and_hessian(net, batch, PLACES[name])
    assert loss.item() == pytest.approx(want["expected_loss"].item(), rel=1e-5)
    expected = want[f"{name}_expected_grad"]
    torch.testing.assert_close(gradient.detach(), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    for signs, vhv in zip(want[f"{name}_rademacher"], want[f"{name}_expected_vhv"], strict=True):
        assert (signs * product(signs.float())).sum().item() == pytest.approx(vhv.item(), rel=1e-3, abs=1e-4)
    units = torch.eye(gradient.numel()).view(-1, *gradient.shape)
    trace = sum((unit * product(unit)).sum().item() for unit in units)
    assert trace == pytest.approx(want[f"{name}_expected_trace"].item(), rel=1e-3)
    share = trace / gradient.numel() / (3 * gradient.std().item())
    assert share == pytest.approx(want[f"{name}_expected_ratio_unclipped"].item(), rel=1e-3)


def test_the_method_finds_no_delta_where_the_golden_traces_are_negative(golden_case):
    want, net, batch = golden_case
    method = EWGSDelta(every=1, batches=1, draws=100)
    method.epoch(net, 1)
    method.step(batch, Forward(net, Classify(3)))
    for name, path in PLACES.items():
        assert want[f"{name}_expected_delta"] == 0
        assert net.get_submodule(path).delta == 0, name


SHIFT = 0.05  # after which no sum of rounded products lies on a kink: 0, a tie, the end of the next interval


def straight_through_loss(weight: Tensor, x: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """Two quantized products with everything written out plainly; `weight` and `x` are rounded already."""
    middle = (x @ (2 * weight - 1).T + SHIFT).relu() / 3
    rounded = middle.clamp(0, 1) + ((middle.clamp(0, 1) * 3).round() / 3 - middle.clamp(0, 1)).detach()
    return nn.functional.cross_entropy(rounded @ second.T, target)


def test_positive_traces_are_those_of_a_brute_force_hessian():
    """All entries of the Hessian in both rounded tensors, by automatic differentiation of the plain expression."""
    layers = [QuantLayer(nn.Linear(6, 5), EWGSWeight(2), EWGS(2)), EWGS(2), nn.Linear(5, 3, bias=False)]
    nn.init.constant_(layers[0].layer.bias, SHIFT)
    x, target = torch.rand(4, 6), torch.tensor([0, 2, 1, 2])
    layers[0].observe(x)
    net = nn.Sequential(layers[0], nn.ReLU(), *layers[1:]).double()
    net[0].output_scale.data.fill_(1 / 3)
    x = x.double()
    with captured(net) as outputs:
        loss = nn.functional.cross_entropy(net(x), target)
    weight = ((outputs["0.weight_quantizer"][0] + 1) / 2).detach()
    inputs = outputs["0.input_quantizer"][0].detach()
    plain = straight_through_loss(weight, inputs, net[3].weight, target)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for path, at, of in (
        ("0.weight_quantizer", weight, lambda q: straight_through_loss(q, inputs, net[3].weight, target)),
        ("0.input_quantizer", inputs, lambda q: straight_through_loss(weight, q, net[3].weight, target)),
    ):
        hessian = torch.autograd.functional.hessian(of, at).view(at.numel(), at.numel())
        assert hessian.trace() > 0
        output, span = outputs[path][0], net.get_submodule(path).span
        (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
        product = hessian_of(gradient, output)
        for row, unit in zip(hessian, torch.eye(at.numel(), dtype=torch.float64), strict=True):
            found = span**2 * product(unit.view(at.shape))
            torch.testing.assert_close(found.flatten(), row, rtol=1e-9, atol=1e-12)
        (estimate,) = curvatures(loss, [output], draws=2000, tolerance=0.0)
        assert span**2 * estimate.trace == pytest.approx(hessian.trace().item(), rel=0.1)


def test_the_ratio_does_not_depend_on_how_weights_are_centered(golden_case):
    want, net, batch = golden_case
    with captured(net) as outputs:
        loss = Forward(net, Classify(3))(batch).loss
    (output,) = outputs[PLACES["c1_weight"]]
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    found = curvatures(loss, [output], draws=1, tolerance=0.0)[0]
    assert torch.equal(found.gradient, gradient)
    exact = found._replace(trace=float(want["c1_weight_expected_trace"]) / 2.0**2)
    assert ratio(exact, span=2.0) == pytest.approx(want["c1_weight_expected_ratio_unclipped"].item(), rel=1e-3)


def test_hutchinson_is_exact_for_diagonal_and_close_for_other_matrices():
    diagonal = torch.rand(20)
    assert hutchinson(lambda v: diagonal * v, diagonal) == pytest.approx(diagonal.sum().item(), rel=1e-5)
    matrix = torch.randn(20, 20)
    matrix = matrix + matrix.T + 20 * torch.eye(20)
    found = hutchinson(lambda v: matrix @ v, torch.zeros(20), draws=2000, tolerance=0.0)
    assert found == pytest.approx(matrix.trace().item(), rel=0.05)


def test_hutchinson_stops_once_the_mean_settles_and_a_negative_one_stops_no_sooner():
    for sign in (1.0, -1.0):
        asked = []

        def product(v, asked=asked, sign=sign):
            asked.append(v)
            return sign * (1.0 + 0.5 / len(asked)) * v

        hutchinson(product, torch.zeros(8), draws=500)
        assert 5 < len(asked) < 500


@pytest.fixture
def quantized(small_net):
    small_net.conv2 = QuantLayer(small_net.conv2, EWGSWeight(2), EWGS(2))
    small_net.conv2.observe(torch.rand(4, 7, 8, 8))
    return small_net


@pytest.fixture
def batch():
    return Batch(torch.randn(8, 3, 8, 8), nn.functional.one_hot(torch.arange(8) % 2, 2).float())


def run(method, net, batch, epochs, steps):
    inner = Forward(net, Classify(2))
    for epoch in range(epochs):
        method.epoch(net, epoch)
        for _ in range(steps):
            step = method.step(batch, inner)
    return step


def deltas(net):
    return [quantizer.delta.item() for quantizer in (net.conv2.weight_quantizer, net.conv2.input_quantizer)]


def test_the_first_interval_is_straight_through_and_the_second_is_not(quantized, batch):
    method = EWGSDelta(every=2, batches=1)
    run(method, quantized, batch, epochs=2, steps=2)
    assert deltas(quantized) == [0.0, 0.0]
    run(method, quantized, batch, epochs=3, steps=2)
    assert max(deltas(quantized)) > 0


def test_nothing_but_delta_changes_and_the_step_is_the_plain_one(quantized, batch):
    quantized.pool = nn.Sequential(nn.Dropout(0.5), quantized.pool)
    plain = copy.deepcopy(quantized)
    method = EWGSDelta(every=1, batches=2)
    method.epoch(quantized, 1)
    torch.manual_seed(3)
    with_estimate = method.step(batch, Forward(quantized, Classify(2)))
    torch.manual_seed(3)
    without = Forward(plain, Classify(2))(batch)
    assert torch.equal(with_estimate.output, without.output)
    assert all(parameter.grad is None for parameter in quantized.parameters())
    for (name, found), expected in zip(quantized.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_delta_is_clipped_after_averaging_and_never_turns_a_gradient_around(quantized):
    method = EWGSDelta(every=1, batches=2)
    weight, inputs = "conv2.weight_quantizer", "conv2.input_quantizer"
    for sums, expected in (((-1.0, 3.0), [0.0, 1.5]), ((1e6, 0.5), [6.0, 0.25])):
        method.ratios = dict(zip((weight, inputs), sums, strict=True))
        method.settle(quantized)
        assert deltas(quantized) == expected


def test_interrupted_between_its_batches_it_ends_as_if_it_had_not_been(quantized, batch):
    other = copy.deepcopy(quantized)
    method, second = EWGSDelta(every=1, batches=2), EWGSDelta(every=1, batches=2)
    method.epoch(quantized, 1)
    torch.manual_seed(5)
    method.step(batch, Forward(quantized, Classify(2)))
    state, model, random = method.state_dict(), copy.deepcopy(quantized.state_dict()), torch.get_rng_state()
    method.step(batch, Forward(quantized, Classify(2)))
    assert max(deltas(quantized)) > 0
    second.load_state_dict(state)
    other.load_state_dict(model)
    torch.set_rng_state(random)
    second.step(batch, Forward(other, Classify(2)))
    assert deltas(other) == deltas(quantized)


def test_in_a_bfloat16_run_the_estimate_is_that_of_float32(quantized, batch):
    other = copy.deepcopy(quantized)
    for net, autocast in ((quantized, False), (other, True)):
        method = EWGSDelta(every=1, batches=1)
        method.epoch(net, 1)
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            step = method.step(batch, Forward(net, Classify(2)))
    assert step.output.dtype == torch.bfloat16
    assert deltas(other) == deltas(quantized)


def test_a_compiled_network_gives_the_same_estimate(quantized, batch):
    other = copy.deepcopy(quantized)
    other.compile(backend="eager")
    for net in (quantized, other):
        method = EWGSDelta(every=1, batches=1)
        method.epoch(net, 1)
        torch.manual_seed(7)
        method.step(batch, Forward(net, Classify(2)))
    assert deltas(other) == deltas(quantized)


def test_some_images_of_a_batch_can_be_enough(quantized, batch):
    other = copy.deepcopy(quantized)
    for net, given, images in ((quantized, batch, 4), (other, Batch(batch.input[:4], batch.target[:4]), None)):
        method = EWGSDelta(every=1, batches=1, images=images)
        method.epoch(net, 1)
        torch.manual_seed(7)
        assert len(method.step(given, Forward(net, Classify(2))).output) == len(given.input)
    assert deltas(other) == deltas(quantized)


def test_attention_has_second_derivatives_here():
    queries = torch.randn(1, 2, 4, 8, requires_grad=True)
    with undisturbed([]):
        loss = nn.functional.scaled_dot_product_attention(queries, queries, queries).square().sum()
        (found,) = curvatures(loss, [queries], draws=2, tolerance=0.0)
    assert found.trace != 0


def test_buffers_are_put_back_even_after_a_failure(quantized, batch):
    before = copy.deepcopy(quantized.state_dict())
    with pytest.raises(KeyError), undisturbed([quantized]):
        quantized(batch.input)
        raise KeyError
    assert all(torch.equal(before[name], value) for name, value in quantized.state_dict().items())


def test_a_model_without_ewgs_is_refused_in_plain_words(small_net, stripes):
    with pytest.raises(UserError, match="behind Quantize"):
        EWGSDelta().prepare(small_net, stripes)


def test_a_quantized_model_is_left_as_it_is(quantized, stripes):
    assert EWGSDelta().prepare(quantized, stripes) is quantized


@pytest.mark.parametrize("name", ["every", "batches", "images", "draws"])
def test_numbers_below_one_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        EWGSDelta(**{name: 0})


def test_it_obeys_the_laws_of_a_method():
    def estimating():
        method = EWGSDelta(every=1, batches=2, draws=3)
        method.seen = 0
        return method

    check_method(estimating, make_model=lambda: quantized_tiny_network(EWGSWeight(2), EWGS(2)))
