"""How much a number would have changed with other test images: the bootstrap.

Bradley Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, 1979. The images are drawn
again, as many as there are, with replacement; the number is computed on each such draw; 95 % of the results lie between
`low` and `high`, once their mean is moved to the number itself: some numbers are larger on every draw, which other
images would not be (the calibration error, because images that are drawn twice make its groups noisier), and their
interval would not hold them. Two networks that saw the same images are given the same draws, and the difference is
taken draw by draw, which is far sharper than two separate intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from galago.probe import Outputs

Views = Mapping[str, Outputs]
Score = Callable[[Views], dict[str, float]]
Draws = NDArray[np.float64]
NOTHING: Draws = np.empty(0)  # for a number that is not told from stored outputs


class Estimate(NamedTuple):
    """A number as measured, and as it came out on every draw of the images; `NOTHING` where none were made."""

    value: float
    draws: Draws

    def interval(self) -> tuple[float, float] | None:
        """Where 95 % of the draws lie, around the value."""
        if not len(self.draws):
            return None
        low, high = around(np.array(self.value), self.draws)
        return float(low), float(high)

    def minus(self, other: Estimate) -> Estimate:
        """The difference, draw by draw."""
        paired = len(self.draws) == len(other.draws)
        return Estimate(self.value - other.value, self.draws - other.draws if paired else NOTHING)


def around(value: Draws, draws: Draws) -> tuple[Draws, Draws]:
    """Where 95 % of the draws lie once their mean is the value; not below 0 where no draw is.

    >>> [end.round(2).tolist() for end in around(np.array(1.0), np.linspace(1, 5, 101))]
    [0.0, 2.9]

    Args:
        value: one number, or K of them.
        draws: R numbers, or R×K.
    """
    low, high = np.quantile(draws, [0.025, 0.975], axis=0) + (value - draws.mean(axis=0))
    return np.where(draws.min(axis=0) >= 0, np.maximum(low, 0.0), low), high


def drawn_again(views: Views, seed: int) -> dict[str, Outputs]:
    """The views with their images drawn again; views of the same size, which may show the same images, alike.

    Args:
        views: outputs by view.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[int, torch.Tensor] = {}
    for size in sorted({len(outputs.output) for outputs in views.values()}):
        chosen[size] = torch.randint(size, (size,), generator=generator)
    return {
        name: Outputs(one.output[chosen[len(one.output)]], one.target[chosen[len(one.output)]])
        for name, one in views.items()
    }


def estimates(score: Score, views: Views, rounds: int = 200) -> dict[str, Estimate]:
    """Every number of a score with its draws.

    Args:
        score: from outputs by view to numbers by name.
        views: outputs by view.
        rounds: how often the images are drawn again; 200 tell an interval's ends to about a tenth of its width.

    >>> views = {"test": Outputs(torch.arange(4.0), torch.zeros(4))}
    >>> found = estimates(lambda views: {"mean": float(views["test"].output.mean())}, views, rounds=50)["mean"]
    >>> found.value, 0 <= found.interval()[0] < 1.5 < found.interval()[1] <= 3
    (1.5, True)
    """
    measured = score(views)
    again = [score(drawn_again(views, seed)) for seed in range(rounds)]
    return {
        name: Estimate(value, np.array([numbers.get(name, value) for numbers in again]))
        for name, value in measured.items()
    }
