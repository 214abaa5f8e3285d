"""PACT and SAWB against brute force, the published moments' rule, and the promises of a quantizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax
from galago.quantize.pact import COEFFICIENTS, PACT, SAWBWeight, learned_clip, statistics_aware_end
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.train import train
from galago.trainer import Learner
from samples import SmallNet, Stripes


def clipping_at(alpha, bits=4):
    quantizer = PACT(bits)
    quantizer.alpha.data.fill_(alpha)
    return quantizer


@pytest.mark.parametrize("bits", [2, 4])
def test_forward_and_gradients_are_the_brute_force_ones(golden, bits):
    want = {key.removeprefix(f"pact_b{bits}_"): value for key, value in golden("baselines_qat").items()}
    x, alpha = (want[name].clone().requires_grad_() for name in ("x", "alpha"))
    y = learned_clip(x, alpha, 2**bits - 1)
    y.backward(want["grad_out"])
    found = {"y": y.detach(), "grad_x": x.grad, "grad_alpha": alpha.grad}
    for name, value in found.items():
        torch.testing.assert_close(value, want[f"expected_{name}"], rtol=1e-10, atol=1e-12)


def test_alphas_gradient_is_the_sum_over_what_is_clipped_from_above():
    x, g, quantizer = 3 * torch.randn(4, 5, 6, 6), torch.randn(4, 5, 6, 6), clipping_at(1.7)
    quantizer(x).backward(g)
    assert quantizer.alpha.grad.item() == pytest.approx(g[x >= 1.7].double().sum().item(), abs=1e-4)


def test_exactly_on_the_bounds_zero_and_alpha_count_as_clipped():
    alpha = torch.tensor(1.7, requires_grad=True)
    near = torch.nextafter(alpha.detach(), torch.tensor(0.0)).item()
    x = torch.tensor([-1.0, 0.0, 1e-20, 0.3, near, alpha.item(), 2.0], requires_grad=True)
    learned_clip(x, alpha, 15).backward(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 16.0, 32.0]))
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert alpha.grad == 48


def test_clipping_far_above_everything_changes_nothing_by_more_than_half_a_step():
    x, quantizer = 5 * torch.rand(1000), clipping_at(100.0, bits=8)
    assert (quantizer(x) - x).abs().max() <= 100 / 255 / 2 * (1 + 1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [PACT, SAWBWeight])
def test_evaluated_values_are_the_grids_values_of_the_codes(bits, kind):
    x, quantizer = 2 * torch.randn(6, 5, 7, 7), kind(bits)
    quantizer.initialize(x)
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(quantizer.train()(x), y)
    assert set(codes.unique().tolist()) <= set(range(grid.low, grid.high + 1, grid.step))
    assert codes.unique().numel() <= 2**bits
    assert grid.high <= (255 if kind is PACT else 127)
    if kind is PACT:
        assert torch.equal(quantizer(y), y), "quantizing twice changes values"


def test_alpha_decays_like_the_weights_unless_told_otherwise():
    assert PACT().own_rates() == (1.0, None)
    assert PACT(weight_decay=0.01).own_rates() == (1.0, 0.01)
    layer = QuantLayer(nn.Linear(3, 2), SAWBWeight(), PACT(weight_decay=0.01))
    learner = Learner(layer, Classify(2), [], nn.Identity())
    groups = {id(p): group for group in learner.parameter_groups() for p in group["params"]}
    assert groups[id(layer.input_quantizer.alpha)]["weight_decay"] == 0.01
    assert "weight_decay" not in groups[id(layer.layer.weight)]


def test_without_clipped_values_only_decay_moves_alpha_and_it_shrinks():
    quantizer, x = clipping_at(9.0), torch.rand(20, 5)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1, weight_decay=0.1)
    quantizer(x).sum().backward()
    optimizer.step()
    assert quantizer.alpha.item() == pytest.approx(9.0 * 0.99)


def test_alpha_begins_as_given_or_where_the_first_batch_loses_least():
    x = torch.randn(8, 4, 16, 16).relu()
    given = PACT(2)
    given.initialize(x)
    assert given.alpha == 8
    fitted = PACT(2, initial=None)
    fitted.initialize(x)
    best = min((learned_clip(x, end, 3) - x).square().mean() for end in torch.linspace(0.1, 5, 400))
    assert (fitted(x) - x).square().mean() < 1.02 * best
    assert (given(x) - x).square().mean() > 3 * best


def test_a_batch_of_zeros_and_an_alpha_driven_below_zero_are_harmless():
    fitted = PACT(4, initial=None)
    fitted.initialize(torch.zeros(4, 4))
    assert torch.equal(fitted(torch.zeros(4, 4)), torch.zeros(4, 4))
    quantizer, x = clipping_at(-1.0), torch.randn(4, 4, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert (y >= 0).all()
    assert quantizer.alpha.grad == (x > 0).sum(), "clipped values pull alpha up again"
    assert torch.equal(y.detach(), quantizer.grid().values(quantizer.codes(x.detach())))


def drawn(name):
    """Weights of a distribution, evenly over its quantiles."""
    place = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000
    if name == "normal":
        return torch.special.ndtri(place)
    if name == "logistic":
        return torch.logit(place)
    return -(place - 0.5).sign() * (1 - 2 * (place - 0.5).abs()).log()


def loss_at(weight, end, bits):
    steps = 254 if bits == 8 else 2**bits - 1
    levels = ((weight / (2 * end) + 0.5) * steps).round().clamp(0, steps)
    return (2 * end * (levels / steps - 0.5) - weight).square().mean().item()


@pytest.mark.parametrize("bits", COEFFICIENTS)
@pytest.mark.parametrize(("name", "tolerance"), [("normal", 1.02), ("laplace", 1.02), ("logistic", 1.5)])
def test_the_ends_lose_little_more_than_the_best_ones(bits, name, tolerance):
    weight = 0.03 * drawn(name)
    ends = weight.std() * torch.linspace(0.5, 11, 400, dtype=torch.float64)
    best = min(loss_at(weight, end, bits) for end in ends)
    found = statistics_aware_end(weight, bits)
    assert loss_at(weight, found, bits) < tolerance * best


def test_weights_are_the_nearest_levels_between_the_ends_of_the_formula():
    weight, quantizer = torch.randn(300) * 0.1, SAWBWeight(2)
    end = 3.12 * weight.square().mean().sqrt() - 2.064 * weight.abs().mean()
    levels = end * torch.tensor([-1, -1 / 3, 1 / 3, 1])
    nearest = levels[(weight[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(quantizer(weight), nearest)


def test_the_ends_stay_between_mean_and_largest_magnitude():
    equal = torch.tensor([1.0, -1.0, 1.0, -1.0])  # at 4 bits the formula alone gives -0.12
    assert statistics_aware_end(equal, 4) == 1
    outlier = torch.cat([torch.zeros(9999), torch.ones(1)])  # and here 0.12 * 100 standard deviations
    assert statistics_aware_end(outlier, 8) <= 1
    assert statistics_aware_end(torch.zeros(5), 4) > 0


def test_one_bit_weights_are_the_signs_times_the_mean_size():
    weight, quantizer = torch.randn(50), SAWBWeight(1)
    torch.testing.assert_close(quantizer(weight), weight.sign() * weight.abs().mean())


def test_all_weights_get_the_gradient_as_it_is():
    weight, g = torch.randn(200, requires_grad=True), torch.randn(200)
    SAWBWeight(2)(weight).backward(g)
    assert torch.equal(weight.grad, g)


def test_weights_follow_their_moments_and_scale_with_them():
    weight, quantizer = torch.randn(4, 3, 3, 3), SAWBWeight(3)
    once = quantizer(weight)
    torch.testing.assert_close(quantizer(4 * weight), 4 * once)
    assert quantizer.grid().scale.item() == pytest.approx(statistics_aware_end(4 * weight, 3).item() / 7)


def test_rebuilt_from_its_arguments_it_loads_its_state_and_answers_the_same():
    layer, x = QuantLayer(nn.Conv2d(3, 4, 3), SAWBWeight(3), PACT(3, initial=None)), torch.rand(2, 3, 8, 8)
    layer.observe(x)
    again = QuantLayer(nn.Conv2d(3, 4, 3), SAWBWeight(3), PACT(3, initial=None))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_layer_used_twice_in_a_pass_trains():
    layer, x = QuantLayer(nn.Linear(6, 6), SAWBWeight(2), PACT(2)), torch.rand(5, 6)
    layer.observe(x)
    layer(layer(x)).sum().backward()
    assert layer.layer.weight.grad.isfinite().all()


def test_a_network_trains_exports_and_is_verified(tmp_path):
    data, task = Stripes(batch_size=8), Classify(2)
    edges = {"edge_input": MinMax(8)}
    methods = [Quantize(SAWBWeight(2), PACT(2, initial=None), stream=MinMax(8), **edges)]
    model = train(SmallNet(), task, data, tmp_path, epochs=3, methods=methods)
    ends = [module.alpha.item() for module in model.modules() if isinstance(module, PACT)]
    assert all(math.isfinite(end) for end in ends)
    assert ends
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize(
    ("make", "text"),
    [(lambda: PACT(9), "1 to 8"), (lambda: PACT(4, initial=0.0), "positive"), (lambda: SAWBWeight(0), "1 to 8")],
)
def test_impossible_arguments_are_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
