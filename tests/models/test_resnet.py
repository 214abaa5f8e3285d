"""ResNets for small images: sizes, shortcuts, published weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from galago.models.resnet import (
    ResNet,
    Subsample,
    resnet18_cifar,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from galago.spec import build, describe

DATA = Path(os.environ.get("GALAGO_DATA", Path(__file__).parents[3] / "shared/data"))


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (resnet20, 269_722),
        (resnet32, 464_154),
        (resnet44, 658_586),
        (resnet56, 853_018),
        (resnet110, 1_727_962),
        (resnet18_cifar, 11_173_962),
    ],
)
def test_networks_have_the_published_number_of_parameters(network: type, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network().parameters()) == parameters


def test_option_a_takes_every_second_pixel_and_pads_on_both_sides() -> None:
    x = torch.randn(2, 4, 6, 6)
    output = Subsample(4, 8, 2)(x)
    assert torch.equal(output[:, 2:6], x[:, :, ::2, ::2])
    assert not output[:, :2].any()
    assert not output[:, 6:].any()


def test_an_odd_number_of_new_channels_is_padded_to_the_full_width() -> None:
    assert Subsample(4, 9, 2)(torch.ones(1, 4, 5, 5)).shape == (1, 9, 3, 3)


def test_no_activation_module_is_called_twice() -> None:
    calls: list[nn.Module] = []
    network = resnet20().eval()
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    network(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == 19


def test_classes_and_channels_are_free() -> None:
    assert resnet20(classes=7, channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert resnet18_cifar(classes=100)(torch.zeros(2, 3, 64, 64)).shape == (2, 100)


def test_a_network_can_be_written_down_and_rebuilt() -> None:
    network = ResNet([1, 1], [8, 16], classes=3, project=True).eval()
    twin = build(describe(network)).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(x), network(x))


@pytest.fixture(scope="module")
def test_images() -> tuple[Tensor, Tensor]:
    if not (DATA / "cifar-10/test_00.webp").is_file():
        pytest.skip(f"no CIFAR-10 sheets in {DATA}; set GALAGO_DATA")
    sheet = np.array(Image.open(DATA / "cifar-10/test_00.webp").convert("RGB"))
    tiles = sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    labels = np.load(DATA / "cifar-10/labels.npz")["test"][:1000].astype(np.int64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.from_numpy(tiles.copy()).float() / 255
    return (image - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(labels)


@pytest.mark.parametrize(
    ("network", "file", "right"), [(resnet20, "resnet20-12fca82f.th", 915), (resnet56, "resnet56-4bfd9763.th", 926)]
)
def test_published_weights_reach_their_accuracy(
    test_images: tuple[Tensor, Tensor], network: type, file: str, right: int
) -> None:
    image, label = test_images
    model = network(weights=DATA / "pretrained-cifar10-resnet" / file).eval()
    with torch.inference_mode():
        scores = torch.cat([model(part) for part in image.split(100)])
    assert int((scores.argmax(1) == label).sum()) == right
