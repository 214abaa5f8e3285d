"""Models of timm and torchvision by name. Nothing is downloaded here."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from galago.errors import UserError
from galago.models.by_name import timm_model, torchvision_model


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18", "efficientnet_b0"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_timm_models_get_their_head_and_channels(name: str, channels: int) -> None:
    model = timm_model(name, classes=3, channels=channels).eval()
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "densenet121", "googlenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_get_their_head_and_channels(name: str, channels: int) -> None:
    model = torchvision_model(name, classes=3, channels=channels)
    assert model(torch.zeros(2, channels, 64, 64)).shape == (2, 3)  # in training mode too


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
def test_a_misspelt_name_gets_suggestions(build: type) -> None:
    with pytest.raises(UserError, match=r"no model 'resnet1888'; did you mean .*resnet18"):
        build("resnet1888", classes=10)


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/model", "someone/model", "hf_hub:x"])
def test_hub_and_folder_names_are_refused(build: type, name: str) -> None:
    with pytest.raises(UserError, match="points to a hub or a folder"):
        build(name, classes=10)


def test_timm_offline_is_a_message_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("[Errno -2] Name or service not known\nmore lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"'resnet18' cannot be had.*not known.*give the file as `weights`"):
        timm_model("resnet18", classes=10, pretrained=True)


class Offline:
    """torchvision's builder, for which fetching fails."""

    def __init__(self) -> None:
        self.real = torchvision.models.get_model

    def __call__(self, name: str, weights: str | None = None, **options: object) -> nn.Module:
        if weights is not None:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")
        made: nn.Module = self.real(name, weights=None, **options)
        return made


def test_torchvision_offline_is_a_message_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", Offline())
    with pytest.raises(UserError, match=r"'resnet18' cannot be had.*not known.*give the file as `weights`"):
        torchvision_model("resnet18", classes=10, pretrained=True)


def test_pretrained_layers_are_kept_and_the_head_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.resnet18(weights=None)
    real = torchvision.models.get_model

    def fetch(name: str, weights: str | None = None, **options: object) -> nn.Module:
        made: nn.Module = real(name, weights=None, **options)
        return published if weights == "DEFAULT" else made

    monkeypatch.setattr(torchvision.models, "get_model", fetch)
    model = torchvision_model("resnet18", classes=3, channels=1, pretrained=True)
    assert torch.equal(model.layer4[1].conv2.weight, published.layer4[1].conv2.weight)  # type: ignore[union-attr,index,arg-type]
    assert model.fc.out_features == 3  # type: ignore[union-attr]
    grey = torch.randn(1, 1, 32, 32)  # three times the red kernel here: the response to a red image, scaled
    red = torch.cat([3 * grey, 0 * grey, 0 * grey], 1)
    torch.testing.assert_close(model.conv1(grey), published.conv1(red))  # type: ignore[operator]


def test_two_sources_of_weights_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contradict"):
        timm_model("resnet18", classes=10, pretrained=True, weights=tmp_path / "weights.pt")


def test_own_weights_are_loaded(tmp_path: Path) -> None:
    teacher = timm_model("mobilenetv3_small_050", classes=3)
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    twin = timm_model("mobilenetv3_small_050", classes=3, weights=tmp_path / "weights.pt")
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), twin.parameters(), strict=True))
