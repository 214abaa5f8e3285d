"""ReestimateNorm: BatchNorm's statistics of the network that ships, taken anew after training.

Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086 (recalled, not compared with the paper).

The running mean and variance of a BatchNorm average over the networks of the last few hundred steps. At few bits these
differ from step to step, where weights jump between two integers, so that in the end the averages belong to none of
them. With all weights fixed the statistics are simply measured, batch after batch:

    mean = (1 / N) sum mean_batch,   var = (1 / N) sum var_batch (unbiased),   over N training batches

When to use it: behind quantization-aware training at 4 bits and below, most of all with depth-wise layers, where it is
worth several points (paper: MobileNetV2 at 3 bits); also where an average of the weights ships. List it behind
`Quantize`. It costs N forward passes, once.

Recipe: recipes/quantize/lsq_w3a3_frozen_resnet20_cifar10.yaml.

Design choices: only BatchNorm is in training mode meanwhile; ranges, dropout and weights stay as they are. Methods
finish in reverse order, so listed behind `Quantize` this comes before biases settle on what integers hold, and a
network that is not quantized yet is refused. What is measured during training is the network with its running averages.
"""

from __future__ import annotations

from torch import nn

from galago.batch_norms import measure_norms, norms_of
from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.quantize.rest import restable


class ReestimateNorm(Method):
    """Measures BatchNorm's statistics once training is over; list it behind `Quantize`.

    Args:
        batches: of training images.
    """

    def __init__(self, batches: int = 50) -> None:
        super().__init__()
        if batches < 1:
            raise UserError(f"ReestimateNorm: batches is {batches}, which leaves no images to measure; give 1 or more")
        self.batches = batches
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: nothing is quantized yet, or there is no BatchNorm.
        """
        if not restable(model):
            raise UserError("ReestimateNorm finds nothing quantized: list it behind Quantize")
        if not norms_of(model):
            raise UserError("ReestimateNorm finds no BatchNorm that keeps statistics; leave it out")
        self._data = data
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        if self._data is not None:
            measure_norms(model, self._data, self.batches)
        return model
