"""Saturation against sums worked out pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.probe import Deployed
from galago.probes.saturation import Saturation, saturable, saturating
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_probe, tiny_network

LAYERS = {
    "odd channels": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "stride and padding that differ": (nn.Conv2d(4, 3, (3, 1), stride=2, padding=(1, 2), bias=False), (2, 4, 7, 5)),
    "groups, dilation": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 7, 7)),
    "one dimension": (nn.Conv1d(4, 3, 3, padding=1), (2, 4, 9)),
    "linear": (nn.Linear(7, 3), (4, 7)),
    "linear, on tokens": (nn.Linear(6, 2), (2, 5, 6)),
}


def quantized(layer: nn.Module, shape: tuple[int, ...], lowest: float = 0.0) -> tuple[QuantLayer, Tensor]:
    """A layer whose weights are large and of one sign as a rule, and an input with many large values."""
    torch.manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape) - 0.2)
    x = torch.rand(shape) * (1 - lowest) + lowest
    wrapped = QuantLayer(layer, MinMaxWeight(), MinMax()).eval()
    wrapped.input_quantizer.initialize(x)
    return wrapped, x


def by_pairs(layer: QuantLayer, x: Tensor) -> Tensor:
    """The layer's output with every pair's sum cut off, in plain loops over the windows of one-group layers."""
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    codes = inputs.codes(x) - inputs.grid().low
    zero = inputs.grid().zero_point - inputs.grid().low
    inner = layer.layer
    weight = weights.codes(inner.weight.detach())
    if isinstance(inner, nn.Conv1d):
        codes, weight = codes.unsqueeze(2), weight.unsqueeze(2)
    if not isinstance(inner, nn.Linear):
        codes = nn.functional.pad(codes, inner._reversed_padding_repeated_twice, value=float(zero))
    else:
        codes, weight = codes.reshape(-1, codes.shape[-1], 1, 1), weight[:, :, None, None]
    stride = getattr(inner, "stride", (1, 1))
    stride = (1, *stride) if len(stride) == 1 else stride
    dilation = getattr(inner, "dilation", (1, 1))
    dilation = (1, *dilation) if len(dilation) == 1 else dilation
    groups = getattr(inner, "groups", 1)
    out, per, high, wide = weight.shape
    rows = (codes.shape[2] - dilation[0] * (high - 1) - 1) // stride[0] + 1
    columns = (codes.shape[3] - dilation[1] * (wide - 1) - 1) // stride[1] + 1
    sums = torch.zeros(len(codes), out, rows, columns)
    for n, o, i, j in torch.cartesian_prod(*(torch.arange(s) for s in sums.shape)).tolist():
        group = o // (out // groups)
        values = [
            (
                codes[n, group * per + c, i * stride[0] + dilation[0] * y, j * stride[1] + dilation[1] * z],
                weight[o, c, y, z],
            )
            for y in range(high)
            for z in range(wide)
            for c in range(per)
        ]
        values += [(torch.tensor(0.0), torch.tensor(0.0))] * (len(values) % 2)
        products = [float(a * w) for a, w in values]
        pairs = zip(products[::2], products[1::2], strict=True)
        sums[n, o, i, j] = sum(min(max(a + b, -32768), 32767) for a, b in pairs)
    offset = float(zero) * weight.flatten(1).sum(1)
    scale = inputs.grid().scale * weights.grid().scale
    result = (sums - offset.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    if inner.bias is not None:
        result = result + inner.bias.detach().view(-1, 1, 1)
    if isinstance(inner, nn.Linear):
        return result.flatten(1).view(*x.shape[:-1], -1)
    return result.squeeze(2) if isinstance(inner, nn.Conv1d) else result


@pytest.mark.parametrize("lowest", [0.0, -0.7])
@pytest.mark.parametrize("name", LAYERS)
def test_the_emulated_output_is_that_of_sums_cut_off_pair_by_pair(name: str, lowest: float) -> None:
    layer, x = quantized(*LAYERS[name], lowest)
    exact = layer(x)
    handle = layer.register_forward_hook(saturating(saturable(layer)))
    found = layer(x)
    handle.remove()
    assert (found - exact).abs().max() > 0.01
    torch.testing.assert_close(found, by_pairs(layer, x), atol=1e-4, rtol=1e-4)


def test_fewer_bits_on_either_side_cannot_saturate() -> None:
    x = torch.rand(2, 8)
    for weight, inputs in ((MinMaxWeight(7), MinMax(8)), (MinMaxWeight(8), MinMax(7)), (LSQWeight(4), LSQ(8))):
        layer = QuantLayer(nn.Linear(8, 4), weight, inputs)
        with torch.no_grad():
            layer.layer.weight.fill_(1.0)
        weight.initialize(layer.layer.weight.detach())
        inputs.initialize(x)
        assert len(saturable(layer).channel) == 0


def test_layers_with_one_channel_a_group_are_exact() -> None:
    assert len(saturable(quantized(nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5))[0]).channel) == 0


class Images:
    """Data whose images are all bright."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def test(self) -> list[Batch]:
        return [Batch(part, torch.eye(2)[torch.arange(len(part)) % 2]) for part in self.images.split(3)]


def test_the_probe_counts_layers_and_measures_what_they_cost() -> None:
    network = nn.Sequential(nn.Flatten(), quantized(nn.Linear(8, 2), (6, 8))[0])
    with torch.no_grad():  # the second class wins by exact sums, the first as soon as sums are cut off
        network[1].layer.weight.copy_(torch.tensor([[1.0, 0.0] * 4, [0.6, 0.6] * 4]))
        network[1].layer.bias.zero_()
    deployed, images = Deployed(network, nn.Identity(), Classify(2)).eval(), torch.ones(7, 8)
    assert (deployed(images).argmax(1) == 1).all()
    weight = network[1].weight_quantizer
    found = Saturation()(deployed, Classify(2), Images(images))  # type: ignore[arg-type]
    assert weight.codes(network[1].layer.weight).max() == 127
    assert found["saturating_layers"] == 1
    assert set(found) == {"saturating_layers", "saturating_accuracy"}
    assert not network[1]._forward_hooks


def test_a_float_network_and_a_file_give_no_number(stripes: object) -> None:
    assert Saturation()(Deployed(nn.Flatten(), nn.Identity(), Classify(2)), Classify(2), stripes) == {}  # type: ignore[arg-type]


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: Saturation(images=20))


def test_reduced_range_makes_it_impossible(stripes: object) -> None:
    parts = {"weight": MinMaxWeight(), "input": MinMax(), "stream": MinMax()}
    for reduce_range, weight_bits in ((False, {8}), (True, {7})):
        model = Quantize(**parts, reduce_range=reduce_range).prepare(tiny_network(), stripes)  # type: ignore[arg-type]
        layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
        assert {layer.weight_quantizer.bits for layer in layers} == weight_bits
        assert {layer.input_quantizer.bits for layer in layers} == {8}
        if reduce_range:
            assert not any(len(saturable(layer).channel) for layer in layers)


def test_a_wrong_number_of_images_is_said() -> None:
    with pytest.raises(UserError, match="images is 0"):
        Saturation(images=0)
