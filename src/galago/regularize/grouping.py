"""Groups of classes, made of what a classifier confuses.

The rule is that of the official code of Palacio et al., ICPR 2020, arXiv:2101.03057 (`galago.regularize.autogenous`):
as many seeds as there are groups, each as far as possible from the nearest one before it, then class by class the
nearest into the nearest group that is not full. Ties go to the lowest class; the official code draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def distances(confusion: Tensor, similar: bool = True) -> Tensor:
    """D, K×K, float64: the smaller, the sooner two classes come into one group.

    Args:
        confusion: M, K×K, how often each class (rows) is taken for each (columns).
        similar: gather classes that are confused; else keep them apart.

    >>> distances(torch.tensor([[9, 2, 0], [0, 9, 0], [1, 0, 9]]))
    tensor([[0.0000, 1.0000, 1.5000],
            [1.0000, 0.0000, 2.0000],
            [1.5000, 2.0000, 0.0000]], dtype=torch.float64)
    """
    wrong = confusion.double().clone().fill_diagonal_(0)
    apart = (wrong.max() - wrong).fill_diagonal_(0) if similar else wrong
    return (apart + apart.T) / 2


def grouping(confusion: Tensor, count: int, similar: bool = True) -> list[int]:
    """g, the group of each class.

    Args:
        confusion: M, K×K, how often each class (rows) is taken for each (columns).
        count: G, how many groups.
        similar: gather classes that are confused; else keep them apart.

    >>> blocks = torch.block_diag(torch.full((2, 2), 5), torch.full((3, 3), 5))
    >>> grouping(blocks, 2)
    [1, 1, 0, 0, 0]
    """
    apart = distances(confusion, similar)
    classes = len(apart)
    group = [-1] * classes
    group[int(apart.sum(1).argmin())] = 0
    for opened in range(1, count):
        nearest = nearness(apart, group, opened).amin(1)
        group[_first_free(group, -nearest)] = opened
    while -1 in group:
        near = nearness(apart, group, count)
        chosen = _first_free(group, near.amin(1))
        full = torch.tensor([group.count(number) >= 1.1 * classes / count for number in range(count)])
        group[chosen] = int(near[chosen].masked_fill(full, torch.inf).argmin())
    return group


def nearness(apart: Tensor, group: Sequence[int], count: int) -> Tensor:
    """The mean distance of each class to the members of each of the first groups, K×G."""
    member = torch.tensor([[own == number for number in range(count)] for own in group], dtype=apart.dtype)
    return apart @ member / member.sum(0)


def _first_free(group: Sequence[int], cost: Tensor) -> int:
    """The class without a group whose cost is least."""
    taken = torch.tensor([own >= 0 for own in group])
    return int(cost.masked_fill(taken, torch.inf).argmin())


def group_targets(target: Tensor, group: Sequence[int]) -> Tensor:
    """Probabilities of groups N×G, of class probabilities N×K.

    >>> group_targets(torch.tensor([[0.5, 0.25, 0.25]]), [0, 1, 0])
    tensor([[0.7500, 0.2500]])
    """
    member = nn.functional.one_hot(torch.tensor(group, device=target.device), max(group) + 1)
    return target @ member.to(target.dtype)


def members(group: Sequence[int], names: Sequence[str]) -> str:
    """The classes of each group, for a person to read.

    >>> members([0, 1, 0], ["cat", "ship", "dog"])
    '{cat, dog} {ship}'
    """
    gathered = [[name for name, own in zip(names, group, strict=True) if own == g] for g in range(max(group) + 1)]
    return " ".join(f"{{{', '.join(one)}}}" for one in gathered)
