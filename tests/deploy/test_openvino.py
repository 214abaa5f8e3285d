"""The OpenVINO files: integers throughout, and no rounding left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from onnx import save
from torch import Tensor, nn

from galago.deploy import onnx, openvino
from galago.deploy.pack import pack
from galago.deploy.runtime import OnnxRuntime, OpenVINO, load
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from integers import Exported, Interval, Maker, Odd, PerChannel, Ranged, deployed, images, quantize, shaken


def test_every_layer_runs_as_int8(zoo: Exported) -> None:
    found = [made for made in OpenVINO(zoo.xml).operations() if made.kind in ("Convolution", "FullyConnected")]
    assert len(found) == 6
    assert all(made.kernel.endswith("_I8") for made in found)
    assert {made.name.partition(".")[0] for made in found} >= {"stem", "depth", "point", "group", "last", "fc"}


def test_the_sum_is_of_rounded_addends(zoo: Exported) -> None:
    image = images(64)
    integer = zoo.codes(image)["relu4.stream"]
    assert torch.equal(OpenVINO(zoo.xml).look(image)[1]["relu4.stream"], integer)
    model = onnx.build(zoo.integer, image)
    pools = [node.name for node in openvino.keep_roundings(model).graph.node if node.op_type == "MaxPool"]
    assert sorted(pools) == ["norm4.stream/DequantizeLinear/kept", "relu2.stream/DequantizeLinear/kept"]


def test_weights_take_a_byte_each(zoo: Exported) -> None:
    weights = sum(layer.codes.numel() for layer in onnx.integer_layers(zoo.integer).values())
    assert weights < zoo.xml.with_suffix(".bin").stat().st_size < weights + 3000


def residual(name: str) -> nn.Module:
    """A published architecture, with streams where a user would have put them."""
    torch.manual_seed(0)
    return shaken(timm.create_model(name, num_classes=5))


BLOCKS = ("layer1", "layer2", "layer3", "layer4")
RESNET = (
    "maxpool",
    *(f"{block}.{i}.bn2" for block in BLOCKS for i in (0, 1)),
    *(f"{block}.{i}.act2" for block in BLOCKS for i in (0, 1)),
    *(f"{block}.0.downsample" for block in BLOCKS[1:]),
)


def agrees(whole: Exported, size: int) -> None:
    """Each stream's codes in each engine, one step at most and hardly ever."""
    image = images(4, size)
    expected = whole.codes(image)
    for file in (whole.onnx, whole.xml):
        output, found = load(file).look(image)
        assert torch.equal(load(file)(image), output)
        assert found.keys() == expected.keys()
        for path, codes in expected.items():
            steps = (codes.int() - found[path].int()).abs()
            assert (steps == 0).float().mean() >= 0.99, (file.name, path)


def exported(network: nn.Module, folder: Path, size: int) -> Exported:
    whole, image = deployed(network), images(1, size)
    integer = onnx.lowered(whole, image)
    model = onnx.build(integer, image)
    save(pack(model, onnx.integer_layers(integer)), folder / "model.onnx")
    openvino.write(model, folder / "model.xml")
    return Exported(whole, integer, folder / "model.onnx", folder / "model.xml")


def test_timms_resnet18_runs_as_integers_in_both_engines(tmp_path: Path) -> None:
    network = quantize(residual("resnet18"), torch.randn(4, 3, 32, 32), PerChannel, lambda: Ranged(4), Ranged, RESNET)
    whole = exported(network, tmp_path, 32)
    agrees(whole, 32)
    runtime = [made.kind for made in OnnxRuntime(whole.onnx).operations()]
    assert (runtime.count("QLinearConv"), runtime.count("QLinearAdd"), runtime.count("QGemm")) == (20, 8, 1)
    layers = [made for made in OpenVINO(whole.xml).operations() if made.kind in ("Convolution", "FullyConnected")]
    assert len(layers) == 21
    assert all(made.kernel.endswith("I8") for made in layers)
    parameters = sum(parameter.numel() for parameter in residual("resnet18").parameters())
    assert whole.onnx.stat().st_size < 4 * parameters / 7  # of the float file; 8 would be bare weights


class Fork(nn.Module):
    """Streams that are read by layers with quantizers of their own: joined, directly, and behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.joined, self.direct, self.pooled = nn.Conv2d(16, 6, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)
        self.relu1, self.relu2, self.pool = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.relu1(self.one(x)), self.relu2(self.two(x))
        found = self.joined(torch.cat([one, two], 1)), self.direct(two), self.pooled(self.pool(two))
        return torch.cat([each.flatten(1) for each in found], 1)


@pytest.mark.parametrize("ratio", [1.003, 0.997, 1.0, 0.913])
def test_a_scale_that_almost_is_another_stays_what_it_is(ratio: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantize(Fork(), torch.randn(8, 3, 12, 12), PerChannel, Ranged, Ranged, ("relu1", "relu2"))
    for layer in (network.joined, network.direct, network.pooled):
        layer.input_quantizer.scale.data = network.relu2.output_quantizer.scale.data / ratio
    whole, image = exported(network, tmp_path, 12), images(16)
    output, width = whole.integer(image), 6 * 8 * 8
    difference = (OpenVINO(whole.xml)(image) - output).abs()
    for part in difference[:, :width], difference[:, width : 2 * width], difference[:, 2 * width :]:
        assert part.mean() < 1e-4 * output.abs().mean()  # less than any rounding left out; ties of codes differ
    kept = (tmp_path / "model.xml").read_text().count("/kept")
    assert (kept > 0) == (ratio in (1.003, 0.997))  # what costs time stands only where it is needed


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize("tokens", [True, False])
def test_a_pooling_stands_between_tokens_and_their_quantizer(stride: int, tokens: bool, tmp_path: Path) -> None:
    """In DeiT and ConvNeXt the engine gave every channel the bias of the first; a small network does not show it."""
    torch.manual_seed(0)
    expected = stride == 4 or tokens
    behind = nn.Flatten(2) if tokens else nn.Sigmoid()
    network = nn.Sequential(nn.Conv2d(3, 8, 4, stride), behind, nn.Softmax(1), nn.Flatten(1))
    image = images(4)
    whole = exported(quantize(network, torch.randn(4, 3, 12, 12), PerChannel, Ranged, Ranged, ("0",)), tmp_path, 12)
    agrees(whole, 12)
    kept = openvino.keep_biases(onnx.build(whole.integer, image))
    assert sum(node.op_type == "MaxPool" for node in kept.graph.node) == expected


def test_codes_are_thinned_out_before_a_convolution_of_one_pixel_and_nothing_changes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1, stride=2), nn.Flatten())
    image = images(4, 13)
    whole = deployed(quantize(network.eval(), torch.randn(4, 3, 13, 13), PerChannel, Ranged, Ranged))
    plain = onnx.build(whole, image)
    thinned = openvino.thin_codes(plain)
    (pool,) = (node for node in thinned.graph.node if node.op_type == "MaxPool")
    assert next(list(attribute.ints) for attribute in pool.attribute if attribute.name == "strides") == [2, 2]
    save(plain, tmp_path / "plain.onnx")
    save(thinned, tmp_path / "thinned.onnx")
    assert torch.allclose(OnnxRuntime(tmp_path / "thinned.onnx")(image), OnnxRuntime(tmp_path / "plain.onnx")(image))


def test_torchvisions_resnet18_without_streams_gives_the_same_codes(tmp_path: Path) -> None:
    network = shaken(torchvision.models.resnet18(num_classes=5))
    quantize(network, torch.randn(4, 3, 32, 32), lambda: Odd(2), lambda: Interval(2), Ranged)
    agrees(exported(network, tmp_path, 32), 32)


def test_timms_mobilenetv3_runs_as_int8_in_openvino(tmp_path: Path) -> None:
    network = quantize(residual("mobilenetv3_small_100"), torch.randn(4, 3, 32, 32), PerChannel, Ranged, Ranged)
    whole = exported(network, tmp_path, 32)
    agrees(whole, 32)
    layers = [made for made in OpenVINO(whole.xml).operations() if made.kind in ("Convolution", "FullyConnected")]
    assert all(made.kernel.endswith("I8") for made in layers)


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        (lambda: LSQWeight(4), lambda: LSQ(4)),
        (lambda: EWGSWeight(2), lambda: EWGS(2)),
        (lambda: EWGSWeight(8), lambda: EWGS(8)),
        (lambda: MinMaxWeight(8), lambda: MinMax(8)),
    ],
)
def test_the_published_quantizers_run_as_integers_in_both_engines(weight: Maker, given: Maker, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 9, 3, bias=False))
    network.extend([nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    quantize(shaken(network), torch.randn(8, 3, 12, 12), weight, given, Ranged)
    for module in network.modules():
        if isinstance(module, EWGS) and not isinstance(module, EWGSWeight):
            module.low.data += 0.05 * module.high.data  # as after training
    whole = exported(network, tmp_path, 12)
    agrees(whole, 12)
    assert sum(made.kind == "QLinearConv" for made in OnnxRuntime(whole.onnx).operations()) == 2


def test_random_sources_without_a_seed_are_two_and_normal(tmp_path: Path) -> None:
    class Noises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            still = 0 * x
            return torch.stack([torch.randn_like(still + one) for one in (0, 1)], 1).flatten(1)

    image = images(2)
    openvino.export(deployed(Noises()), image, tmp_path / "noise.xml")
    artifact = OpenVINO(tmp_path / "noise.xml")
    found = torch.stack([artifact(images(64)) for _ in range(2)]).unflatten(2, (2, -1))
    assert abs(found.mean()) < 0.02
    assert abs(found.std() - 1) < 0.02
    for one, other in ((found[0], found[1]), (found[:, :, 0], found[:, :, 1])):
        assert abs((one * other).mean()) < 0.03
