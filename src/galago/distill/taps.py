"""What layers of a network give out, kept while it trains; and its stages, for whoever does not want to name layers.

`galago.layers.tap` watches for the length of a `with`; these taps stay from `prepare` to `finish`, because a compiled
network runs the hooks that it was compiled with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import Wrapper, find, removing


class Taps:
    """Keeps what some layers gave out last. A layer whose output is changed in place behind it is kept as a copy.

    Args:
        model: the network.
        paths: of its layers.
        inputs: keep what the layers were given instead.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> taps = Taps(net, ["0"])
    >>> output = net(-torch.ones(1, 2) * 9)
    >>> taps.check("a doctest")
    >>> output = net(-torch.ones(1, 2) * 9)
    >>> torch.equal(taps.values["0"], net[0](-torch.ones(1, 2) * 9))
    True
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], inputs: bool = False) -> None:
        self.paths, self.inputs = list(dict.fromkeys(paths)), inputs
        self.values: dict[str, Any] = {}
        self.changed: set[str] = set()
        self._versions: dict[str, int] | None = {}  # of each output as it was given, until `check`
        self._hooks = [self._hook(path) for path in self.paths]
        for path, hook in zip(self.paths, self._hooks, strict=True):
            find(model, path).register_forward_hook(hook)

    def _hook(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept = inputs[0] if self.inputs else output
            self.values[path] = kept.clone() if path in self.changed else kept
            if self._versions is not None and isinstance(kept, Tensor):
                self._versions[path] = kept._version

        return keep

    def check(self, whose: str) -> None:
        """After a first pass in eager mode: every layer gave a tensor; notes which were changed in place.

        Raises:
            UserError: naming the layer that gave none, or more than one.
        """
        for path in self.paths:
            value = self.values.get(path)
            if not isinstance(value, Tensor):
                gave = "nothing: it does not run" if value is None else f"a {type(value).__name__}"
                raise UserError(f"{whose}: layer {path!r} gives {gave}; name one that gives a single tensor")
            if value._version != (self._versions or {}).get(path):
                self.changed.add(path)
        self._versions = None

    def remove(self, model: nn.Module) -> None:
        """Takes the hooks out of the network, or of a copy of it."""
        for module in model.modules():
            for number, hook in list(module._forward_hooks.items()):
                if any(hook is own for own in self._hooks):
                    del module._forward_hooks[number]
        self.values = {}


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


@torch.no_grad()
def classifier(model: nn.Module, image: Tensor) -> str | None:
    """The linear layer (or 1×1 convolution) that gives the scores, by path; None where something comes behind it.

    Args:
        model: in evaluation mode.
        image: normalized, N×C×H×W.

    >>> classifier(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)), torch.ones(1, 1, 3, 3))
    '3'
    """
    given: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor):
                given[path] = output.flatten(1)

        return hook

    linear = [(path, part) for path, part in own_modules(model) if isinstance(_own(part), nn.Linear | nn.Conv2d)]
    with removing([part.register_forward_hook(note(path)) for path, part in linear]):
        answer = model(image)
    scores = answer["main"] if isinstance(answer, dict) else answer
    return next((path for path, _ in linear if path in given and torch.equal(given[path], scores)), None)


def _own(module: nn.Module) -> nn.Module:
    """What a wrapper stands in front of."""
    return _own(module.layer) if isinstance(module, Wrapper) else module


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
