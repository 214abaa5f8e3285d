"""Settled biases: moved by half a step at most, and then the integer module equals the trained model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from galago.deploy.integer import lower
from galago.deploy.look import look_into_integer, look_into_trained
from galago.probe import Deployed
from galago.quantize.dorefa import DoReFa, DoReFaWeight
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.lbt import LBT, LBTWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.lsq_plus import LSQPlus, LSQPlusWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.pact import PACT, SAWBWeight
from galago.quantize.quantize import Quantize
from galago.quantize.settle import settle_biases, settled
from galago.tasks.classify import Classify
from samples import SmallNet, Stripes

PAIRS = {
    "LSQ": lambda bits: (LSQWeight(bits), LSQ(bits)),
    "EWGS": lambda bits: (EWGSWeight(bits), EWGS(bits)),
    "LBT": lambda bits: (LBTWeight(bits), LBT(bits)),
    "MinMax": lambda bits: (MinMaxWeight(bits), MinMax(bits)),
    "LSQ+": lambda bits: (LSQPlusWeight(bits), LSQPlus(bits)),
    "PACT": lambda bits: (SAWBWeight(bits), PACT(bits)),
    "DoReFa": lambda bits: (DoReFaWeight(bits), DoReFa(bits)),
}


def quantized(kind: str, bits: int, affine: bool = True) -> tuple[nn.Module, Stripes]:
    """A network with BatchNorms of every kind: negative and zero gains, biases, one without either."""
    data, net = Stripes(batch_size=48), SmallNet()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.weight.normal_()
            norm.weight[0] = 0
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    if not affine:
        net.bn2.weight = net.bn2.bias = None
        net.bn2.affine = False
    weight, inputs = PAIRS[kind](bits)
    method = Quantize(weight, inputs, stream=MinMax(8))
    return method.prepare(net, data).eval(), data


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_the_integer_module_then_gives_the_trained_models_codes(kind: str, bits: int, affine: bool):
    net, data = quantized(kind, bits, affine)
    example = data.normalize(data.example())
    settle_biases(net, example)
    image = data.validation()[0].input
    trained = Deployed(net, data.normalize, Classify(2)).eval()
    integer = Deployed(lower(net, example), data.normalize, Classify(2)).eval()
    _, expected = look_into_trained(trained, image)
    _, found = look_into_integer(integer, image, instead=expected)
    for name, codes in expected.items():
        assert (codes.int() - found[name].int()).abs().max() <= 1
        assert (codes != found[name]).float().mean() <= 5e-4, name


def test_without_settling_codes_move():
    """The reason for it all: at few bits the export's rounding of biases shows."""
    net, data = quantized("LSQ", 2)
    trained = Deployed(net, data.normalize, Classify(2)).eval()
    integer = Deployed(lower(net, data.normalize(data.example())), data.normalize, Classify(2)).eval()
    image = data.validation()[0].input
    _, expected = look_into_trained(trained, image)
    _, found = look_into_integer(integer, image, instead=expected)
    assert max((expected[n] != found[n]).float().mean() for n in expected) > 1e-3


def test_settling_twice_changes_nothing_more():
    net, data = quantized("LSQ", 4)
    settle_biases(net, data.normalize(data.example()))
    once = copy.deepcopy(net.state_dict())
    settle_biases(net, data.normalize(data.example()))
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-5, atol=1e-6)


def test_no_bias_moves_by_more_than_half_a_step():
    bias, step, offset = torch.randn(1000), torch.rand(1000), torch.tensor(0.3)
    moved: Tensor = settled(bias, step, offset)
    assert ((moved - bias).abs() <= step / 2 + 1e-6).all()
    assert (((moved - offset) / step - ((moved - offset) / step).round()).abs() < 1e-2).all()
