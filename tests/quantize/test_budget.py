"""The best choice under a budget, against all choices there are."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch

from galago.quantize.budget import cheapest, priced


def by_trying_all(losses, costs, budget) -> float:
    totals = [
        (
            sum(c[o] for c, o in zip(costs, options, strict=True)),
            sum(loss[o] for loss, o in zip(losses, options, strict=True)),
        )
        for options in product(range(len(losses[0])), repeat=len(losses))
    ]
    return min(lost for spent, lost in totals if spent <= budget)


def total(of, options) -> float:
    return sum(row[option] for row, option in zip(of, options, strict=True))


def drawn(rows: int, options: int, kind: str, seed: int) -> tuple[list[list[float]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 1000, (rows, 1), generator=generator)
    widths = torch.arange(2, 2 + options)
    losses = (
        torch.rand(rows, 1, generator=generator) * 4.0**-widths * (0.5 + torch.rand(rows, options, generator=generator))
    )
    if kind == "any":  # more bits are not always better, and not always more
        return torch.rand(rows, options, generator=generator).tolist(), torch.randint(
            0, 30, (rows, options), generator=generator
        ).tolist()
    if kind == "ties":
        return torch.randint(0, 3, (rows, options), generator=generator).double().tolist(), (
            widths.expand(rows, options).tolist()
        )
    return losses.tolist(), (sizes * widths).tolist()


@pytest.mark.parametrize("kind", ["layers", "any", "ties"])
@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all_within_the_budget(kind: str, seed: int) -> None:
    losses, costs = drawn(6, 4, kind, seed)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for share in (0.0, 0.1, 0.4, 0.7, 1.0):
        budget = least + int(share * (most - least))
        options = cheapest(losses, costs, budget)
        assert total(costs, options) <= budget
        assert total(losses, options) == pytest.approx(by_trying_all(losses, costs, budget), rel=1e-12, abs=1e-300)


def test_what_each_row_would_choose_for_itself_is_within_the_budget_and_no_better() -> None:
    losses, costs = drawn(40, 5, "layers", 0)
    for budget in (sum(map(min, costs)), int(4 * sum(row[0] / 2 for row in costs)), sum(map(max, costs))):
        price, known = priced(torch.tensor(losses).double(), torch.tensor(costs).double(), budget)
        assert price >= 0
        assert total(losses, cheapest(losses, costs, budget)) <= known * (1 + 1e-12)


def test_the_choice_is_always_the_same() -> None:
    losses, costs = drawn(30, 5, "ties", 3)
    assert len({tuple(cheapest(losses, costs, 110)) for _ in range(3)}) == 1


def test_hundreds_of_layers_are_chosen_for_in_a_moment() -> None:
    losses, costs = drawn(300, 5, "layers", 1)
    whole = sum(row[0] / 2 for row in costs)
    start = time.perf_counter()
    for mean in (2.5, 3.0, 4.0, 5.0):
        assert total(costs, cheapest(losses, costs, int(mean * whole))) <= mean * whole
    assert time.perf_counter() - start < 20


def test_losses_of_any_size_are_told_apart() -> None:
    losses, costs = drawn(6, 4, "layers", 5)
    for factor in (1e-12, 1e12):
        scaled = [[factor * loss for loss in row] for row in losses]
        assert total(losses, cheapest(scaled, costs, 9000)) == pytest.approx(
            by_trying_all(losses, costs, 9000), rel=1e-9
        )
