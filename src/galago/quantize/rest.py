"""Rest: a quantized network that computes in float for a while, with all its quantizers in place.

A resting layer computes as if it had not been wrapped. Parameters are the same objects in the same order, so optimizer
and checkpoints see no difference between the two phases. That a layer rests is part of its state and only there as
long as it does: a checkpoint brings the phase back with the weights, and a moving average of the weights, which begins
anew where the names of the state change, does not mix the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from galago.layers import Wrapper
from galago.probe import device_of

_FLOAT_STEP = ContextVar("float_step", default=False)


class Restable(Wrapper):
    """A quantizing wrapper that can step aside.

    Args:
        layer: what is wrapped; its parameters stay the same objects.
    """

    resting: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._buffers["resting"] = None  # not by `register_buffer`, to which a wrapper within has one already

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}resting"
        if (name in state_dict) != (self.resting is not None):
            self.resting = torch.ones_like(state_dict[name], device=device_of(self)) if name in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *rest)


def restable(model: nn.Module) -> list[Restable]:
    """Every quantizing wrapper of a network."""
    return [module for module in model.modules() if isinstance(module, Restable)]


def rests(model: nn.Module) -> bool:
    """Whether any part of a network computes in float although it has quantizers."""
    return any(module.resting is not None for module in restable(model))


def rest(model: nn.Module) -> None:
    """From now on the network computes in float."""
    for module in restable(model):
        module.resting = torch.ones((), device=device_of(model))


def wake(model: nn.Module) -> None:
    """From now on the network computes in quantized values, in the ranges that its quantizers have."""
    for module in restable(model):
        module.resting = None


@contextmanager
def float_step(resting: bool = True) -> Iterator[None]:
    """Tells the optimizer, as long as the `with` lasts, that its gradients come from a network that rests."""
    before = _FLOAT_STEP.set(resting)
    try:
        yield
    finally:
        _FLOAT_STEP.reset(before)


def is_float_step() -> bool:
    """Whether an optimizer's step is one of a float phase. Networks that never rest have none.

    >>> with float_step():
    ...     is_float_step()
    True
    >>> is_float_step()
    False
    """
    return _FLOAT_STEP.get()
