"""Objects as plain data: what is written down is rebuilt, and a stranger's record can do no harm."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.layers import Wrapper
from galago.spec import architecture, build, describe, guard, packages, rebuild, resolve


class Doubled(Wrapper):
    def __init__(self, layer: nn.Module, factor: float = 2.0) -> None:
        super().__init__(layer)
        self.factor = factor

    def forward(self, x):
        return self.layer(x) * self.factor


class Forgetful(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


def test_a_described_object_is_built_again_with_equal_arguments():
    spec = json.loads(json.dumps(describe(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False))))
    again = build(spec)
    assert (again.in_channels, again.out_channels, list(again.stride), again.groups) == (4, 8, [2, 2], 2)
    assert again.bias is None


def test_an_argument_that_is_not_kept_is_named():
    with pytest.raises(UserError, match=r"Forgetful.*'width'"):
        describe(Forgetful(3))


def test_a_bare_sequential_is_refused_rather_than_emptied():
    with pytest.raises(UserError, match="Sequential"):
        describe(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    "path",
    [
        "timm.create_model",
        "torchvision.models.resnet18",
        "timm.models.resnet.resnet18",
        "galago.models.resnet.resnet20",
    ],
)
def test_model_functions_may_be_named(path):
    assert resolve(path) is not None


def small() -> nn.Module:
    spec = {"class_path": "torchvision.models.squeezenet.squeezenet1_1", "init_args": {"num_classes": 4}}
    model = build(spec)
    model.__dict__["built_from"] = spec
    return model


def test_wrapped_layers_are_recorded_and_rebuilt_around_the_original():
    model = small()
    model.features[0] = Doubled(model.features[0], 3.0)
    model.features[3] = Doubled(model.features[3], 0.5)  # a whole block …
    model.features[3].layer.squeeze = Doubled(model.features[3].layer.squeeze)  # … and a layer within it
    record = json.loads(json.dumps(architecture(model)))
    again = rebuild(record, allow=["test_spec", "tests"])
    assert again.state_dict().keys() == model.state_dict().keys()
    again.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again.eval()(image), model.eval()(image), rtol=0, atol=0)


def test_a_layer_of_another_size_is_recorded_and_rebuilt_within_its_wrapper():
    model = small()
    wide, squeeze = nn.Conv2d(3, 70, 3, stride=2), nn.Conv2d(70, 16, 1)
    model.features[0], model.features[3].squeeze = Doubled(wide), squeeze
    record = json.loads(json.dumps(architecture(model)))
    assert [(change["path"], "shapes" in change) for change in record["changes"]] == [
        ("features.0", True),
        ("features.0", False),
        ("features.3.squeeze", True),
    ]
    again = rebuild(record, allow=["test_spec", "tests"])
    again.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again.eval()(image), model.eval()(image), rtol=0, atol=0)


def test_a_replaced_layer_is_recorded():
    model = small()
    model.features[1] = nn.LeakyReLU(0.3)
    again = rebuild(json.loads(json.dumps(architecture(model))))
    assert isinstance(again.features[1], nn.LeakyReLU)
    assert again.features[1].negative_slope == 0.3


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.os.system",
        "torch.utils.cpp_extension.load",
        "torch.serialization.os.remove",
        "torchvision.datasets.utils.download_url",
        "galago.models.weights.read_weights",
        "galago.models.weights.load_weights",
        "torchvision.models.get_weight",
        "timm.models.load_checkpoint",
        "timm.models.load_pretrained",
        "timm.utils.model.torch.load",
        "torch.nn.Module.load_state_dict",
        "galago.cli.main",
        "galago.train.train",
        "galago.models.weights.Path",
        "torch",
        "",
        "torch..nn",
        "torch.nn.__builtins__",
        7,
        None,
    ],
)
def test_a_record_cannot_name_what_is_not_a_network(path):
    with pytest.raises(UserError, match=r"refused|dotted|exist"):
        build({"class_path": path, "init_args": {}})


def test_a_record_neither_downloads_nor_reads_weights():
    refused = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "checkpoint_path": "/x"}}
    with pytest.raises(UserError, match="refused"):
        build(refused)
    with pytest.raises(UserError, match="refused"):
        build({"class_path": "timm.create_model", "init_args": {"model_name": "hf-hub:someone/something"}})
    net = build({"class_path": "torchvision.models.resnet18", "init_args": {"weights": "DEFAULT", "num_classes": 3}})
    assert net.fc.out_features == 3


def test_guard_finds_a_foreign_class_however_deep():
    with pytest.raises(UserError, match="posix"):
        guard({"data": {"init_args": {"augment": [{"class_path": "posix.system"}]}}})


def test_packages_of_a_recipe_are_found_however_deep():
    recipe = {"data": {"init_args": {"augment": [{"class_path": "mine.Crop"}]}}, "model": {"class_path": "galago.x.Y"}}
    assert packages(recipe) == ["galago", "mine"]


def test_a_package_may_be_allowed_by_name():
    assert resolve("collections.OrderedDict", allow=["collections"]) is not None


@pytest.mark.parametrize(
    "record", [None, [], {}, {"model": 3}, {"model": {"class_path": "torch.nn.ReLU"}, "changes": 4}]
)
def test_a_malformed_record_is_refused_in_words(record):
    with pytest.raises(UserError):
        rebuild(record)
