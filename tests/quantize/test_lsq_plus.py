"""LSQ+ against the official code's numbers, LSQ, brute force, and what an integer runtime can hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.laws.integers import convolve
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.learned_step import learned_step
from galago.quantize.lsq import LSQ
from galago.quantize.lsq_plus import LSQPlus, LSQPlusWeight, least_squares_range, rounded_from_offset
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.train import train
from samples import SmallNet, Stripes


def learnable(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def affine(bits, step, offset, signed=False):
    made = LSQPlus(bits, signed)
    made.step.data.fill_(step)
    made.offset.data.fill_(offset)
    return made


@pytest.mark.parametrize("bits", [2, 4])
def test_forward_and_gradients_are_the_official_codes(golden, bits):
    want = {key.removeprefix(f"lsqplus_b{bits}_"): value for key, value in golden("baselines_qat").items()}
    x = want["x"].clone().requires_grad_()
    step, offset = (want[name].reshape(()).clone().requires_grad_() for name in ("step", "offset"))
    y = rounded_from_offset(x, step, offset, int(want["n"]), int(want["p"]))
    y.backward(want["grad_out"])
    torch.testing.assert_close(y.detach(), want["expected_y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, want["expected_grad_x"], rtol=0, atol=1e-5)
    for found, name in ((step.grad, "step"), (offset.grad, "offset")):
        expected = want[f"expected_grad_{name}_unscaled"].reshape(())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().item())


@pytest.mark.parametrize("bits", [2, 4])
def test_the_first_step_of_weights_is_the_papers(golden, bits):
    want = {key.removeprefix(f"lsqplus_b{bits}_"): value for key, value in golden("baselines_qat").items()}
    quantizer = LSQPlusWeight(bits, per_channel=False)
    quantizer.initialize(want["init_weight"])
    torch.testing.assert_close(quantizer.step.detach(), want["expected_init_step_weight"], rtol=1e-5, atol=0)


def test_each_output_channel_of_the_weights_has_its_own_first_step_even_with_a_single_weight():
    weight, quantizer = torch.randn(4, 3, 3, 3) + 0.5, LSQPlusWeight(3)
    quantizer.initialize(weight)
    one = weight[1]
    expected = max((one.mean() - 3 * one.std()).abs(), (one.mean() + 3 * one.std()).abs()) / 4
    assert quantizer.step[1].item() == pytest.approx(expected.item(), rel=1e-6)
    lonely = LSQPlusWeight(4)
    lonely.initialize(torch.tensor([[2.0], [0.0]]))
    assert lonely.step[0] == 0.25
    assert lonely.step.isfinite().all()
    assert (lonely.step > 0).all()


@pytest.mark.parametrize(("low", "high"), [(0, 3), (-8, 7)])
@pytest.mark.parametrize("whole", [True, False])
def test_without_offset_it_is_lsq_bit_for_bit(low, high, whole):
    x, g, results = torch.randn(3, 5, 7, 7), torch.randn(3, 5, 7, 7), []
    x[0, 0] = 0.0  # on a bound
    for run in (
        lambda x, s: learned_step(x, s, low, high, 0.3),
        lambda x, s: rounded_from_offset(x, s, torch.zeros((), requires_grad=True), low, high, 0.3, whole),
    ):
        v, step = x.clone().requires_grad_(), torch.tensor(0.37, requires_grad=True)
        y = run(v, step)
        y.backward(g)
        results.append((y.detach(), v.grad, step.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_the_formula_element_by_element():
    x, g = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    step, offset = learnable(0.3, -0.4)
    v = x.clone().requires_grad_()
    rounded_from_offset(v, step, offset, -1, 6, 0.5).backward(g)
    of_step = of_offset = 0.0
    for value, slope, found in zip(x.tolist(), g.tolist(), v.grad.tolist(), strict=True):
        place = (value + 0.4) / 0.3
        inside = -1 < place < 6
        of_step += slope * (round(place) - place if inside else -1 if place <= -1 else 6)
        of_offset += 0.0 if inside else slope
        assert found == (slope if inside else 0.0)
    assert step.grad.item() == pytest.approx(0.5 * of_step, rel=1e-9)
    assert offset.grad.item() == pytest.approx(0.5 * of_offset, rel=1e-9)


def test_with_a_whole_offset_values_and_gradients_are_those_of_the_rounded_one():
    x, g, results = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64), []
    for beta, whole in ((-0.7, True), (-0.6, False)):
        (step, offset), v = learnable(0.3, beta), x.clone().requires_grad_()
        y = rounded_from_offset(v, step, offset, 0, 7, whole=whole)
        y.backward(g)
        results.append((y.detach(), v.grad, step.grad, offset.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradient_scale_counts_the_features_of_one_sample():
    x, quantizer = torch.rand(8, 3, 4, 4), affine(4, 0.05, 0.0)
    quantizer(x).sum().backward()
    bare = torch.tensor(0.05, requires_grad=True)
    rounded_from_offset(x, bare, torch.zeros(()), 0, 15).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(bare.grad.item() / math.sqrt(48 * 15), rel=1e-5)
    assert quantizer.offset.grad.item() == pytest.approx((x > 0.75).sum().item() / math.sqrt(48 * 15), rel=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [-0.83, 0.0, 0.4, -50.0])
def test_evaluated_values_are_the_grids_and_zero_is_one_of_them(bits, offset):
    x, quantizer = torch.randn(6, 5, 7, 7), affine(bits, 0.31, offset)
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(quantizer.train()(x), y)
    assert torch.equal(quantizer(y), y), "quantizing twice changes values"
    assert quantizer(torch.zeros(1)).item() == 0
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert grid.low <= grid.zero_point <= grid.high
    assert set(codes.unique().tolist()) <= set(range(2**bits))


@pytest.mark.parametrize(("offset", "kept"), [(5.0, 1.0), (-50.0, -1.0), (-0.5, 0.0)])
def test_an_offset_held_at_an_end_keeps_only_the_gradient_that_leads_back(offset, kept):
    """Descent lowers an offset along a positive gradient."""
    x, found = torch.tensor([[-100.0, 100.0]]), []
    for slope in (1.0, -1.0):
        quantizer = affine(4, 0.3, offset)
        (slope * quantizer(x)).sum().backward()
        found.append(quantizer.offset.grad.item())
    assert [bool(gradient) for gradient in found] == [kept >= 0, kept <= 0]
    assert found[0] >= 0 >= found[1]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_first_range_loses_little_more_than_the_best(bits):
    """Against a fine search over both ends, for a Swish, whose error LSQ's own first range exceeds by far."""
    x = nn.functional.silu(2 * torch.randn(16, 8, 8, 8))
    quantizer, high = LSQPlus(bits), 2**bits - 1
    quantizer.initialize(x)
    error, best = (quantizer(x) - x).square().mean().item(), math.inf
    for zero in range(high):
        for step in torch.linspace(0.02, 4, 100):
            rounded = ((x / step).round() + zero).clamp(0, high).sub(zero) * step
            best = min(best, (rounded - x).square().mean().item())
    assert error < 1.1 * best
    lsq = LSQ(bits)
    lsq.initialize(x)
    assert error < 0.7 * (lsq(x) - x).square().mean()


def test_behind_a_relu_no_level_is_spent_on_negative_values():
    quantizer = LSQPlus(4)
    quantizer.initialize(torch.randn(8, 4, 8, 8).relu())
    assert quantizer.grid().zero_point == 0


def test_a_constant_tensor_initializes_to_something_usable():
    step, offset = least_squares_range(torch.zeros(5, 3), 0, 15)
    assert step > 0
    assert offset.isfinite()


@pytest.mark.parametrize("step", [-1.0, 0.0])
def test_a_step_driven_below_zero_neither_negates_nor_divides_by_zero(step):
    quantizer, x = affine(4, step, -0.3), torch.randn(4, 4, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert (y * x >= 0).all()
    for tensor in (y, x.grad, quantizer.step.grad, quantizer.offset.grad):
        assert tensor.isfinite().all()
    assert torch.equal(y.detach(), quantizer.grid().values(quantizer.codes(x.detach())))


def test_padding_with_zero_is_padding_with_the_zero_points_code(golden):
    """What an offset between the levels cannot have: no map of corrections along the borders is needed."""
    want = {key.removeprefix("lsqplus_"): value for key, value in golden("integer_deployment").items()}
    assert not torch.allclose(want["expected_offset_map"], want["expected_offset_map"][..., 2:3, 2:3])
    layer = QuantLayer(nn.Conv2d(3, 4, 3, padding=1, bias=False), LSQPlusWeight(4), LSQPlus(4)).eval()
    x = nn.functional.silu(torch.randn(2, 3, 6, 6))
    layer.observe(x)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert inputs.grid().zero_point > 0
    codes = (inputs.codes(x) - inputs.grid().zero_point).long().numpy()
    kernel = weights.codes(layer.layer.weight.detach()).long().numpy()
    total = torch.from_numpy(convolve(codes, kernel, (1, 1), (1, 1), (1, 1), 1))
    scale = inputs.grid().scale.double() * weights.grid().scale.double().view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), total * scale, rtol=1e-5, atol=1e-5)


def test_rebuilt_from_its_arguments_it_loads_its_state_and_answers_the_same():
    layer, x = QuantLayer(nn.Conv2d(3, 4, 3), LSQPlusWeight(3), LSQPlus(3, signed=True)), torch.randn(2, 3, 8, 8)
    layer.observe(x)
    again = QuantLayer(nn.Conv2d(3, 4, 3), LSQPlusWeight(3), LSQPlus(3, signed=True))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


class SwishNet(SmallNet):
    """The small network with Swish where it has ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2 = nn.SiLU(), nn.SiLU()


def test_a_network_with_swish_trains_exports_and_is_verified(tmp_path):
    data, task = Stripes(batch_size=8), Classify(2)
    methods = [Quantize(LSQPlusWeight(3), LSQPlus(3), stream=MinMax(8))]
    model = train(SwishNet(), task, data, tmp_path, epochs=3, methods=methods)
    used = [module for module in model.modules() if isinstance(module, LSQPlus)]
    assert any(quantizer.grid().zero_point > 0 for quantizer in used)
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize(
    ("make", "text"),
    [(lambda: LSQPlus(9), "9"), (lambda: LSQPlus(1, signed=True), "2 to 8"), (lambda: LSQPlusWeight(1), "2 to 8")],
)
def test_impossible_bits_are_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
