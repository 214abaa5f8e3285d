"""StatAssist: 8-bit training from random weights, once the optimizer has seen what float gradients look like.

Kim, Yoo and Yang, "A Study on Optimal INT8 Quantization-aware Training from Scratch", 2020, arXiv:2006.09679 (versions
1 and 2; later ones became "FrostNet").

The first epoch trains in float, with the final optimizer, so that its running statistics (momentum, Adam's moments) are
those of float gradients. Then quantization is switched on in place and the whole schedule follows. Early quantized
gradients, which come through ranges that still move, are so averaged with float ones:

    first quantized step, momentum mu, velocity v of the float phase:   W <- W - eta (mu v + g)

It needs no trained float network, unlike fine-tuning. Nothing in it knows the task; the paper trains classifiers,
detectors, segmentation and image translation this way.

When to use it: 8 bits from scratch, where there are no float weights to start from. List it behind `Quantize`. It costs
the float epochs, which are faster than quantized ones, and compiles the network once more. `GradBoostSGD` and
`GradBoostAdamW` (`galago.quantize.grad_boost`) are the paper's other half: they gather their own statistics in the
float phase and add noise after it. Until the switch, what is measured is the float network.

Recipe: recipes/quantize/statassist_gradboost_w8a8_resnet20_cifar10.yaml.

Design choices: parameters stay the same objects throughout, so the optimizer keeps its state; learned ranges and scales
get no gradient in the float phase and so no step. At the switch all ranges are set anew on the first training batches,
the layers seeing what those before them give when quantized; BatchNorm statistics and random state are as before. A
moving average of the weights begins anew there. A training that ends in the float phase, or goes back to an epoch of it
as the best, is quantized in `finish` with ranges set but not trained. BatchNorm is not folded into the weight before
rounding (the released code does that). The epochs of the float phase count among the recipe's; the schedule runs on,
unless it is `Restarted`, which starts it over at the switch as the paper does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import device_of
from galago.quantize.layer import QuantLayer
from galago.quantize.plan import check_weight, initialize
from galago.quantize.quantizer import Quantizer
from galago.quantize.rest import float_step, rest, restable, rests, wake
from galago.schedule import Schedule


class StatAssist(Method):
    """Trains in float first, then switches the quantizers on; list it behind `Quantize`.

    Args:
        epochs: of the float phase (paper: 1, for detectors 2); 0 quantizes from the first step on.
        batches: how many training batches the ranges are set on at the switch.
    """

    def __init__(self, epochs: int = 1, batches: int = 1) -> None:
        super().__init__()
        if epochs < 0:
            raise UserError(f"StatAssist: epochs is {epochs}, but must be 0 or more")
        if batches < 1:
            raise UserError(
                f"StatAssist: batches is {batches}, which leaves no images to set ranges on; give 1 or more"
            )
        self.epochs, self.batches = epochs, batches
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts the quantizers to rest; on resume the checkpoint wakes them again if it is later than the switch."""
        if not restable(model):
            raise UserError("StatAssist finds nothing quantized: list it behind Quantize")
        self._data = data
        if self.epochs > 0:
            rest(model)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        if epoch >= self.epochs and rests(model):
            self.switch_on(model)
        return model

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        with float_step(rests(model)):
            apply()

    def finish(self, model: nn.Module) -> nn.Module:
        if rests(model):
            self.switch_on(model)
        return model

    def switch_on(self, model: nn.Module) -> None:
        """Sets every range on the weights and images of now, and lets the network compute in quantized values."""
        assert self._data is not None, "prepare comes first"
        wake(model)
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._data.seed)
            inputs = [self._data.normalize(batch.input) for batch in islice(self._data.train(), self.batches)]
            set_ranges(model, torch.cat(inputs).to(device))


@torch.no_grad()
def set_ranges(model: nn.Module, inputs: Tensor) -> None:
    """Initializes all quantizers of a network on its weights and on normalized images. Nothing else changes."""
    ranges = {id(b) for module in model.modules() if isinstance(module, Quantizer) for b in module.buffers()}
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in ranges]
    for path, module in model.named_modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
            check_weight(path, module.layer)
            module.weight_quantizer.initialize(module.layer.get_parameter("weight").detach())
    with torch.compiler.set_stance("force_eager"):
        initialize(model, inputs)
    for buffer, before in statistics:
        buffer.copy_(before)


class Restarted(Schedule):
    """A schedule that begins in the float phase and starts over when quantization is switched on, as the paper has it.

    Args:
        schedule: of the quantized epochs; the float phase sees its beginning.
        float_epochs: as in `StatAssist`.
        epochs: of the whole training, those of the float phase included.

    >>> from galago.schedule import Cosine
    >>> schedule = Restarted(Cosine(warmup=0.5), float_epochs=1, epochs=5)
    >>> [round(schedule(epoch / 5), 3) for epoch in (0, 0.5, 1, 1.5, 3, 5)]
    [0.0, 0.25, 0.0, 0.25, 1.0, 0.0]
    """

    def __init__(self, schedule: Schedule, float_epochs: int, epochs: int) -> None:
        if not 0 <= float_epochs < epochs:
            raise UserError(f"Restarted: float_epochs is {float_epochs}; give less than the {epochs} epochs of all")
        self.schedule, self.float_epochs, self.epochs = schedule, float_epochs, epochs

    def __call__(self, progress: float) -> float:
        done = progress * self.epochs
        if done > self.float_epochs - 1e-6:  # what is a whole number may be a hair less after a division
            done = max(done - self.float_epochs, 0.0)
        return self.schedule(done / (self.epochs - self.float_epochs))
