"""Top-k accuracy: how often the right class is among the k most likely.

Customary with k = 5 on data sets with many classes that resemble each other (Russakovsky et al., "ImageNet Large Scale
Visual Recognition Challenge", IJCV 2015, arXiv 1409.0575). Shares lie in [0, 1]; of equal scores the class with the
lower index comes first, as everywhere in Galago.

When to use it: many classes. Plain accuracy belongs to the task and is always measured (`galago.probe.TaskMetrics`).
Costs nothing beyond the one pass over the images that other probes share.
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


class TopAccuracy(OutputProbe):
    """`top{k}_accuracy` on the test images.

    Args:
        k: how many guesses the network has.
    """

    def __init__(self, k: int = 5) -> None:
        if k < 1:
            raise UserError(f"TopAccuracy: k is {k}; give the number of guesses, 1 or more")
        self.k = k

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        return {f"top{self.k}_accuracy": among_top(task.decode(outputs.output), outputs.target, self.k)}
