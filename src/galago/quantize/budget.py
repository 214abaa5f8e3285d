"""Choosing one option for each of many things under a common budget, exactly: a knapsack with multiple choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cheapest(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One option a row, with the least sum of losses among all choices whose costs stay within the budget.

    Rows are taken one after another. Of all partial choices those are kept that no other is both as cheap as and better
    than. What cannot lead to less than a choice known already is dropped: at any price p >= 0 of a unit of cost, the
    rows ahead add at least `sum min(loss + p cost) - p (what is left to spend)`. With the price at which each row may
    choose for itself little is left: hundreds of rows take less than a second.

    Args:
        losses: of each option of each row, as many options in every row.
        costs: likewise.
        budget: at least the sum of the lowest costs.

    >>> cheapest([[9.0, 1.0], [4.0, 2.0], [3.0, 0.0]], [[1, 2], [1, 2], [1, 2]], budget=5)
    [1, 0, 1]
    """
    loss, cost = (torch.tensor(each, dtype=torch.float64) for each in (losses, costs))
    price, known = priced(loss, cost, budget)
    known += 1e-12 * float(loss.abs().sum())  # sums of the same numbers in another order differ a little
    bound, least, best = (ahead(each) for each in (loss + price * cost, cost, loss))
    spent = lost = torch.zeros(1, dtype=torch.float64)
    history = []
    for row in range(len(loss)):
        spent, lost = (spent[:, None] + cost[row]).flatten(), (lost[:, None] + loss[row]).flatten()
        reachable = torch.maximum(lost + bound[row] - price * (budget - spent), lost + best[row]) <= known
        kept = _undominated(spent, lost, (reachable & (spent + least[row] <= budget)).nonzero().flatten())
        spent, lost = spent[kept], lost[kept]
        history.append(kept)
    place, chosen = int(lost.argmin()), []
    for kept in reversed(history):
        place, option = divmod(int(kept[place]), loss.shape[1])
        chosen.append(option)
    return chosen[::-1]


def ahead(of: Tensor) -> list[float]:
    """For each row, the sum of the smallest entries of all rows behind it.

    >>> ahead(torch.tensor([[1.0, 2.0], [3.0, 4.0], [6.0, 5.0]]))
    [8.0, 5.0, 0.0]
    """
    sums: list[float] = of.amin(1).flip(0).cumsum(0).flip(0).tolist()
    return [*sums[1:], 0.0]


def _undominated(spent: Tensor, lost: Tensor, among: Tensor) -> Tensor:
    """Those that cost less, or the same, than all that lose less; cheapest first, of equals the first."""
    order = among[lost[among].sort(stable=True).indices]
    order = order[spent[order].sort(stable=True).indices]
    before = lost[order].cummin(0).values
    return torch.cat([order[:1], order[1:][lost[order[1:]] < before[:-1]]])


def priced(loss: Tensor, cost: Tensor, budget: int) -> tuple[float, float]:
    """The lowest price of a unit at which rows that choose for themselves stay within the budget; what they lose.

    Args:
        loss: rows × options.
        cost: rows × options, integers.
        budget: for all rows together.
    """
    rows = torch.arange(len(loss))

    def at(price: float) -> tuple[float, float]:
        chosen = (loss + price * cost).argmin(1)
        return float(cost[rows, chosen].sum()), float(loss[rows, chosen].sum())

    if at(0.0)[0] <= budget:
        return 0.0, at(0.0)[1]
    low, high = 0.0, float(loss.amax() - loss.amin()) + 1.0  # where one unit saved is worth more than any loss
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
    return high, at(high)[1]
