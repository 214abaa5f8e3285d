"""Min-max quantization against brute force, and the promises of a quantizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight, straight_through


def over(minimum, maximum, bits=8, **arguments):
    made = MinMax(bits, **arguments)
    made.initialize(torch.tensor([minimum, maximum]))
    return made


def test_scale_zero_point_codes_and_gradient_are_the_brute_force_ones(golden):
    want = {key.removeprefix("fq_"): value for key, value in golden("baselines_qat").items()}
    quantizer = over(want["min"].item(), want["max"].item()).eval()
    grid = quantizer.grid()
    assert grid.scale.item() == pytest.approx(want["expected_scale"].item(), rel=1e-6)
    assert grid.zero_point == want["expected_zero_point"]
    x = want["x"].float().requires_grad_()
    y = quantizer(x)
    y.backward(want["grad_out"].float())
    assert torch.equal(quantizer.codes(x.detach()), want["expected_code"].float())
    torch.testing.assert_close(y.detach(), want["expected_y"].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, want["expected_grad_x"].float(), rtol=0, atol=1e-6)


def test_weight_scales_and_codes_are_the_brute_force_ones(golden):
    want = {key.removeprefix("fqw_"): value for key, value in golden("baselines_qat").items()}
    weight, quantizer = want["weight"].float(), MinMaxWeight(8)
    quantizer.initialize(weight)
    torch.testing.assert_close(quantizer.grid().scale.double(), want["expected_scale"], rtol=1e-6, atol=0)
    assert torch.equal(quantizer.codes(weight), want["expected_code"].float())


def test_no_weight_moves_by_more_than_half_a_step():
    weight = torch.randn(6, 5, 3, 3)
    quantizer = MinMaxWeight(4)
    quantizer.initialize(weight)
    moved = (quantizer(weight) - weight).abs().flatten(1).amax(1)
    assert (moved <= quantizer.grid().scale / 2 * (1 + 1e-6)).all()
    assert quantizer.grid()[2:4] == (-7, 7)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shift", [-1.0, 0.0, 5.0])
def test_evaluated_values_are_the_grids_values_of_the_codes_and_zero_is_one(bits, shift):
    x = torch.randn(4, 5, 6, 6) + shift
    quantizer = MinMax(bits)
    quantizer.initialize(x)
    y, codes, grid = quantizer.eval()(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert codes.unique().numel() <= 2**bits
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert quantizer(torch.zeros(1)).item() == 0
    assert torch.equal(quantizer(y), y), "quantizing twice changes values"


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_the_grids_values_of_the_codes_in_both_modes(bits):
    weight, quantizer = torch.randn(6, 5, 3, 3), MinMaxWeight(bits)
    quantizer.initialize(torch.randn(6, 5, 3, 3))
    trained = quantizer.train()(weight)
    assert torch.equal(quantizer.eval()(weight), trained)
    assert torch.equal(trained, quantizer.grid().values(quantizer.codes(weight)))


def test_the_range_follows_training_batches_and_stays_in_evaluation():
    quantizer = over(-1.0, 1.0, decay=0.75)
    quantizer.train()(torch.tensor([-5.0, 9.0]))
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == (-2.0, 3.0)
    quantizer.eval()(torch.tensor([-50.0, 90.0]))
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == (-2.0, 3.0)


def test_training_rounds_a_batch_as_evaluation_would_before_it():
    x, quantizer = torch.randn(4, 5, 6, 6), MinMax(4)
    quantizer.initialize(x)
    expected = quantizer.eval()(3 * x)
    assert torch.equal(quantizer.train()(3 * x), expected)
    assert not torch.equal(quantizer.eval()(3 * x), expected)


def test_the_range_may_move_before_the_backward_pass():
    x, quantizer = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True), over(-1.0, 1.0, decay=0.0)
    y = quantizer.train()(x)
    assert quantizer.maximum == 9
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_backward_pass_uses_the_range_of_the_forward_pass(backend):
    plain = over(-1.0, 1.0, bits=4, decay=0.5)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for _ in range(3):
        x, g = 3 * torch.randn(200), torch.randn(200)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(ours).backward(g)
        compiled(theirs).backward(g)
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(plain.scale, twin.scale)


def test_weights_span_what_they_span_now():
    quantizer = MinMaxWeight(4)
    quantizer.initialize(torch.ones(2, 3))
    quantizer.eval()(torch.tensor([[7.0, 0.0, 1.0], [14.0, 2.0, 0.0]]))
    assert quantizer.grid().scale.tolist() == [1.0, 2.0]


def test_clipped_values_get_no_gradient_and_others_all_of_it():
    x, g = torch.randn(1000), torch.randn(1000)
    x.requires_grad_()
    straight_through(x, torch.tensor(0.1), torch.tensor(8.0), 0, 15).backward(g)
    kept = ((x / 0.1).round() + 8 >= 0) & ((x / 0.1).round() + 8 <= 15)
    assert kept.any()
    assert not kept.all()
    assert torch.equal(x.grad, torch.where(kept, g, 0.0))


def test_a_constant_tensor_and_a_dead_channel_are_harmless():
    constant = MinMax(8)
    constant.initialize(torch.zeros(3, 3))
    assert torch.equal(constant.eval()(torch.zeros(3, 3)), torch.zeros(3, 3))
    weight, quantizer = torch.zeros(2, 3), MinMaxWeight(8)
    quantizer.initialize(weight)
    assert torch.equal(quantizer(weight), weight)


def test_rebuilt_from_its_arguments_it_loads_its_state_and_answers_the_same():
    layer, x = QuantLayer(nn.Linear(6, 4), MinMaxWeight(4), MinMax(4)), torch.randn(5, 6)
    layer.observe(x)
    again = QuantLayer(nn.Linear(6, 4), MinMaxWeight(4), MinMax(4))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), again.eval()(x))


def test_in_half_precision_the_type_stays_and_codes_move_by_at_most_one():
    x, quantizer = torch.randn(4, 5, 6, 6), MinMax(4)
    quantizer.initialize(x)
    y = quantizer.eval()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    grid = quantizer.grid()
    assert (y.float() / grid.scale + grid.zero_point - quantizer.codes(x)).abs().max() < 1.1


@pytest.mark.parametrize(("make", "text"), [(lambda: MinMax(0), "1 to 8"), (lambda: MinMaxWeight(1), "2 to 8")])
def test_impossible_bits_are_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
