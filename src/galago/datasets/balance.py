"""Batches of P classes with M images each, for losses that compare the images of a batch.

Alexander Hermans, Lucas Beyer, Bastian Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017,
arXiv:1703.07737, which draws the classes of each batch at random.

Chosen here: an epoch shows no image twice, and batches begin with the classes that have most images left, so that as
many as possible are full. What is left over is another part of the set each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galago.errors import UserError


def require_groups(labels: Tensor, size: int, together: int, names: Sequence[str]) -> None:
    """Checks that batches of `size` images can hold `together` of each of their classes.

    Raises:
        UserError: they cannot.
    """
    if together < 1 or size % together:
        raise UserError(f"together: batches of {size} images cannot hold {together} of each class; name a divisor")
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if few := [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < together]:
        raise UserError(
            f"together: {together} images of each class are wanted; there are fewer of {', '.join(few[:5])}"
        )
    if size // together > len(names):
        raise UserError(
            f"together: batches of {size} with {together} of each class need {size // together} classes, and there are"
            f" {len(names)}; make batch_size smaller or together larger"
        )


def groups(labels: Tensor, together: int) -> Tensor:
    """Places of labels N, in their order, put together by class: G×M, what does not fill a group left out.

    >>> groups(torch.tensor([1, 0, 1, 0, 0]), 2)
    tensor([[1, 3],
            [0, 2]])
    """
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    rank = torch.arange(len(labels)) - first
    full = counts - counts % together
    return by_class[rank < full[labels[by_class]]].view(-1, together)


def class_batches(labels: Tensor, size: int, together: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of `size` places of labels N: `size / together` different classes, `together` places of each.

    Args:
        labels: in the order in which images are to be drawn from each class.
        size: images a batch.
        together: images of a class.
        generator: decides which classes meet.
    """
    grouped = groups(labels, together)
    left = torch.bincount(labels) // together
    last = left.cumsum(0)  # a class's groups end here, and are taken from the end
    batches = []
    while int((left > 0).sum()) >= size // together:
        order = left + torch.rand(len(left), generator=generator, dtype=torch.float64)
        classes = order.topk(size // together).indices
        batches.append(grouped[last[classes] - 1].flatten())
        left[classes] -= 1
        last[classes] -= 1
    return batches
