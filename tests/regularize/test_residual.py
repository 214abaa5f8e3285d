"""Finding residual branches in networks as they are written, scaling them, and leaving nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, close, exported
from galago.layers import find
from galago.models.resnet import resnet18_cifar, resnet20
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQWeight
from galago.regularize.residual import Branch, fold_survival, residuals, said, scale_branches, survival
from samples import SmallNet

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")


class Kept(Branch):
    """Passes what it gets."""

    def perturbed(self, y: Tensor) -> Tensor:
        return y


def scaled(model: nn.Module, last: float = 0.5) -> nn.Module:
    return scale_branches(model, TinyImages(), Kept, last)


def test_survival_falls_in_a_straight_line_to_that_of_the_last_branch() -> None:
    np.testing.assert_allclose(survival(12, 0.5), GOLDEN["shakedrop_survival_L12_pL0.5"], rtol=1e-12)
    assert survival(3, 1.0) == [1.0, 1.0, 1.0]
    assert survival(1, 0.0) == [0.0]


def test_the_branches_of_a_resnet_end_in_its_blocks_second_batchnorms() -> None:
    wanted = [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3) for block in range(3)]
    assert residuals(resnet20(), torch.zeros(1, 3, 32, 32)).branches == wanted


def test_a_projection_is_a_shortcut_and_no_branch() -> None:
    found = residuals(resnet18_cifar(), torch.zeros(1, 3, 32, 32))
    assert found.branches == [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in range(2)]
    assert not found.others


@pytest.mark.parametrize(
    ("model", "first", "last", "count"),
    [
        (lambda: torchvision.models.resnet18(), "layer1.0.bn2", "layer4.1.bn2", 8),
        (lambda: torchvision.models.resnet50(), "layer1.0.bn3", "layer4.2.bn3", 16),
        (lambda: torchvision.models.mobilenet_v2(), "features.3.conv.3", "features.16.conv.3", 10),
        (lambda: timm.create_model("resnet18"), "layer1.0.bn2", "layer4.1.bn2", 8),
        (lambda: timm.create_model("resnet26"), "layer1.0.bn3", "layer4.1.bn3", 8),
        (lambda: timm.create_model("mobilenetv3_small_050"), "blocks.1.1.bn3", "blocks.4.2.bn3", 7),
        (lambda: timm.create_model("test_vit"), "blocks.0.attn.proj", "blocks.5.mlp.fc2", 12),
    ],
)
def test_branches_are_found_in_networks_of_torchvision_and_timm(model, first: str, last: str, count: int) -> None:
    network = model().eval()
    size = 160 if "VisionTransformer" in type(network).__name__ else 64
    found = residuals(network, torch.zeros(1, 3, size, size)).branches
    assert (found[0], found[-1], len(found)) == (first, last, count)


def test_in_evaluation_each_branch_is_as_strong_as_on_average() -> None:
    model, image = SmallNet().eval(), torch.randn(2, 3, 8, 8)
    wrapped = scaled(copy.deepcopy(model), 0.3)
    stem = model.relu1(model.bn1(model.conv1(image)))
    wanted = model.fc(model.pool(model.relu2(stem + 0.3 * model.bn2(model.conv2(stem)))).flatten(1))
    torch.testing.assert_close(wrapped(image), wanted)
    assert said(wrapped) == "bn2 0.3"


@pytest.mark.parametrize("make", [resnet20, lambda: timm.create_model("test_vit", img_size=8, patch_size=4)])
def test_when_training_ends_the_answer_is_the_same_and_nothing_is_left(make) -> None:
    model = make().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                nn.init.normal_(tensor)
    image = torch.randn(2, 3, 8, 8)
    names, plain = list(model.state_dict()), model(image)
    wrapped = scaled(model)
    before = wrapped(image)
    after = fold_survival(wrapped)
    assert not any(isinstance(part, Branch) for part in after.modules())
    assert list(after.state_dict()) == names
    assert close(before, after(image))
    assert not close(before, plain)
    assert close(before, exported(after, image), 1e-4)


def test_a_copy_of_the_network_is_folded_too() -> None:
    wrapped, image = scaled(SmallNet().eval()), torch.randn(2, 3, 8, 8)
    average = copy.deepcopy(wrapped)
    assert close(wrapped(image), fold_survival(average)(image))
    assert any(isinstance(part, Branch) for part in wrapped.modules())


def test_a_branch_that_is_wrapped_twice_is_scaled_twice_and_free_again() -> None:
    image = torch.randn(2, 3, 8, 8)
    twice = scaled(scaled(SmallNet().eval()))
    before = twice(image)
    assert close(before, fold_survival(twice)(image))
    assert isinstance(find(twice, "bn2"), nn.BatchNorm2d)


class Odd(nn.Module):
    """Sums that are no residual branch: with a stored tensor, of equals, read twice, behind an activation."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.place = nn.Parameter(torch.ones(1, 3, 8, 8))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        if self.which == "stored":
            return first + self.place
        if self.which == "equals":
            return first + self.second(x)
        if self.which == "read twice":
            return (x + first) * first
        return x + self.activation(first)


@pytest.mark.parametrize(
    ("which", "why"),
    [
        ("stored", "it adds none to a shortcut"),
        ("equals", "it adds none to a shortcut"),
        ("read twice", "the network itself: more than the sum reads"),
        ("activation", "does not end in a layer with a weight"),
    ],
)
def test_a_network_without_a_branch_that_can_be_dropped_is_refused_with_the_reason(which: str, why: str) -> None:
    with pytest.raises(UserError, match=f"Odd has no residual branch that can be dropped .*{why}"):
        scaled(Odd(which))


def test_what_cannot_take_a_factor_into_its_weights_is_left_alone() -> None:
    plain = SmallNet()
    plain.bn2 = nn.BatchNorm2d(7, affine=False)
    assert "no weight" in residuals(plain, torch.zeros(1, 3, 8, 8)).others["the network itself"]
    quantized = SmallNet()
    quantized.bn2 = QuantLayer(nn.Conv2d(7, 7, 1), LSQWeight(4))
    assert "quantized weight" in residuals(quantized, torch.zeros(1, 3, 8, 8)).others["the network itself"]


def test_looking_draws_no_random_numbers_and_changes_nothing() -> None:
    model = SmallNet().train()
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    residuals(model, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
