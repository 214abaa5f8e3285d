"""Temperature scaling, measured: how well calibrated is a network after the one correction that everybody can afford?

Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
arXiv:1706.04599.

Scores are divided by one T, fitted on the validation images, and calibration is measured on the test images with it.
Twice, for there are two customs: T by likelihood, and T of a grid by the expected calibration error.

    p = softmax(z / T)        T: galago.temperature.fit_temperature, or grid_temperature

When: next to `galago.probes.calibration`. A method that trains for calibration has to be compared with a plain network
after scaling, not only before. T itself says how over-confident a network is (1: not at all), and its drift what
quantization or pruning did to that; a student of soft targets inherits its teacher's. Fit it anew after each of these.
It costs one pass over the validation images.

Chosen here: where data have no test images of their own, T is fitted on the very images that it is judged by. With one
number that flatters little, but it flatters. Accuracy is that of the unscaled network, since the largest score stays
the largest. Tasks decode the scaled scores as they decode others.
"""

from __future__ import annotations

from collections.abc import Mapping

from galago.data import Data, Loader
from galago.errors import UserError
from galago.probe import TEST, VALIDATION, Outputs, ViewsProbe
from galago.reliability import Bins, answers, brier, judged, negative_log_likelihood, reliability
from galago.task import Task
from galago.temperature import fit_temperature, grid_temperature


def scaled(outputs: Outputs, temperature: float) -> Outputs:
    """The same images with scores divided by a temperature, float64.

    >>> import torch
    >>> scaled(Outputs(torch.tensor([[3.0, 0.0]]), torch.eye(2)[:1]), 2.0).output.tolist()
    [[1.5, 0.0]]
    """
    return Outputs(outputs.output.double() / temperature, outputs.target)


class TemperatureScaled(ViewsProbe):
    """`temperature`, `ece_scaled`, `nll_scaled`, `brier_scaled`, and by the grid `grid_temperature`, `ece_grid_scaled`.

    Args:
        bins: of the reliability diagram.
        grid: whether the grid is searched too, which takes most of the time.
    """

    def __init__(self, bins: int = 15, grid: bool = True) -> None:
        if bins < 1:
            raise UserError(f"TemperatureScaled: bins is {bins}; 1 or more are needed (15 is customary)")
        self.bins, self.grid = bins, grid

    def views(self, data: Data) -> dict[str, Loader]:
        return {VALIDATION: data.validation(), TEST: data.test()}

    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        held, test = outputs[VALIDATION], outputs[TEST]
        temperature = fit_temperature(held.output, held.target)
        probabilities, label = judged(scaled(test, temperature), task)
        return {
            "temperature": temperature,
            "ece_scaled": self.diagram(test, temperature, task).expected_error(),
            "nll_scaled": negative_log_likelihood(probabilities, label),
            "brier_scaled": brier(probabilities, label),
            **(self._by_grid(held, test, task) if self.grid else {}),
        }

    def _by_grid(self, held: Outputs, test: Outputs, task: Task) -> dict[str, float]:
        grid = grid_temperature(held.output, held.target, self.bins)
        return {"grid_temperature": grid, "ece_grid_scaled": self.diagram(test, grid, task).expected_error()}

    def diagram(self, outputs: Outputs, temperature: float, task: Task) -> Bins:
        """The reliability diagram at a temperature."""
        return reliability(*answers(*judged(scaled(outputs, temperature), task)), self.bins)
