"""What layers of a network give out, kept or changed while it trains.

`galago.layers.tap` and `rewrite` last as long as a `with`; these stay from `prepare` to `finish`, because a compiled
network runs the hooks that it was compiled with. `Held` is for a module that looks at its own layers, and is
copied with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import classifier, find

CLASSIFIER = "input of the classifier"  # named like a layer, though no layer need give it out; no path holds a space


class Taps:
    """Keeps what some layers gave out last. A layer whose output is changed in place behind it is kept as a copy.

    Args:
        model: the network.
        paths: of its layers, or CLASSIFIER for the embedding that its last linear layer takes in.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> taps = Taps(net, ["0"])
    >>> output = net(-torch.ones(1, 2) * 9)
    >>> taps.check("a doctest")
    >>> output = net(-torch.ones(1, 2) * 9)
    >>> torch.equal(taps.values["0"], net[0](-torch.ones(1, 2) * 9))
    True
    """

    resting = False  # all of them, within `unnoticed`

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.paths = list(dict.fromkeys(paths))
        self.values: dict[str, Any] = {}
        self.changed: set[str] = set()
        self._versions: dict[str, int] | None = {}  # of each output as it was given, until `check`
        self._hooks = [self._hook(path) for path in self.paths]
        for path, hook in zip(self.paths, self._hooks, strict=True):
            layer = classifier(model) if path == CLASSIFIER else path
            find(model, layer).register_forward_hook(hook)

    def _hook(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if Taps.resting:
                return
            value = inputs[0] if path == CLASSIFIER else output
            self.values[path] = value.clone() if path in self.changed else value
            if self._versions is not None and isinstance(value, Tensor):
                self._versions[path] = value._version

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
        for module, number in _places(model, self._hooks):
            del module._forward_hooks[number]
        self.values = {}


class Changes:
    """Passes what some layers give out in training mode through a function.

    Args:
        model: the network.
        paths: of its layers.
        change: is given the layer's place among the paths and what it gives; returns what it is to give instead.

    >>> import torch
    >>> net = nn.Sequential(nn.ReLU(), nn.ReLU())
    >>> changes = Changes(net, ["1"], lambda place, output: output + 5)
    >>> net(torch.ones(1)), net.eval()(torch.ones(1))
    (tensor([6.]), tensor([1.]))
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], change: Callable[[int, Tensor], Tensor]) -> None:
        self._hooks = [self._hook(place, change) for place in range(len(paths))]
        for path, hook in zip(paths, self._hooks, strict=True):
            find(model, path).register_forward_hook(hook)

    def _hook(self, place: int, change: Callable[[int, Tensor], Tensor]) -> Any:
        def rewrite(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return change(place, output) if module.training else output

        return rewrite

    def within(self, model: nn.Module) -> bool:
        """Whether it is this network, or a copy of it, whose layers are changed."""
        return bool(_places(model, self._hooks))

    def remove(self, model: nn.Module) -> None:
        """Takes the hooks out of the network, or of a copy of it."""
        for module, number in _places(model, self._hooks):
            del module._forward_hooks[number]


def _places(model: nn.Module, hooks: Sequence[Any]) -> list[tuple[nn.Module, int]]:
    """Which of a network's modules hold some of these hooks, and under which number."""
    held = [(module, number, hook) for module in model.modules() for number, hook in module._forward_hooks.items()]
    return [(module, number) for module, number, hook in held if any(hook is own for own in hooks)]


@contextmanager
def unnoticed() -> Iterator[None]:
    """Whatever a network is given within this `with`, all taps (and ensembles) keep what was given out before.

    >>> import torch
    >>> net = nn.Sequential(nn.ReLU())
    >>> taps = Taps(net, ["0"])
    >>> kept = net(torch.ones(1))
    >>> with unnoticed():
    ...     net(torch.zeros(1))
    tensor([0.])
    >>> taps.values["0"]
    tensor([1.])
    """
    Taps.resting = True
    try:
        yield
    finally:
        Taps.resting = False


class Passed(NamedTuple):
    """What went through a layer."""

    taken: Any  # its first input
    given: Any


class Held:
    """What went through a layer last, until it is taken. A copy holds nothing."""

    value: Any = None

    def keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        self.value = Passed(inputs[0], output)

    def take(self) -> Any:
        """What is held, which is then forgotten."""
        value, self.value = self.value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return Held()


def unwatch(network: nn.Module, held: Sequence[Held]) -> None:
    """Takes the hooks of these out of a network."""
    for module in network.modules():
        for number, hook in list(module._forward_hooks.items()):
            if any(getattr(hook, "__self__", None) is one for one in held):
                del module._forward_hooks[number]
