"""AdaRound: adaptive rounding of weights.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization",
ICML 2020, arXiv:2004.10568.

Rounding each weight to the nearest is not what keeps a layer's output. AdaRound chooses for every weight whether it
goes up or down, so that on a few unlabeled images each layer (or block) gives what it gives in float:

    min over V of   mean sum_channels (output(W_hat) - float output)^2 + lambda sum(1 - |2 h(V) - 1|^beta)
    W_hat = s (clip(floor(W / s) + h(V) + z, q_min, q_max) - z),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

Layers follow one another: what goes into one comes from those before it, already rounded. The activation behind a layer
is part of it. The second term is off for the first fifth of the iterations; then beta falls from 20 to 2, which drives
every h(V) to 0 or 1.

When to use it: weights of 2 to 4 bits without training, in a recipe with `epochs: 0`, behind `Quantize`. It needs a
weight quantizer with a stored range (`CalibratedWeight`, `LSQWeight`) and some 1,000 images, and costs `iterations`
training steps of each layer. The result is an ordinary quantized network that costs nothing more to run. `BRECQ` goes
on from here.

Recipe: recipes/quantize/adaround_w4a8_resnet20_cifar10.yaml.

Chosen where the paper is silent: inputs are quantized while roundings are learned, as they will be. BatchNorm is not
folded into the weight, so the output that is compared is the one behind it. A layer whose error would be larger than
with rounding to the nearest keeps that. Fewer iterations need a higher rate: V must be able to travel some 5 units.
"""

from __future__ import annotations

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import device_of
from galago.quantize.calibration import first_inputs
from galago.quantize.reconstruction import Errors, float_copy, mending, walk
from galago.quantize.rounding import weight_quantized
from galago.quantize.soft_rounding import Course, require_keeps_codes, round_unit, table_of
from galago.quantize.units import units


class AdaRound(Method):
    """Chooses for every quantized weight whether it is rounded up or down; list it behind `Quantize`.

    Args:
        iterations: for each layer (paper: 10,000), or for each block (20,000).
        blocks: mend residual blocks as wholes, not layer by layer.
        batches: training batches to calibrate on; some 1,000 images are enough.
        batch_size: images an iteration.
        rate: Adam's, of V.
        regularizer: lambda; 0.1 for MobileNetV2 at 2 bits.
    """

    done: Tensor

    def __init__(
        self,
        iterations: int = 10_000,
        blocks: bool = False,
        batches: int = 8,
        batch_size: int = 32,
        rate: float = 1e-3,
        regularizer: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value in (("iterations", iterations), ("batches", batches), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"AdaRound: {name} is {value}, but must be at least 1")
        self.iterations, self.blocks, self.batches, self.batch_size = iterations, blocks, batches, batch_size
        self.rate, self.regularizer = rate, regularizer
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self._errors: dict[str, Errors] = {}

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Learns all roundings, once: a resumed run has them in its weights."""
        layers = weight_quantized(model)
        if self.done:
            return model
        require_keeps_codes(layers)
        course = Course(self.iterations, self.rate, self.regularizer, self.batch_size)
        with mending(model, data.seed):
            images = first_inputs(data, self.batches, device_of(model))
            sequence = [u for u in units(model, images[:1], self.blocks) if not layers.keys().isdisjoint(u.layers)]
            for unit, features in walk(model, float_copy(model), sequence, images):
                self._errors[unit.name] = round_unit(model, unit, features, course, f"AdaRound {unit.name}")
        self.done.fill_(True)
        return model

    def summary(self) -> Table | None:
        """What was gained."""
        return table_of("AdaRound", self._errors) if self._errors else None
