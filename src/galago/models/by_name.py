"""Networks of other libraries by their names: any classifier of timm or torchvision, with the head and input it needs.

Wightman, "PyTorch Image Models" (timm), 2019; the torchvision maintainers, "TorchVision", 2016.

The network is the library's own, unchanged but for the number of classes and of input channels. Published weights are
fetched only with `pretrained: true`, and then the head (where the number of classes differs) starts fresh. For other
than three input channels the first convolution's pretrained weights repeat red, green, blue, red, … scaled by 3/C, so
that an image with equal channels gives the response it had before.

When to use it: photographs; a network that is already trained on ImageNet. For 32-pixel images take `models.resnet`.
timm's list is at `timm.list_models()`, torchvision's at `torchvision.models.list_models()`. A name that points to a hub
or a folder (`hf-hub:…`) is refused: it would run or fetch what a recipe's reader cannot see.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import swap
from galago.models.weights import load_weights


def timm_model(
    name: str, classes: int, channels: int = 3, pretrained: bool = False, weights: Path | None = None
) -> nn.Module:
    """A classifier of timm.

    Args:
        name: as in `timm.list_models()`, such as `mobilenetv3_small_100`; a tag after a dot chooses among weights.
        classes: number of outputs.
        channels: of the input image.
        pretrained: start from published weights; needs the network (or timm's cache).
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from instead.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    _check(name, "timm", timm.is_model(name.partition(".")[0]), timm.list_models())
    _one_source(name, pretrained, weights)
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _refused(name, pretrained, error) from error
    return _noted(load_weights(model, weights), timm_model, name, classes, channels)


def torchvision_model(
    name: str, classes: int, channels: int = 3, pretrained: bool = False, weights: Path | None = None
) -> nn.Module:
    """A classifier of torchvision.

    Args:
        name: as in `torchvision.models.list_models()`, such as `resnet18`.
        classes: number of outputs.
        channels: of the input image.
        pretrained: start from published weights; needs the network (or torchvision's cache).
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from instead.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    _check(name, "torchvision", name in known, known)
    _one_source(name, pretrained, weights)
    options = _without_auxiliary_heads(name, pretrained)
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        if pretrained:
            _copy_fitting(model, torchvision.models.get_model(name, weights="DEFAULT").state_dict())
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _refused(name, pretrained, error) from error
    return _noted(load_weights(_with_channels(model, channels), weights), torchvision_model, name, classes, channels)


def _noted(model: nn.Module, maker: Callable[..., nn.Module], name: str, classes: int, channels: int) -> nn.Module:
    """The model with a note of how it was made, so that a run can write it down (`galago.spec`)."""
    arguments = {"name": name, "classes": classes, "channels": channels}
    model.__dict__["built_from"] = {"class_path": f"{__name__}.{maker.__name__}", "init_args": arguments}
    return model


def _check(name: str, library: str, known: bool, names: Iterable[str]) -> None:
    if ":" in name or "/" in name:
        raise UserError(f"model name {name!r} points to a hub or a folder; name a model of {library} itself")
    if not known:
        near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"print {library}'s list of models to choose one"
        raise UserError(f"{library} has no model {name!r}; {hint}")


def _one_source(name: str, pretrained: bool, weights: Path | None) -> None:
    if pretrained and weights is not None:
        raise UserError(f"{name}: `pretrained: true` and `weights: {weights}` contradict each other; give one of them")


def _refused(name: str, pretrained: bool, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0][:200]
    if pretrained:
        return UserError(
            f"pretrained weights of {name!r} cannot be had: {reason}."
            " Go online once, or download them and give the file as `weights`"
        )
    return UserError(f"{name!r} cannot be built with these classes and channels: {reason}")


def _without_auxiliary_heads(name: str, pretrained: bool) -> dict[str, Any]:
    """The two Inception networks would otherwise answer a tuple while training."""
    if name not in ("googlenet", "inception_v3"):
        return {}
    return {"aux_logits": False, "init_weights": not pretrained, "transform_input": pretrained}


def _copy_fitting(model: nn.Module, published: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {name: value for name, value in published.items() if name in own and own[name].shape == value.shape},
        strict=False,
    )


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """The model with a first convolution for so many channels."""
    path, first = next((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    if channels == first.in_channels:
        return model
    new = nn.Conv2d(
        channels,
        first.out_channels,
        _pair(first.kernel_size),
        _pair(first.stride),
        _pair(first.padding),
        bias=first.bias is not None,
    )
    with torch.no_grad():
        repeated = torch.arange(channels) % first.in_channels
        new.weight.copy_(first.weight[:, repeated] * (first.in_channels / channels))
        if new.bias is not None and first.bias is not None:
            new.bias.copy_(first.bias)
    return swap(model, path, new)


def _pair(size: Sequence[int] | str) -> tuple[int, int]:
    return int(size[0]), int(size[1])
