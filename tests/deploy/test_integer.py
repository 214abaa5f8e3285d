"""Integer lowering: the same function, in integers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d, ScaledStdConv2d
from torch import Tensor, nn

from galago.deploy.integer import lower, obstacles
from galago.deploy.integer_layers import IntegerLayer, IntegerStream
from galago.errors import UserError
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Quantizer
from integers import STREAMS, Interval, Odd, PerChannel, Ranged, Signed, Thresholds, Zoo, images, quantize, shaken

LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(5, 7, 3, padding=1, bias=bias), (2, 5, 9)),
    "conv2d": (lambda bias: nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=bias), (2, 5, 9, 9)),
    "conv3d": (lambda bias: nn.Conv3d(3, 5, 3, padding=1, bias=bias), (2, 3, 5, 5, 5)),
    "grouped": (lambda bias: nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3, bias=bias), (2, 6, 8, 8)),
    "depth-wise": (lambda bias: nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=bias), (2, 5, 8, 8)),
    "reflected": (lambda bias: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=bias), (2, 3, 8, 8)),
    "linear": (lambda bias: nn.Linear(11, 5, bias=bias), (4, 11)),
    "linear of tokens": (lambda bias: nn.Linear(11, 5, bias=bias), (2, 3, 11)),
    "transposed": (lambda bias: nn.ConvTranspose2d(5, 7, 3, stride=2, padding=1, bias=bias), (2, 5, 6, 6)),
}
QUANTIZERS = {
    "per channel, ranged": (PerChannel, Ranged),
    "8 bits, signed": (lambda: PerChannel(8), Signed),
    "odd, interval": (Odd, Interval),
    "1 bit": (lambda: Odd(1), lambda: Interval(1)),
    "odd, thresholds": (lambda: Odd(3), lambda: Thresholds(3)),
    "weight only": (PerChannel, lambda: None),
    "input only": (lambda: None, lambda: Interval(offset=0.0)),
}


def ready(layer: nn.Module, weight: Quantizer | None, given: Quantizer | None, x: Tensor) -> QuantLayer:
    if isinstance(weight, PerChannel) and isinstance(layer, nn.ConvTranspose2d):
        weight.axis = 1
    quantized = QuantLayer(layer, weight, given).eval()
    quantized.observing = True
    with torch.no_grad():
        quantized(x)
        if quantized.output_scale is not None:
            quantized.output_scale.mul_(-1.3)  # only its size counts
    return quantized


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("quantizers", QUANTIZERS)
def test_an_integer_layer_without_bias_computes_what_was_trained(kind: str, quantizers: str) -> None:
    make, shape = LAYERS[kind]
    x = torch.rand(shape)
    layer = ready(make(False), QUANTIZERS[quantizers][0](), QUANTIZERS[quantizers][1](), x)
    assert obstacles(layer) == {}
    integer = lower(layer, x)
    assert not isinstance(integer, QuantLayer)
    assert apart(integer(x), layer(x)) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_a_bias_is_off_by_half_a_step_of_the_accumulator_at_most(kind: str) -> None:
    make, shape = LAYERS[kind]
    x = torch.randn(shape)
    layer = ready(make(True), PerChannel(3), Signed(4), x)
    integer = lower(layer, x)
    assert integer.bias_codes.dtype == torch.int32
    assert torch.equal(integer.bias_scale, integer.stream.scale * integer.scale)
    difference = (integer(x) - layer(x)).abs().amax()
    assert difference <= 0.5 * integer.bias_scale.max() + 1e-5 * layer(x).abs().max()


def test_int64_arithmetic_on_the_codes_gives_the_layer() -> None:
    x = torch.randn(2, 5, 7, 7)
    integer = lower(ready(nn.Conv2d(5, 6, 3, stride=2, padding=1), PerChannel(4), Ranged(5), x), x)
    codes = integer.stream.codes(x).numpy().astype(np.int64)
    zero = int(integer.stream.zero_point)
    assert zero > 0
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=zero)  # padding is code z_x
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2] - zero
    sums = np.einsum("nchwij,ocij->nohw", windows, integer.codes.numpy().astype(np.int64))
    sums += integer.bias_codes.numpy().astype(np.int64)[:, None, None]
    found = torch.from_numpy(sums * integer.bias_scale.double().numpy()[:, None, None])
    assert apart(integer(x).double(), found) < 1e-6


@pytest.mark.parametrize("bits", range(2, 9))
def test_widened_codes_stand_for_the_same_values_bit_for_bit(bits: int) -> None:
    x = torch.randn(2, 3, 5, 5)
    layer = ready(nn.Conv2d(3, 4, 3), PerChannel(bits), Signed(8), x)
    integer = lower(layer, x)
    values = integer.codes.float() * integer.scale.view(-1, 1, 1, 1)
    assert torch.equal(values, layer.weight_quantizer(layer.layer.weight))
    assert integer.codes.abs().max() > 32
    if bits < 8:
        assert integer.codes.abs().max() <= 64


class Behind(nn.Module):
    """A quantized convolution and a BatchNorm behind it."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class ReadTwice(Behind):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) + y


class RunTwice(Behind):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) + self.norm(self.layer(2 * x))


class ActivatedFirst(Behind):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.layer(x)))


def behind(kind: type[Behind] = Behind, weight: Quantizer | None = None, norm: nn.Module | None = None) -> Behind:
    layer = QuantLayer(nn.Conv2d(3, 6, 3, padding=1), weight or PerChannel(4), Ranged(8))
    return shaken(kind(layer, norm or nn.BatchNorm2d(6)))


def calibrated(network: nn.Module, x: Tensor) -> nn.Module:
    for module in network.modules():
        if isinstance(module, QuantLayer | QuantOutput):
            module.observing = True
    with torch.no_grad():
        network(x)
    return network


def test_batch_norm_folds_with_negative_and_zero_gains() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = calibrated(behind(), x)
    network.norm.weight.data[:3] = torch.tensor([-0.7, 0.0, 1e-3])
    integer = lower(network, x)
    assert isinstance(integer.norm, nn.Identity)
    assert (integer.layer.scale > 0).all()
    expected = network.layer.weight_quantizer.codes(network.layer.layer.weight)
    assert torch.equal(integer.layer.codes[0].float(), -8 * expected[0])  # flipped, and widened to 64
    assert integer.layer.codes[1].count_nonzero() == 0
    found, trained = integer(x), network(x)
    assert torch.allclose(found[:, 1], trained[:, 1], atol=1e-6)
    assert (found - trained).abs().max() <= 0.5 * integer.layer.bias_scale.max() + 1e-5


@pytest.mark.parametrize("kind", [ReadTwice, RunTwice, ActivatedFirst])
def test_batch_norm_stays_where_folding_it_would_change_something_else(kind: type[Behind]) -> None:
    x = torch.randn(2, 3, 8, 8)
    network = calibrated(behind(kind), x)
    integer = lower(network, x)
    assert isinstance(integer.norm, nn.BatchNorm2d)
    assert isinstance(integer.layer, IntegerLayer)
    assert apart(integer(x), network(x)) < 1e-3


def test_batch_norm_stays_where_a_flip_would_overflow_int8() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = calibrated(behind(weight=PerChannel(8)), x)
    network.norm.weight.data[:] = -1.0
    weight, scale = network.layer.layer.weight.data, network.layer.weight_quantizer.scale.view(-1, 1, 1, 1)
    weight.copy_(weight.maximum(-127 * scale))
    weight[2, 0, 0, 0] = -10.0
    integer = lower(network, x)
    assert integer.layer.codes[2].min() == -128
    assert isinstance(integer.norm, nn.BatchNorm2d)
    network.norm.weight.data[2] = 1.0  # now no channel that holds a -128 is flipped
    assert isinstance(lower(network, x).norm, nn.Identity)


def test_the_activation_inside_timms_batch_norm_remains() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = calibrated(behind(norm=BatchNormAct2d(6, act_layer=nn.ReLU6)), x)
    integer = lower(network, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in integer.modules())
    assert integer(x).min() == 0
    assert apart(integer(x), network(x)) < 1e-3


def test_a_channel_whose_bias_dwarfs_its_weights_is_a_constant() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = calibrated(behind(), x)
    network.layer.layer.weight.data[4] *= 1e-12
    network.layer.weight_quantizer.scale.data[4] *= 1e-12
    integer = lower(network, x)
    assert integer.layer.codes[4].count_nonzero() == 0
    assert torch.allclose(integer(x)[:, 4], network(x)[:, 4], atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "weight", "given", "reason"),
    [
        (ScaledStdConv2d(3, 4, 3), PerChannel(4), Ranged(8), "computes another weight"),
        (nn.ConvTranspose2d(3, 6, 3, groups=3), Odd(4), Ranged(8), "grouped transposed"),
        (nn.Conv2d(3, 4, 3), PerChannel(9), Ranged(8), "codes reach from -256 to 255"),
        (nn.Conv2d(3, 4, 3), PerChannel(4, axis=1), Ranged(8), "axis other than the output channels"),
        (nn.Conv2d(3, 4, 3), PerChannel(4), Ranged(9), "needs 512 codes"),
    ],
)
def test_what_no_8_bit_integer_expresses_stays_as_trained(
    layer: nn.Module, weight: Quantizer, given: Quantizer, reason: str
) -> None:
    x = torch.randn(2, 3, 8, 8)
    layer.weight.data.view(-1)[:2] = torch.tensor([-1.0, 0.999])
    network = calibrated(nn.Sequential(QuantLayer(layer, weight, given)).eval(), x)
    network[0].layer.weight.data.clamp_(-1, 0.999)
    assert reason in obstacles(network)["0"]
    assert torch.equal(lower(network, x)(x), network(x))


def test_the_trained_network_is_left_alone() -> None:
    x = torch.randn(2, 3, 12, 12)
    network = quantize(shaken(Zoo()), x, PerChannel, Ranged, Ranged, STREAMS)
    before, state = network(x), copy.deepcopy(network.state_dict())
    lower(network, x)
    assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("weight", "given", "equal"), [(PerChannel, Ranged, 1.0), (Odd, Interval, 0.97)])
def test_streams_encode_as_trained_but_for_offsets_in_whole_accumulator_steps(
    weight: type[Quantizer], given: type[Quantizer], equal: float
) -> None:
    x = torch.randn(8, 3, 12, 12)
    network = quantize(shaken(Zoo()), x, weight, given, Ranged, STREAMS)
    integer, inputs = lower(network, x), record(network, QuantLayer, x)
    for path, layer in integer.named_modules():
        if isinstance(layer, IntegerLayer):
            trained = network.get_submodule(path).input_quantizer
            steps = layer.stream.codes(inputs[path]).int() + layer.stream.lowest - trained.codes(inputs[path]).int()
            assert steps.abs().max() <= 1, path
            assert (steps == 0).float().mean() >= equal, path
    assert (integer(x).argmax(1) == network(x).argmax(1)).float().mean() >= 7 / 8


def test_an_offset_moves_by_half_an_accumulator_step_at_most() -> None:
    x = torch.randn(8, 3, 12, 12)
    integer = lower(quantize(shaken(Zoo()), x, Odd, Interval, Ranged), x)
    step = integer.stem.stream.scale * integer.stem.scale
    offset = integer.depth.stream.encoder_offset
    assert offset.shape == (7, 1, 1)
    assert ((offset.flatten() - 0.1).abs() <= 0.501 * step).all()
    assert torch.allclose((offset.flatten() / step).round() * step, offset.flatten())
    assert integer.stem.stream.encoder_offset.shape == ()  # nothing that could take it in comes before


def record(network: nn.Module, kind: type[nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What each module of a kind is given."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str):
        return lambda module, given: inputs.__setitem__(path, given[0])

    handles = [m.register_forward_pre_hook(keep(p)) for p, m in network.named_modules() if isinstance(m, kind)]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return inputs


def test_every_layer_of_a_whole_network_is_off_by_its_biass_rounding_alone() -> None:
    x = torch.randn(4, 3, 12, 12)
    network = quantize(shaken(Zoo()), x, PerChannel, Ranged, Ranged, STREAMS)
    integer, inputs = lower(network, x), record(network, QuantLayer, x)
    norms = {"stem": "norm0", "depth": "norm1", "point": "norm2", "group": "norm3", "last": "norm4"}
    for path, given in inputs.items():
        expected = network.get_submodule(path)(given)
        if path in norms:
            norm = network.get_submodule(norms[path])
            expected = (norm.layer if isinstance(norm, QuantOutput) else norm)(expected)
        layer = integer.get_submodule(path)
        allowed = 0.5 * layer.bias_scale.max() + 1e-5 * expected.abs().max()
        assert (layer(given) - expected).abs().max() <= allowed, path


def test_streams_are_codes_from_zero() -> None:
    x = torch.randn(100)
    quantizer = Signed(5)
    quantizer.initialize(x)
    stream = IntegerStream(quantizer)
    assert torch.equal(stream.codes(x).float() - 16, quantizer.codes(x))
    assert torch.equal(stream(x), quantizer(x))
    assert stream(torch.zeros(1)) == 0


def test_a_shared_layer_is_lowered_everywhere() -> None:
    x = torch.rand(2, 4, 6, 6)
    layer = QuantLayer(nn.Conv2d(4, 4, 3, padding=1, bias=False), PerChannel(), Ranged())
    network = calibrated(nn.Sequential(layer, nn.ReLU(), layer).eval(), x)
    integer = lower(network, x)
    assert integer[0] is integer[2]
    assert isinstance(integer[0], IntegerLayer)
    assert apart(integer(x), network(x)) < 1e-5


def test_a_quantizer_that_saw_no_data_is_named() -> None:
    network = nn.Sequential(QuantLayer(nn.Linear(3, 2), PerChannel(), Ranged()))
    network[0].observing = True
    with pytest.raises(UserError, match="0: its quantizer has not seen an input"):
        lower(network, torch.rand(1, 3))


def test_a_float_network_is_only_copied() -> None:
    network, x = shaken(Zoo()), images(2) / 255
    assert torch.equal(lower(network, x)(x), network(x))
