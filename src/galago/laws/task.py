"""The laws of a Task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from galago.batch import Batch
from galago.checkpoint import keep_random_state
from galago.laws.trial import clone, close, exported, require
from galago.task import Task


def check_task(
    make_task: Callable[[], Task], batch: Batch, output: Any, perfect: Any, best: float | Mapping[str, float] = 1.0
) -> None:
    """Checks the laws of a Task.

    Its losses are finite scalars with a finite gradient; a perfect output gives perfect metrics and another output does
    not; each collection of metrics is fresh; decisions are integers, one or more an input; a reservation, if there is
    one, is a number from 0 to 1 for each; `decode` can be exported.

    Args:
        make_task: makes the task.
        batch: some inputs and their targets.
        output: what an untrained network might say about them.
        perfect: what a network that knows everything would say.
        best: the value of every metric for the latter, or of each by name.

    Raises:
        AssertionError: naming the law broken.
    """
    with keep_random_state():
        task = make_task().eval()
        for stage in (task.at(0.0), task):
            _differentiates(stage, batch, output)
        _rewards_the_perfect(task, batch, output, perfect, best)
        decisions, count = task.decisions(output), len(batch.input)
        whole = not decisions.is_floating_point() and len(decisions) == count
        require(whole, f"decisions are integers for each of the {count} inputs, not {decisions.dtype}")
        held = task.reservation(output)
        shares = held is None or (held.shape == (count,) and bool(((held >= 0) & (held <= 1)).all()))
        require(shares, f"a reservation is a number from 0 to 1 for each of the {count} inputs, not {held}")
        _decodes_when_exported(task, output)


def _differentiates(task: Task, batch: Batch, output: Any) -> None:
    output = tree_map(lambda leaf: leaf.clone().requires_grad_() if _real(leaf) else leaf, clone(output))
    losses = task.losses(output, batch)
    for name, loss in losses.items():
        require(loss.ndim == 0 and loss.isfinite(), f"a loss is a finite scalar, but {name!r} is {loss}")
    require(losses, "a task has a loss")
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    gradients = [leaf.grad for leaf in tree_leaves(output) if _real(leaf) and leaf.grad is not None]
    require(any(gradient.any() for gradient in gradients), "a loss can be differentiated, but no gradient came back")
    require(all(gradient.isfinite().all() for gradient in gradients), "the gradient of a loss is finite")


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _rewards_the_perfect(
    task: Task, batch: Batch, output: Any, perfect: Any, best: float | Mapping[str, float]
) -> None:
    ordinary, top = (_measured(task, said, batch) for said in (output, perfect))
    wanted = best if isinstance(best, Mapping) else dict.fromkeys(top, best)
    require(top.keys() == wanted.keys(), f"metrics are named {sorted(wanted)}, not {sorted(top)}")
    for name, value in top.items():
        require(abs(value - wanted[name]) < 1e-5, f"a perfect output has {name} {wanted[name]}, not {value}")
    require(ordinary != top, "metrics tell a perfect output from any other")


def _measured(task: Task, output: Any, batch: Batch) -> dict[str, float]:
    metrics = task.metrics()
    metrics.update(task.decode(output), batch.target)
    return {name: float(value) for name, value in metrics.compute().items()}


class _Decode(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, output: Any) -> Any:
        return self.task.decode(output)


def _decodes_when_exported(task: Task, output: Any) -> None:
    with torch.no_grad():
        require(close(task.decode(output), exported(_Decode(task), output)), "an exported `decode` decodes alike")
