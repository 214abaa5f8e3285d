"""Accuracy: the task's own metrics, and how often the right class is among the k most likely.

The numbers are those of `task.metrics()`, which for classification is `accuracy`, the share of images whose most likely
class is the target's. Shares lie in [0, 1]. Ties go to the class with the lowest index, as everywhere in Galago.

When to use it: always; it costs nothing beyond the one pass over the images that other probes share.
"""

from __future__ import annotations

from torch import Tensor

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
from galago.task import Task


def among_top(scores: Tensor, target: Tensor, k: int) -> float:
    """The share of rows whose target class is among the k highest scores; of equal scores the lower index wins.

    Args:
        scores: N×K, of any scale.
        target: N×K, class probabilities; the most likely one counts.
        k: how many guesses.

    >>> import torch
    >>> among_top(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0.0, 0.0, 1.0]]), 2)
    1.0
    """
    guesses = scores.argsort(stable=True, dim=1, descending=True)[:, :k]
    return float((guesses == target.argmax(1, keepdim=True)).any(1).double().mean())


class Accuracy(OutputProbe):
    """The task's metrics on the test images.

    Args:
        top: also report `top{k}_accuracy` for this k; None for not.
    """

    def __init__(self, top: int | None = None) -> None:
        if top is not None and top < 1:
            raise UserError(f"Accuracy: top is {top}; give the number of guesses, 1 or more")
        self.top = top

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        metrics, decoded = task.metrics(), task.decode(outputs.output)
        metrics.update(decoded, outputs.target)
        found = {name: float(value) for name, value in metrics.compute().items()}
        if self.top is None:
            return found
        return found | {f"top{self.top}_accuracy": among_top(decoded, outputs.target, self.top)}
