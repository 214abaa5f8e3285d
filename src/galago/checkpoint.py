"""What exact continuation needs: weights, optimizer, position and random state, as tensors and plain data."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from galago.errors import UserError
from galago.run import Run


class Position(NamedTuple):
    """The next batch to train on, and what early stopping knows."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    stale: int = 0


def save(
    learner: nn.Module, optimizer: Optimizer, position: Position, fabric: Fabric, run: Run, best: bool = False
) -> None:
    """Everything that exact continuation needs, as tensors and plain data."""
    state = {
        "learner": learner.state_dict(),
        "methods": learner.get_submodule("methods").state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": tuple(position),
        "random": [random_state()] if fabric.world_size == 1 else _every_rank(fabric),
    }
    if fabric.is_global_zero:
        run.save_checkpoint(state, run.last)
        if best:
            run.save_checkpoint(state, run.best)
    fabric.barrier()


def _every_rank(fabric: Fabric) -> list[Any]:
    gathered: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(gathered, random_state())
    return gathered


def restore(learner: nn.Module, optimizer: Optimizer, saved: dict[str, Any], fabric: Fabric) -> Position:
    """Brings back weights, optimizer and random state, and says where to go on."""
    try:
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint does not fit the recipe: {' '.join(str(error).split())[:300]}") from error
    states = saved["random"]
    set_random_state(states[fabric.global_rank % len(states)])
    return Position(*saved["position"])


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, as tensors and plain data."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002


class keep_random_state:  # noqa: N801 - used like a function
    """Whatever draws random numbers within this `with` leaves no trace."""

    def __enter__(self) -> None:
        self.state = random_state()

    def __exit__(self, *exception: object) -> None:
        set_random_state(self.state)
