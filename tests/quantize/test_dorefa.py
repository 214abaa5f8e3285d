"""DoReFa against brute force, the paper's identities, and the promises of a quantizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.probe import Deployed
from galago.quantize.dorefa import DoReFa, DoReFaWeight, clipped_round, squeezed
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_quantizer
from galago.train import train
from samples import SmallNet, Stripes


def quantize_k(r, bits):
    return ((2**bits - 1) * r).round() / (2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("detach_max", [False, True])
def test_weights_and_their_gradient_are_the_brute_force_ones(golden, bits, detach_max):
    want = {key.removeprefix(f"dorefa_b{bits}_"): value for key, value in golden("baselines_qat").items()}
    weight = want["w"].clone().requires_grad_()
    rounded = DoReFaWeight(bits, detach_max)(weight)
    rounded.backward(want["grad_out"])
    torch.testing.assert_close(rounded.detach(), want["expected_w_q"], rtol=1e-10, atol=1e-12)
    expected = want["expected_grad_w_max_detached" if detach_max else "expected_grad_w"]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_inputs_and_their_gradient_are_the_brute_force_ones(golden, bits):
    want = {key.removeprefix(f"dorefa_b{bits}_"): value for key, value in golden("baselines_qat").items()}
    x = want["act_x"].clone().requires_grad_()
    y = clipped_round(x, torch.ones((), dtype=torch.float64), 2**bits - 1)
    y.backward(want["act_grad_out"])
    torch.testing.assert_close(y.detach(), want["expected_act"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, want["expected_act_grad_x"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", range(2, 8))
def test_weights_are_the_papers_formula(bits):
    weight, quantizer = torch.randn(8, 5, 3, 3), DoReFaWeight(bits)
    curved = weight.tanh()
    expected = 2 * quantize_k(curved / (2 * curved.abs().max()) + 0.5, bits) - 1
    torch.testing.assert_close(quantizer(weight), expected)
    assert quantizer(weight).abs().max() == pytest.approx(1)


@pytest.mark.parametrize("bits", range(1, 8))
def test_weight_codes_below_eight_bits_are_odd_multiples_of_one_over_n(bits):
    weight, quantizer = torch.randn(8, 5, 3, 3), DoReFaWeight(bits)
    quantizer.initialize(weight)
    codes, grid = quantizer.codes(weight), quantizer.grid()
    assert (codes % 2 == 1).all()
    assert (grid.low, grid.high, grid.step) == (1 - 2**bits, 2**bits - 1, 2)
    if bits > 1:
        assert grid.scale.item() == pytest.approx(1 / (2**bits - 1))


def test_eight_bit_weights_have_a_zero_and_fit_a_byte():
    assert DoReFaWeight(8).grid()[2:5] == (-127, 127, 1)


def test_small_weights_may_be_scaled_and_large_ones_not():
    weight, quantizer = torch.randn(400), DoReFaWeight(4)
    assert torch.equal(quantizer(1e-3 * weight), quantizer(5e-4 * weight))
    assert not torch.equal(quantizer(weight), quantizer(3 * weight))


def test_one_bit_weights_are_signs_times_the_mean_size_and_pass_the_gradient_on():
    weight, g, quantizer = torch.randn(6, 7), torch.randn(6, 7), DoReFaWeight(1)
    weight[0, 0] = 0.0
    weight.requires_grad_()
    y = quantizer(weight)
    y.backward(g)
    signs = torch.where(weight >= 0, 1.0, -1.0)
    torch.testing.assert_close(y.detach(), signs * weight.detach().abs().mean())
    assert torch.equal(quantizer.codes(weight), signs)
    assert torch.equal(weight.grad, g)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [DoReFa, DoReFaWeight])
def test_evaluated_values_are_the_grids_values_of_the_codes(bits, kind):
    x, quantizer = torch.randn(6, 5, 7, 7), kind(bits)
    quantizer.initialize(x)
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(quantizer.train()(x), y)
    assert set(codes.unique().tolist()) == set(range(grid.low, grid.high + 1, grid.step)) or bits > 5
    assert codes.unique().numel() <= 2**bits
    if kind is DoReFa:
        assert torch.equal(quantizer(y), y), "quantizing twice changes values"


def test_one_bit_obeys_the_laws():
    check_quantizer(lambda: DoReFa(1), idempotent=True)
    check_quantizer(lambda: DoReFaWeight(1), for_weights=True)


def test_inputs_exactly_at_zero_and_one_count_as_clipped():
    x = torch.tensor([-0.1, 0.0, 1e-20, 0.5, 1 - 2**-24, 1.0, 1.1], requires_grad=True)
    DoReFa(4)(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_largest_weight_has_no_gradient_of_its_own_unless_the_maximum_is_detached():
    weight = torch.tensor([0.1, -0.4, 2.0])
    for detach_max in (False, True):
        given = weight.clone().requires_grad_()
        (squeezed(given, detach_max) * torch.tensor([0.0, 0.0, 1.0])).sum().backward()
        assert bool(given.grad[2] != 0) is detach_max


def test_weights_of_zero_stay_finite():
    weight = torch.zeros(3, 4, requires_grad=True)
    y = DoReFaWeight(2)(weight)
    y.sum().backward()
    assert y.isfinite().all()
    assert weight.grad.isfinite().all()
    assert DoReFaWeight(1)(torch.zeros(3)).isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_layer_begins_with_an_output_as_large_as_in_float_and_learns_its_size_slowly(bits):
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3, bias=False), DoReFaWeight(bits), DoReFa(bits)), torch.rand(4, 5, 9, 9)
    layer.observe(x)
    assert layer(x).abs().mean().item() == pytest.approx(layer.layer(x).abs().mean().item(), rel=1e-5)
    assert layer.own_rates() == (0.01, 0.0)


def test_in_front_of_a_batch_normalization_the_output_scale_changes_nothing():
    layer, x = QuantLayer(nn.Conv2d(5, 6, 3, bias=False), DoReFaWeight(2), DoReFa(2)), torch.rand(4, 5, 9, 9)
    layer.observe(x)
    norm, plain = nn.BatchNorm2d(6, eps=1e-12), nn.functional.conv2d
    expected = norm(plain(layer.input_quantizer(x), layer.weight_quantizer(layer.layer.weight)))
    torch.testing.assert_close(norm(layer(x)), expected)


def test_bits_may_be_changed_before_the_first_use():
    quantizer, x = DoReFaWeight(4), torch.randn(40)
    quantizer.bits = 2
    quantizer.initialize(x)
    assert torch.equal(quantizer(x), quantizer.grid().values(quantizer.codes(x)))
    assert quantizer.codes(x).unique().tolist() == [-3, -1, 1, 3]


@pytest.mark.parametrize("bits", [1, 3])
def test_rebuilt_from_its_arguments_it_loads_its_state_and_answers_the_same(bits):
    layer, x = QuantLayer(nn.Conv2d(3, 4, 3), DoReFaWeight(bits, True), DoReFa(bits)), torch.rand(2, 3, 8, 8)
    layer.observe(x)
    again = QuantLayer(nn.Conv2d(3, 4, 3), DoReFaWeight(bits, True), DoReFa(bits))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("bits", [1, 2])
def test_a_network_trains_exports_and_is_verified(tmp_path, bits):
    data, task = Stripes(batch_size=8), Classify(2)
    edges = {"edge_weight": MinMaxWeight(8), "edge_input": MinMax(8)}
    methods = [Quantize(DoReFaWeight(bits), DoReFa(bits), stream=MinMax(8), **edges)]
    model = train(SmallNet(), task, data, tmp_path, epochs=3, methods=methods)
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize("make", [lambda: DoReFa(0), lambda: DoReFaWeight(9)])
def test_impossible_bits_are_refused_in_plain_words(make):
    with pytest.raises(UserError, match="1 to 8"):
        make()
