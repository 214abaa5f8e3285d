"""BRECQ and QDrop: block reconstruction, with activations that are quantized by chance.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021, arXiv:2102.05426; Wei, Gong, Li, Liu and Yu, "QDrop: Randomly Dropping Quantization for
Extremely Low-bit Post-Training Quantization", ICLR 2022, arXiv:2203.05740.

AdaRound's choice of roundings, but for whole residual blocks, within which layers can make up for one another, and with
learned input ranges.

    BRECQ   1. roundings of all blocks, one after another, with float activations:
               mean sum_channels (w (output - float output))^2 + lambda sum(1 - |2 h(V) - 1|^beta)
               w = 1, or with `fisher`  1 + |d KL(p_float | p) / d output|
            2. input ranges of all blocks:  mean sum_channels |output - float output|^2.4
    QDrop   both at once (w = 1); every value of an activation inside the block stays float with probability 1/2,
            and of what goes in, half comes from the float network

QDrop's networks see many mixtures of float and quantized activations, which makes roundings that hold on other images.

When to use it: 2 to 4 bits without training, in a recipe with `epochs: 0`, behind `Quantize`; QDrop where activations
have 4 bits or fewer. It needs a weight quantizer with a stored range (`CalibratedWeight`, `LSQWeight`), an input
quantizer whose range learns (`LSQ`), and some 1,000 images, unlabeled. It costs `iterations` training steps of each
block, and without `drop` another `scale_iterations`.

Recipe: recipes/quantize/brecq_w4a4_resnet20_cifar10.yaml; `qdrop_w2a4_resnet20_cifar10.yaml` beside it is QDrop's.

Chosen here: BatchNorm stays behind the weight and is part of the block; its statistics do not move. The gradient in w
is that of each image's own divergence; the public code's is the mean over a batch's and so depends on its size. What
would make a block's error larger is taken back. Quantized streams take part as inputs do.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import device_of
from galago.quantize.calibration import first_inputs
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.reconstruction import (
    PASS,
    Errors,
    Features,
    Learned,
    distance,
    error,
    float_copy,
    kept_if_better,
    learning,
    mending,
    minimize,
    scores,
    walk,
)
from galago.quantize.rest import rest, wake
from galago.quantize.rounding import weight_quantized
from galago.quantize.soft_rounding import Course, partly_float, require_keeps_codes, round_unit, table_of
from galago.quantize.units import Unit, units

EXPONENT = 2.4  # of the error that ranges are learned with


class BRECQ(Method):
    """Chooses roundings block by block and learns input ranges; list it behind `Quantize`.

    Args:
        iterations: for each block's roundings.
        scale_iterations: for each block's input ranges; 0 leaves them. QDrop learns both in the same iterations.
        drop: QDrop: the probability that an activation stays float meanwhile, 0.5 as a rule; none: BRECQ.
        fisher: weigh errors by how much the network's answer depends on them.
        batches: training batches to calibrate on; some 1,000 images are enough.
        batch_size: images an iteration.
        rate: Adam's, of V.
        scale_rate: Adam's, of the ranges (paper: 4e-5; the public script: 4e-4); falls to 0 along a cosine.
        regularizer: lambda; 0.1 for MobileNetV2 at 2 bits.
    """

    done: Tensor

    def __init__(
        self,
        iterations: int = 20_000,
        scale_iterations: int = 5_000,
        drop: float | None = None,
        fisher: bool = False,
        batches: int = 8,
        batch_size: int = 32,
        rate: float = 1e-3,
        scale_rate: float = 4e-5,
        regularizer: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("iterations", iterations, 1),
            ("scale_iterations", scale_iterations, 0),
            ("batches", batches, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise UserError(f"BRECQ: {name} is {value}, but must be at least {least}")
        if drop is not None and not 0 <= drop < 1:
            raise UserError(f"BRECQ: drop is {drop:g}, but must be 0 or more and below 1; QDrop's is 0.5")
        self.iterations, self.scale_iterations, self.drop, self.fisher = iterations, scale_iterations, drop, fisher
        self.batches, self.batch_size, self.rate, self.scale_rate = batches, batch_size, rate, scale_rate
        self.regularizer = regularizer
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self._errors: dict[str, Errors] = {}

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Learns all roundings and ranges, once: a resumed run has them in its weights.

        Raises:
            UserError: ranges are to be learned, but no input has one that can be.
        """
        layers = weight_quantized(model)
        if self.done:
            return model
        require_keeps_codes(layers)
        if self.scale_iterations and not ranges_of(model):
            raise UserError(
                "BRECQ learns the ranges of inputs, but no input quantizer has one that can be learned;"
                " use LSQ there, or set scale_iterations to 0"
            )
        with mending(model, data.seed):
            images = first_inputs(data, self.batches, device_of(model))
            sequence, teacher = units(model, images[:1]), float_copy(model)
            if self.drop is None:
                with partly_float(model, 1.0):
                    self.choose_roundings(model, teacher, sequence, images)
                self.learn_ranges(model, teacher, sequence, images)
            else:
                self.choose_roundings(model, teacher, sequence, images)
        self.done.fill_(True)
        return model

    def summary(self) -> Table | None:
        """What was gained in the pass that chooses roundings."""
        return table_of("BRECQ" if self.drop is None else "QDrop", self._errors) if self._errors else None

    def choose_roundings(self, model: nn.Module, teacher: nn.Module, sequence: list[Unit], images: Tensor) -> None:
        """The pass over all blocks that decides about weights; with `drop`, about ranges too."""
        course = Course(self.iterations, self.rate, self.regularizer, self.batch_size)
        for unit, features in walk(model, teacher, sequence, images):
            learned = self.learned_ranges(unit.parts(model)) if self.drop is not None else []
            weights = importance(model, teacher, unit, images) if self.fisher else None
            what = f"{'BRECQ' if self.drop is None else 'QDrop'} {unit.name}"
            self._errors[unit.name] = round_unit(
                model, unit, features, course, what, weights, self.drop or 0.0, learned
            )

    def learn_ranges(self, model: nn.Module, teacher: nn.Module, sequence: list[Unit], images: Tensor) -> None:
        """The second pass of BRECQ over all blocks, with the weights as they are now."""
        for unit, features in walk(model, teacher, sequence, images):
            learned = self.learned_ranges(unit.parts(model))
            if learned:
                self.fit_ranges(model, unit, features, learned)

    def learned_ranges(self, parts: nn.Module) -> list[Learned]:
        """The ranges in a block; none where they are to stay."""
        found = ranges_of(parts) if self.scale_iterations else []
        return [Learned(found, self.scale_rate, cosine=True)] if found else []

    def fit_ranges(self, model: nn.Module, unit: Unit, features: Features, learned: list[Learned]) -> None:
        """Fits the ranges of one block."""
        parts = unit.parts(model)

        def loss(picked: Tensor, iteration: int) -> Tensor:
            return distance(parts(features.given[picked]), features.target[picked], EXPONENT)

        def learn() -> None:
            with learning(ranges):
                what = f"BRECQ ranges {unit.name}"
                minimize(loss, learned, len(features.given), self.batch_size, self.scale_iterations, what)

        ranges = [parameter for group in learned for parameter in group.parameters]
        kept_if_better(ranges, lambda: error(model, unit, features, EXPONENT), learn)


def ranges_of(model: nn.Module) -> list[nn.Parameter]:
    """What can be learned of the quantizers of inputs and streams."""
    quantizers = [
        module.input_quantizer if isinstance(module, QuantLayer) else module.output_quantizer
        for module in model.modules()
        if isinstance(module, QuantLayer | QuantOutput)
    ]
    found = [parameter for quantizer in quantizers if quantizer is not None for parameter in quantizer.parameters()]
    return list(dict.fromkeys(found))


def importance(model: nn.Module, teacher: nn.Module, unit: Unit, images: Tensor) -> Tensor:
    """`1 + |d KL(p_float | p) / d output|` of each value of a unit's output, the units behind it in float.

    Args:
        model: quantized up to the unit and in it, whatever it is behind.
        teacher: the same in float.
        unit: whose output is meant.
        images: normalized.
    """
    caught: list[Tensor] = []

    def go_on_in_float(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rest(model)
        caught.append(output.detach().requires_grad_())
        return caught[-1].clone()  # which what follows may change in place

    found = []
    handle = model.get_submodule(unit.paths[-1]).register_forward_hook(go_on_in_float)
    try:
        for part in torch.split(images, PASS):
            with torch.no_grad():
                wanted = scores(teacher(part)).log_softmax(1)
            with torch.enable_grad():
                answer = scores(model(part)).log_softmax(1)
            wake(model)
            divergence = nn.functional.kl_div(answer, wanted, reduction="sum", log_target=True)
            found.append(torch.autograd.grad(divergence, caught.pop())[0].abs() + 1)
    finally:
        handle.remove()
        wake(model)
    return torch.cat(found)
