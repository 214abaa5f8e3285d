"""Layers of other sizes: written down, built again, and no more than that for a stranger's record."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.models.resnet import resnet20
from galago.sizes import Narrows, resize, sizes_of, store
from galago.spec import architecture, rebuild


def described(model: nn.Module, name: str) -> nn.Module:
    model.__dict__["built_from"] = {"class_path": f"galago.models.resnet.{name}", "init_args": {}}
    return model


def test_a_layer_as_it_was_built_has_nothing_to_write_down() -> None:
    assert sizes_of(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)) == {}
    assert architecture(described(resnet20(), "resnet20"))["changes"] == []


def test_a_narrower_layer_is_built_again() -> None:
    narrow = nn.Conv2d(3, 4, 3, groups=1)
    sizes = json.loads(json.dumps(sizes_of(nn.Conv2d(5, 6, 3), narrow)))
    again = nn.Conv2d(5, 6, 3)
    resize(again, sizes)
    again.load_state_dict(narrow.state_dict())
    assert (again.in_channels, again.out_channels) == (3, 4)
    assert torch.equal(again(torch.ones(1, 3, 5, 5)), narrow(torch.ones(1, 3, 5, 5)))


def test_a_network_with_other_sizes_is_rebuilt_with_its_zeros_of_option_a() -> None:
    model = described(resnet20(), "resnet20")
    shortcut = model.layer2[0].shortcut
    assert isinstance(shortcut, Narrows)
    taken, given = torch.ones(16, dtype=torch.bool), torch.ones(32, dtype=torch.bool)
    taken[3], given[[0, 1, 8 + 3, 31]] = False, False
    shortcut.keep_channels(taken, given)
    store(model.layer2[0].conv2, "weight", model.layer2[0].conv2.weight.data[given])
    record = json.loads(json.dumps(architecture(model)))
    assert [change["path"] for change in record["changes"]] == ["layer2.0.conv2", "layer2.0.shortcut"]
    again = rebuild(record)
    assert again.layer2[0].conv2.weight.shape == (28, 32, 3, 3)
    image = torch.randn(1, 15, 4, 4)
    assert torch.equal(again.layer2[0].shortcut(image), shortcut(image))
    assert shortcut(image).shape == (1, 28, 2, 2)
    assert torch.equal(shortcut(image)[:, 6:21], image[:, :, ::2, ::2])


def test_a_stored_tensor_stays_of_its_kind() -> None:
    norm = nn.BatchNorm2d(4)
    norm.weight.requires_grad_(False)
    store(norm, "weight", torch.zeros(2))
    store(norm, "running_mean", torch.zeros(2))
    assert isinstance(norm.weight, nn.Parameter)
    assert not norm.weight.requires_grad
    assert "running_mean" in dict(norm.named_buffers())


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"shapes": {"wieght": [2, 2]}, "numbers": {}}, "wrong shape: wieght"),
        ({"shapes": {"weight": [2]}, "numbers": {}}, "wrong shape"),
        ({"shapes": {"weight": [2, -1]}, "numbers": {}}, "wrong shape"),
        ({"shapes": {"weight": [2, "2"]}, "numbers": {}}, "wrong shape"),
        ({"shapes": {"weight": 4}, "numbers": {}}, "wrong shape"),
        ({"shapes": {}, "numbers": {"forward": 3}}, "wrong number: forward"),
        ({"shapes": {}, "numbers": {"in_features": "import os"}}, "wrong number"),
        ({"shapes": {}, "numbers": {"training": True}}, "wrong number"),
        ({"shapes": []}, "no sizes"),
    ],
)
def test_a_strangers_sizes_change_nothing_else(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resize(nn.Linear(4, 4), sizes)


def test_growing_is_as_good_as_shrinking() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layer = Wide(2, 2)
    resize(layer, sizes_of(nn.Linear(2, 2), nn.Linear(3, 5)))
    assert layer(torch.ones(1, 3)).shape == (1, 5)
