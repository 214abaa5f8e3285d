"""AdamBNN, the study of optimizers: what they do to the signs of weights, counted while they train.

The analysis of Liu, Shen, Li, Helwegen, Huang and Cheng, "How Do Adam and Training Strategies Help BNNs Optimization?",
ICML 2021, arXiv:2106.11309: a binary network learns only by weights that change their sign. Too few such flips, and it
stays where it began; too many, and it does not settle.

    FF_t = (1/N) sum |sign(w_(t+1)) - sign(w_t)| / 2        flip-flop ratio: the share of signs that a step turns
    C2I  = 1 - (2/N) sum |sign(w_now) - sign(w_start)| / 2  correlation with the start: 1 all kept, 0 half turned

When to use it: to compare optimizers, learning rates and decay for few bits. List `SignFlips` behind `Quantize` and
`SignFlipRatio` under `probes`; the log then has both numbers after each epoch. It costs two comparisons a weight and
step, and a byte a weight. The finished network holds nothing of it.

Recipe: recipes/quantize/reactnet_w1a1_cifar10.yaml.

Design choices: counted are the weights of all layers whose weight is quantized, at more than 1 bit too; 0 has the sign
1. `flip_flop_ratio` is the mean of FF_t over the steps of the epoch. (The two definitions are recalled, not copied from
the paper.) Where a moving average of the weights is measured, the numbers are such averages as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.method import Method
from galago.probe import Probe
from galago.quantize.layer import QuantLayer
from galago.quantize.rounding import same_layers, weight_quantized, weight_quantizer_of
from galago.task import Task

RECORD = "sign_record"


class SignRecord(nn.Module):
    """What was counted of one layer's weight. It rides on the weight's quantizer, where probes find it.

    Args:
        weights: how many the layer has.
    """

    flips: Tensor
    steps: Tensor
    changed: Tensor

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.weights = weights
        self.register_buffer("flips", torch.zeros(()))  # signs turned, summed over the epoch's steps
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("changed", torch.zeros(()))  # signs that are not those of the start


def positive(layer: QuantLayer) -> Tensor:
    """Which of a layer's latent weights have the sign 1."""
    return layer.layer.get_parameter("weight").detach() >= 0


def record_of(layer: QuantLayer) -> SignRecord:
    """What is kept about a layer."""
    found = weight_quantizer_of(layer).get_submodule(RECORD)
    assert isinstance(found, SignRecord)
    return found


class SignFlips(Method):
    """Counts the signs that turn, step by step, and those that are not what they were at the start."""

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Keeps the signs of the start; on resume the checkpoint brings them back.

        Raises:
            UserError: no layer has a quantized weight.
        """
        for number, layer in enumerate(weight_quantized(model).values()):
            signs = positive(layer)
            self.register_buffer(f"start_{number}", signs)
            weight_quantizer_of(layer).add_module(RECORD, SignRecord(signs.numel()).to(signs.device))
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Begins to count anew.

        Raises:
            UserError: a method that came later has added layers, or made one larger.
        """
        for layer in self.layers(model):
            record_of(layer).flips.zero_()
            record_of(layer).steps.zero_()
        return model

    def layers(self, model: nn.Module) -> list[QuantLayer]:
        """Those that are counted, as they were at the start."""
        return same_layers(model, [signs.shape for signs in self.buffers()], "SignFlips")

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        layers = self.layers(model)
        before = [positive(layer) for layer in layers]
        apply()
        for number, (layer, signs) in enumerate(zip(layers, before, strict=True)):
            now, record = positive(layer), record_of(layer)
            record.flips += (now != signs).sum()
            record.steps += 1
            record.changed.copy_((now != self.get_buffer(f"start_{number}")).sum())

    def finish(self, model: nn.Module) -> nn.Module:
        for layer in weight_quantized(model).values():
            delattr(weight_quantizer_of(layer), RECORD)
        return model


class SignFlipRatio(Probe):
    """`flip_flop_ratio` of the last epoch and `sign_correlation` with the start, where `SignFlips` counts."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        records = [module for module in deployed.modules() if isinstance(module, SignRecord)]
        if not records:
            return {}
        weights = sum(record.weights for record in records)
        flips = sum(float(record.flips / record.steps.clamp_min(1)) for record in records)
        changed = sum(float(record.changed) for record in records)
        return {"flip_flop_ratio": flips / weights, "sign_correlation": 1 - 2 * changed / weights}
