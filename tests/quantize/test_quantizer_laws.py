"""Every quantizer of this folder against the laws that users' own obey too, and through the compiler without breaks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.daq import DAQ, DAQWeight
from galago.quantize.dorefa import DoReFa, DoReFaWeight
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lbt import LBT, LBTWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.lsq_plus import LSQPlus, LSQPlusWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.n2uq import N2UQ, N2UQWeight
from galago.quantize.pact import PACT, SAWBWeight
from galago.testing import check_quantizer

INPUTS = (LSQ, MinMax, EWGS, DAQ, LBT, LSQPlus, PACT, DoReFa, Calibrated)
WEIGHTS = (
    LSQWeight,
    MinMaxWeight,
    EWGSWeight,
    DAQWeight,
    LBTWeight,
    LSQPlusWeight,
    SAWBWeight,
    DoReFaWeight,
    CalibratedWeight,
)
PAIRS = (*zip(WEIGHTS, INPUTS, strict=True), (N2UQWeight, N2UQ))  # the last has no 8 bits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", INPUTS)
def test_input_quantizers_obey_the_laws(kind, bits):
    check_quantizer(lambda: kind(bits), idempotent=kind not in (EWGS, DAQ))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weight_quantizers_obey_the_laws(kind, bits):
    check_quantizer(lambda: kind(bits), for_weights=True, idempotent=kind in (LSQWeight, LBTWeight, CalibratedWeight))


def test_one_step_for_all_channels_obeys_the_laws():
    check_quantizer(lambda: LSQWeight(4, per_channel=False), for_weights=True, idempotent=True)


def layer_and_input(weight, inputs):
    layer = QuantLayer(nn.Conv2d(5, 6, 3), weight(4), inputs(4)).to(memory_format=torch.channels_last)
    x = torch.randn(3, 5, 8, 8).relu().to(memory_format=torch.channels_last)
    layer.observe(x)
    return layer, x.requires_grad_()


@pytest.mark.parametrize(("weight", "inputs"), PAIRS)
def test_the_compiler_takes_a_training_step_in_one_piece_and_gets_the_same(weight, inputs):
    torch.compiler.reset()  # which gives up on a function that it has met in eight forms
    layer, x = layer_and_input(weight, inputs)
    twin, copied = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    g = torch.randn_like(layer(x))
    for given, run in ((x, layer), (copied, compiled)):
        run(given).backward(g)
    torch.testing.assert_close(copied.grad, x.grad)
    for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    for (name, one), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=0.02, atol=0.0, msg=name)


@pytest.mark.parametrize("kind", [*INPUTS, N2UQ])
def test_channels_last_stays_channels_last_in_both_directions(kind):
    quantizer, x = kind(4), torch.randn(3, 5, 8, 8).to(memory_format=torch.channels_last)
    quantizer.initialize(x)
    y = quantizer(x.requires_grad_())
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.randn_like(y))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", INPUTS)
def test_nothing_is_kept_for_the_backward_pass_but_what_came_in_and_scalars(kind):
    quantizer, x = kind(4), torch.randn(3, 5, 8, 8, requires_grad=True)
    quantizer.initialize(x.detach())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = quantizer(x)
    large = [tensor for tensor in kept if tensor.numel() > 1]
    assert {tensor.data_ptr() for tensor in large} <= {x.data_ptr(), y.data_ptr()}
