"""Layers whose tensors have other shapes than they were built with: how that is done, written down and done again."""

from __future__ import annotations

from itertools import chain
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from galago.errors import UserError


@runtime_checkable
class Narrows(Protocol):
    """A layer that keeps numbers of channels as attributes (zeros to add, a place to cut), and can be told of others.

    The attributes are integers, so that they are written down with a network and read again.
    """

    def keep_channels(self, taken: Tensor, given: Tensor) -> None:
        """Says which of the channels that the layer takes in, and of those that it gives out, are left: booleans."""


def store(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts another tensor, of any shape, in the place of a parameter or buffer; of a parameter it makes a new one."""
    old = getattr(module, name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    setattr(module, name, new)


def sizes_of(base: nn.Module, final: nn.Module) -> dict[str, Any]:
    """As plain data what of a layer's own tensors and numbers is not as it was built; empty where no size differs.

    >>> sizes_of(nn.Linear(4, 2), nn.Linear(3, 2))
    {'shapes': {'weight': [2, 3]}, 'numbers': {'in_features': 3}}

    Args:
        base: the layer as it was built.
        final: the same kind of layer.
    """
    before, after = _tensors(base), _tensors(final)
    both = {name: (before[name].shape, tensor.shape) for name, tensor in after.items() if name in before}
    shapes = {name: list(new) for name, (old, new) in both.items() if old != new}
    known = _numbers(base)
    numbers = {name: value for name, value in _numbers(final).items() if known.get(name, value) != value}
    told = bool(shapes) or (bool(numbers) and isinstance(final, Narrows))
    return {"shapes": shapes, "numbers": numbers} if told else {}


def resize(module: nn.Module, sizes: dict[str, Any]) -> None:
    """Gives tensors that are there other shapes, filled with zeros, and numbers that are there other values.

    Args:
        module: changed in place.
        sizes: as `sizes_of` gives them; maybe a stranger's.

    Raises:
        UserError: the layer has no such tensor or number.
    """
    tensors, numbers = _tensors(module), _numbers(module)
    if not all(isinstance(sizes.get(key), dict) for key in ("shapes", "numbers")):
        raise UserError(f"this architecture record tells no sizes of a {type(module).__name__}")
    for name, shape in sizes["shapes"].items():
        if name not in tensors or not _is_shape(shape) or len(shape) != tensors[name].ndim:
            raise UserError(f"this architecture record gives a {type(module).__name__} a wrong shape: {name} {shape}")
        store(module, name, tensors[name].detach().new_zeros(shape))
    for name, value in sizes["numbers"].items():
        if name not in numbers or type(value) is not int:
            raise UserError(f"this architecture record gives a {type(module).__name__} a wrong number: {name} {value}")
        setattr(module, name, value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
