"""A network that others quantized and deployed: MLPerf Tiny's ResNet-8, in float and as its reference int8 model.

Our quantizers, given its published scales and zero points, hold its published integers and reach its accuracy; so does
the file that is exported from them. Images and numbers: `pretrained-resnet8-int8` and `cifar-10` of the real data.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Normalize
from galago.deploy import onnx, runtime
from galago.deploy.integer import lower
from galago.deploy.integer_layers import IntegerLayer
from galago.layers import find
from galago.probe import Deployed
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.fold import fold_norm
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantize import Quantize, Rule
from galago.quantize.quantizer import Quantizer
from galago.tasks.classify import Classify
from samples import Batches

FLOAT, INTEGER = 881, 877  # of the first 1,000 test images, as the data's own page says


class Numbers(NamedTuple):
    """Where one layer's numbers lie in the published file."""

    weight: int
    bias: int
    taken: int  # what it takes in
    norm: str = ""  # folded into it


LAYERS = {
    "conv2d": Numbers(8, 3, 0, "batch_normalization"),
    "conv2d_1": Numbers(9, 4, 22, "batch_normalization_1"),
    "conv2d_2": Numbers(10, 17, 23, "batch_normalization_2"),
    "conv2d_3": Numbers(11, 5, 25, "batch_normalization_3"),
    "conv2d_4": Numbers(12, 18, 26, "batch_normalization_4"),
    "conv2d_5": Numbers(13, 19, 25),
    "conv2d_6": Numbers(14, 6, 29, "batch_normalization_5"),
    "conv2d_7": Numbers(15, 20, 30, "batch_normalization_6"),
    "conv2d_8": Numbers(16, 21, 29),
    "dense": Numbers(7, 1, 35),
}
STREAMS = {
    "activation": 22,
    "batch_normalization_2": 24,
    "activation_2": 25,
    "batch_normalization_4": 27,
    "conv2d_5": 28,
    "activation_4": 29,
    "batch_normalization_6": 31,
    "conv2d_8": 32,
    "activation_6": 33,
}


class ResNet8(nn.Module):
    """The float network, with the names it has in its file; pads as TensorFlow does, at the bottom and right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2d_1, self.conv2d_2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.conv2d_3, self.conv2d_4 = nn.Conv2d(16, 32, 3, 2), nn.Conv2d(32, 32, 3, padding=1)
        self.conv2d_5 = nn.Conv2d(16, 32, 1, 2)
        self.conv2d_6, self.conv2d_7 = nn.Conv2d(32, 64, 3, 2), nn.Conv2d(64, 64, 3, padding=1)
        self.conv2d_8 = nn.Conv2d(32, 64, 1, 2)
        for number, channels in enumerate((16, 16, 16, 32, 32, 64, 64)):
            name = f"_{number}" if number else ""
            setattr(self, f"batch_normalization{name}", nn.BatchNorm2d(channels, eps=1e-3))
            setattr(self, f"activation{name}", nn.ReLU())
        self.pad, self.pool, self.dense = nn.ZeroPad2d((0, 1, 0, 1)), nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.batch_normalization(self.conv2d(x)))
        y = self.activation_1(self.batch_normalization_1(self.conv2d_1(x)))
        x = self.activation_2(x + self.batch_normalization_2(self.conv2d_2(y)))
        y = self.activation_3(self.batch_normalization_3(self.conv2d_3(self.pad(x))))
        x = self.activation_4(self.conv2d_5(x) + self.batch_normalization_4(self.conv2d_4(y)))
        y = self.activation_5(self.batch_normalization_5(self.conv2d_6(self.pad(x))))
        x = self.activation_6(self.conv2d_8(x) + self.batch_normalization_6(self.conv2d_7(y)))
        return self.dense(self.pool(x).flatten(1))


class Sheets(Data):
    """The first 1,000 training and test images of CIFAR-10, as numbers from 0 to 255."""

    classes = tuple("0123456789")

    def __init__(self, folder: Path) -> None:
        self.folder, self.batch_size = folder, 128
        self.normalize = Normalize([0.0] * 3, [1 / 255] * 3)
        self.labels = np.load(folder / "labels.npz")["test"][:1000].astype(np.int64)

    def read(self, sheet: str) -> Tensor:
        tiles = np.asarray(Image.open(self.folder / sheet).convert("RGB")).reshape(25, 32, 40, 32, 3)
        return torch.from_numpy(tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32).copy())

    def train(self, epoch: int = 0, start: int = 0) -> Batches:
        batches = self.read("train_00.webp").split(self.batch_size)[start:]
        return Batches(Batch(image, torch.zeros(len(image), 10)) for image in batches)

    def validation(self) -> Batches:
        parts = zip(
            self.read("test_00.webp").split(self.batch_size),
            torch.from_numpy(self.labels).split(self.batch_size),
            strict=True,
        )
        return Batches(Batch(image, nn.functional.one_hot(label, 10).float()) for image, label in parts)

    def example(self) -> Tensor:
        return self.validation()[0].input[:1]


Arrays = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(real_data: Path) -> Sheets:
    if not (real_data / "cifar-10" / "test_00.webp").is_file():
        pytest.skip(f"no CIFAR-10 sheets in {real_data}; set GALAGO_DATA")
    return Sheets(real_data / "cifar-10")


@pytest.fixture(scope="module")
def published(real_data: Path) -> tuple[Arrays, Arrays]:
    """The float weights, and everything in the int8 model."""
    folder = real_data / "pretrained-resnet8-int8"
    if not (folder / "resnet8_int8.npz").is_file():
        pytest.skip(f"no pretrained-resnet8-int8 in {real_data}; set GALAGO_DATA")
    found = []
    for name in ("resnet8_fp32.npz", "resnet8_int8.npz"):
        with np.load(folder / name) as file:
            found.append({key: torch.from_numpy(file[key]) for key in file.files})
    return found[0], found[1]


def float_network(published: tuple[Arrays, Arrays]) -> ResNet8:
    network = ResNet8().eval()
    assert not network.load_state_dict(published[0], strict=False).unexpected_keys
    return network


def quantize() -> Quantize:
    whole = CalibratedWeight(8, "min_max", per_channel=False)  # the published last layer has one scale
    return Quantize(
        CalibratedWeight(8, "min_max"),
        Calibrated(8, "min_max"),
        rules=[Rule("dense", weight=whole, input=Calibrated(8, "min_max"))],
        stream=Calibrated(8, "min_max"),
    )


def write(quantizer: Quantizer, integer: Arrays, index: int) -> None:
    """Gives a quantizer a published range; codes count from 0 here, from -128 there."""
    assert isinstance(quantizer, Calibrated)
    quantizer.scale.copy_(integer[f"s{index}"][0])
    quantizer.zero_point.copy_(integer[f"z{index}"][0] + 128)


@pytest.fixture(scope="module")
def as_published(published: tuple[Arrays, Arrays], data: Sheets) -> nn.Module:
    """The float network with BatchNorm folded, in our quantizers, with the published ranges."""
    network: nn.Module = float_network(published)
    for path, numbers in LAYERS.items():
        if numbers.norm:
            network = fold_norm(network, path, numbers.norm)
    method = quantize()
    network = method.prepare(network, data)
    integer = published[1]
    streams = {path.removesuffix(".layer"): m for path, m in network.named_modules() if isinstance(m, QuantOutput)}
    assert streams.keys() == STREAMS.keys()
    for path, stream in streams.items():
        write(stream.output_quantizer, integer, STREAMS[path])
    for path, numbers in LAYERS.items():
        layer = layer_of(network, path)
        write(layer.input_quantizer, integer, numbers.taken)
        found, scale = layer.weight_quantizer, integer[f"s{numbers.weight}"]
        torch.testing.assert_close(found.scale, scale.view_as(found.scale), rtol=1e-6, atol=0)  # by our own search
        found.scale.copy_(scale.view_as(found.scale))
    return method.finish(network)  # biases in steps of the accumulator


def layer_of(network: nn.Module, path: str) -> QuantLayer:
    layer = find(network, path)
    layer = layer.layer if isinstance(layer, QuantOutput) else layer
    assert isinstance(layer, QuantLayer)
    return layer


def decisions(network: nn.Module, data: Sheets) -> Tensor:
    """Of the 1,000 test images, from raw images on."""
    with torch.inference_mode():
        return torch.cat([network(batch.input) for batch in data.test()]).argmax(1)


def right(found: Tensor, data: Sheets) -> int:
    """How many of them are right."""
    return int((found == torch.from_numpy(data.labels)).sum())


def test_the_float_network_reaches_its_accuracy(published: tuple[Arrays, Arrays], data: Sheets) -> None:
    assert right(decisions(Deployed(float_network(published), data.normalize, Classify(10)), data), data) == FLOAT


def test_our_integer_weights_are_the_published_ones(as_published: nn.Module, published: tuple[Arrays, Arrays]) -> None:
    for path, numbers in LAYERS.items():
        layer, expected = layer_of(as_published, path), published[1][f"t{numbers.weight}"]
        weight, quantizer = layer.layer.weight.detach(), layer.weight_quantizer
        expected = expected.permute(0, 3, 1, 2) if expected.ndim == 4 else expected
        different = quantizer.codes(weight) != expected
        # Where a weight lies halfway between two codes, folding in float32 decides: 2 of 77,360 here.
        scale = quantizer.scale.double().view(-1, *[1] * (weight.ndim - 1))
        halfway = ((weight.double() / scale).frac().abs() - 0.5).abs()
        assert different.sum() <= 2, path
        assert (halfway[different] < 1e-4).all(), path


def test_our_integer_biases_are_the_published_ones(
    as_published: nn.Module, published: tuple[Arrays, Arrays], data: Sheets
) -> None:
    lowered = lower(as_published, data.normalize(data.example()))
    for path, numbers in LAYERS.items():
        layer = find(lowered, path)
        layer = layer if isinstance(layer, IntegerLayer) else layer.layer
        expected = published[1][f"t{numbers.bias}"]
        assert (layer.bias_codes - expected).abs().max() <= 1, path


def test_with_the_published_ranges_the_accuracy_is_the_published_one(
    as_published: nn.Module, data: Sheets, tmp_path: Path
) -> None:
    deployed = Deployed(as_published, data.normalize, Classify(10)).eval()
    trained = decisions(deployed, data)
    file = runtime.load(onnx.export(deployed, data.example(), tmp_path / "model.onnx"), threads=1)
    shipped = decisions(file, data)
    assert abs(right(trained, data) - INTEGER) <= 3  # measured: 876 both, 99.7 % equal
    assert abs(right(shipped, data) - INTEGER) <= 3
    assert (shipped == trained).float().mean() >= 0.99


def test_quantized_by_galago_itself_it_loses_as_little(published: tuple[Arrays, Arrays], data: Sheets) -> None:
    method = Quantize(CalibratedWeight(), Calibrated(), stream=Calibrated(), batches=4, post_training=True)
    network = method.finish(method.prepare(float_network(published), data))
    found = decisions(Deployed(network, data.normalize, Classify(10)), data)
    assert right(found, data) >= 875  # measured: 882
