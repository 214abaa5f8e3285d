"""The stages of a network, for whoever does not want to name layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, removing, tap
from galago.probe import device_of, evaluating, normalized


@torch.no_grad()
def stages(model: nn.Module, image: Tensor) -> list[str]:
    """The last module at each resolution, from the largest to the smallest: where a network's stages end.

    Args:
        model: in evaluation mode.
        image: normalized, N×C×H×W.

    >>> stages(nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), torch.zeros(1, 1, 9, 9))
    ['1', '2']
    """
    ends: dict[tuple[int, ...], str] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and max(output.shape[2:]) > 1:
                ends[tuple(output.shape[2:])] = path

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in own_modules(model)]
    with removing(handles):
        model(image)
    return [ends[size] for size in sorted(ends, reverse=True)]


def own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, but nothing that a wrapper added (quantizers), and not the whole."""
    for name, child in model.named_children():
        if not isinstance(model, Wrapper) or name == "layer":
            yield f"{prefix}{name}", child
            yield from own_modules(child, f"{prefix}{name}.")


def resolved(layers: Sequence[str | int], found: Sequence[str], whose: str) -> list[str]:
    """Paths of layers that are given as paths or as numbers of stages, negative ones from the end.

    Raises:
        UserError: there is no such stage.
    """
    for layer in layers:
        if isinstance(layer, int) and not -len(found) <= layer < len(found):
            stages_found = ", ".join(f"{number}: {path}" for number, path in enumerate(found)) or "none"
            raise UserError(f"{whose} has no stage {layer}; its stages are {stages_found}")
    return [found[layer] if isinstance(layer, int) else layer for layer in layers]


@torch.no_grad()
def shapes_at(model: nn.Module, data: Data, layers: Sequence[str | int], whose: str) -> dict[str, torch.Size]:
    """What layers give for one image: its shape, 1×…, by path, in the order asked for.

    Args:
        model: in any mode.
        data: gives an example.
        layers: paths or numbers of stages.
        whose: the method, for the message.

    Raises:
        UserError: there is no such layer or stage, or it gives something else than one tensor.
    """
    image = normalized(data, data.example(), device_of(model))
    with evaluating(model), ExitStack() as watching:
        paths = resolved(layers, stages(model, image), whose)
        taps = {path: watching.enter_context(tap(model, path)) for path in paths}
        model(image)
    for path, seen in taps.items():
        if not isinstance(seen.value, Tensor):
            gave = "nothing: it does not run" if seen.value is None else f"a {type(seen.value).__name__}"
            raise UserError(f"{whose}: layer {path!r} gives {gave}; name one that gives a single tensor")
    return {path: seen.value.shape for path, seen in taps.items()}
