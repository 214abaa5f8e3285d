"""Looking into a network and changing its parts: `tap`, `rewrite`, `swap`, `Wrapper`, and `Flow`, its graph."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from galago.errors import UserError


class Tap:
    """Holds what a layer gave out last."""

    value: Any = None


@contextmanager
def tap(model: nn.Module, path: str) -> Iterator[Tap]:
    """Watches what the layer at `path` gives out, as long as the `with` lasts.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with tap(net, "0") as feature:
    ...     output = net(torch.zeros(1, 2))
    >>> feature.value.shape
    torch.Size([1, 3])
    """
    held = Tap()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        held.value = output

    with removing([find(model, path).register_forward_hook(keep)]):
        yield held


@contextmanager
def rewrite(model: nn.Module, path: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Passes what the layer at `path` gives out through `change`, as long as the `with` lasts."""
    with removing([find(model, path).register_forward_hook(lambda module, inputs, output: change(output))]):
        yield


def find(model: nn.Module, path: str) -> nn.Module:
    """The layer at a dotted path.

    Raises:
        UserError: there is none; the nearest names are suggested.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        near = difflib.get_close_matches(path, [name for name, _ in model.named_modules() if name], n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{type(model).__name__} has no layer {path!r}{hint}") from None


def classifier(model: nn.Module) -> str:
    """The path of the last linear layer, as the network is written down: what makes class scores of an embedding.

    >>> classifier(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5), nn.Flatten()))
    '2'

    Raises:
        UserError: there is none.
    """
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Wrapper))
    outer = {path: module for path, module in model.named_modules() if not path.startswith(inside)}
    linear: list[str] = [path for path, module in outer.items() if isinstance(innermost(module), nn.Linear)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layer that would be its classifier; name a layer")
    return linear[-1]


def innermost(module: nn.Module) -> Any:
    """The layer within all that wraps it."""
    while isinstance(module, Wrapper):
        module = module.layer
    return module


def must_match(pattern: str, modules: dict[str, nn.Module]) -> None:
    """Sees to it that a pattern means something.

    Raises:
        UserError: it matches no module's path or type; near names are suggested.
    """
    names = [name for path, module in modules.items() for name in (path, type(module).__name__) if name]
    if any(fnmatchcase(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(pattern, dict.fromkeys(names), n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "; `galago check` lists them"
    raise UserError(f"{pattern!r} matches no layer's path or type in {type(modules['']).__name__}{hint}")


def swap(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Puts `new` where the layer at `path` was; the model, or `new` itself for the empty path."""
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    setattr(find(model, parent), name, new)
    return model


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks when the `with` is over, whatever happens in it."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Wrapper(nn.Module):
    """Stands in a layer's place and answers for its attributes (`stride`, `weight`, …), which models may look up.

    Args:
        layer: what is wrapped; its parameters stay the same objects.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(super().__getattr__("layer"), name)


class Call(NamedTuple):
    """One tensor operation of a forward pass. Tensors are known by number."""

    operation: str  # ATen name: "convolution", "add", …
    module: str  # path of the innermost module that was running
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Asked(NamedTuple):
    """An operation with all its arguments, by which it can be done again on other tensors."""

    function: Any  # of ATen
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Flow:
    """What feeds what in one forward pass, whatever the model is written like: nothing is traced symbolically.

    `calls` in order of execution; `received` and `gave` the numbers of the tensors that a module took in and gave
    out each time it ran, by path; `values` every tensor by number (a small example is enough to keep them).
    `asked` is beside `calls`: the operation itself and what it was given, dimensions and sizes included.
    """

    calls: list[Call] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    received: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    gave: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def consumers(self, number: int) -> list[Call]:
        """The operations that read this tensor."""
        return [call for call in self.calls if number in call.inputs]

    def producer(self, number: int) -> Call | None:
        """The operation that made this tensor; None for the network's own input and for parameters."""
        return next((call for call in self.calls if number in call.outputs and number not in call.inputs), None)


def flow(model: nn.Module, *inputs: Tensor) -> Flow:
    """Runs the model once on `inputs` without gradients and records what feeds what."""
    recorder = _Recorder()
    handles = []
    for path, module in model.named_modules(remove_duplicate=True):
        handles.append(module.register_forward_pre_hook(recorder.entering(path), with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leaving(path), with_kwargs=True))
    with removing(handles), torch.no_grad(), recorder:
        model(*inputs)
    return recorder.flow


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        self.path = [""]
        self.alive: list[Tensor] = []  # keeps `id` unique
        self.numbers: dict[int, int] = {}

    def number(self, tensor: Tensor, fresh: bool = False) -> int:
        if fresh or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.flow.values)
            self.flow.values[len(self.flow.values)] = tensor
            self.alive.append(tensor)
        return self.numbers[id(tensor)]

    def tensors(self, tree: Any) -> tuple[int, ...]:
        return tuple(self.number(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    def entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.path.append(path)
            self.flow.received.setdefault(path, []).append(self.tensors((args, kwargs)))

        return hook

    def leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.path.pop()
            self.flow.gave.setdefault(path, []).append(self.tensors(output))

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self.tensors((args, kwargs))
        result = func(*args, **(kwargs or {}))
        in_place = func._schema.is_mutable
        written = tuple(self.number(leaf, fresh=in_place) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.flow.calls.append(Call(func._schema.name.partition("::")[2].rstrip("_"), self.path[-1], read, written))
        self.flow.asked.append(Asked(func, args, dict(kwargs or {})))
        return result
