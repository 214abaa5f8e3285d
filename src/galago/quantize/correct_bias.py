"""CorrectBias: rounded weights shift a layer's mean output; biases take the shift back.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, arXiv:1906.04721, section 4.2 and appendix D.

Rounding errors of a weight do not average out: each output channel is off by a constant on average, which the next
layers see as a shift. It is measured on a few images without labels, layer after layer, each behind corrected ones:

    b <- b - (E[W_hat x_hat] - E[W x])        per output channel, over images and positions

Without images (`batches: 0`) the mean of a layer's input is taken from the BatchNorm before it, with bias beta and gain
gamma, and its ReLU; phi and Phi are the standard normal's density and distribution:

    b <- b - sum over taps (W_hat - W) E[x],  E[x] = |gamma| phi(beta / |gamma|) + beta Phi(beta / |gamma|)

When to use it: after quantization without training, at 8 bits with one range a weight and at 4 to 6 bits. List it
behind `Quantize`, and behind what chooses roundings. It costs two passes over its images, which go through at once.

Recipe: recipes/quantize/correct_bias_w4a8_resnet20_cifar10.yaml.

Design choices: a BatchNorm behind the layer takes the correction into its running mean, which is where training, should
it follow, expects it; otherwise the layer's own bias does, and is made where there is none. With images the shift that
quantized inputs cause is corrected too; without, only that of the weights, in the float network's statistics. There,
sums add means and variances and a ReLU behind a sum sees a normal distribution of these; ReLU6 clips the same way, and
what else the mean cannot be followed through is left alone. The image itself has mean 0, as it is normalized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import find, flow
from galago.method import Method
from galago.probe import device_of, normalized
from galago.quantize.calibration import first_inputs
from galago.quantize.fold import following_norm
from galago.quantize.graph import CONVOLUTIONS
from galago.quantize.layer import QuantLayer
from galago.quantize.moments import moments
from galago.quantize.rest import rest, rests, wake
from galago.quantize.rounding import weight_quantized


def weight_shift(change: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """What a changed weight adds to each output channel on average: `sum over taps dW E[x]`, no border counted.

    Args:
        change: of the weight, outputs × inputs of a group × taps.
        mean: of each input channel.
        groups: of the convolution.
    """
    by_group = change.reshape(groups, len(change) // groups, change.shape[1], -1).sum(3)
    return (by_group * mean.view(groups, 1, -1)).sum(2).flatten()


class Row(NamedTuple):
    """What became of a layer."""

    layer: str
    corrected: str  # where the correction went
    shift: float  # the largest one of all channels


class CorrectBias(Method):
    """Takes back the shifts that rounding causes; list it behind `Quantize`.

    Args:
        batches: of training images that shifts are measured on; 0 computes them without images.
    """

    done: Tensor

    def __init__(self, batches: int = 8) -> None:
        super().__init__()
        if batches < 0:
            raise UserError(f"CorrectBias: batches is {batches}, but must be 0 (without images) or more")
        self.batches = batches
        self.register_buffer("done", torch.zeros(()))
        self._rows: tuple[Row, ...] = ()

    @torch.no_grad()
    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        layers = weight_quantized(model)
        device = device_of(model)
        example = normalized(data, data.example(), device)
        with in_evaluation(model):
            seen = flow(model, example)
            norms = {path: following_norm(model, seen, path) for path in layers}
            for path, layer in layers.items():
                if norms[path] is None:
                    give_bias(layer)
            if self.done:  # resumed: the checkpoint brings the corrected biases
                return model
            if self.batches == 0:
                self._rows = tuple(without_images(model, layers, norms, example))
            else:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(data.seed)
                    inputs = first_inputs(data, self.batches, device)
                self._rows = tuple(with_images(model, layers, norms, inputs))
        self.done.fill_(1)
        return model

    def rows(self) -> tuple[Row, ...]:
        """What became of each layer, in the order of execution."""
        return self._rows

    def summary(self) -> Table | None:
        """The same as a table."""
        table = Table("layer", "corrected in", "largest shift")
        for row in self._rows:
            table.add_row(row.layer, row.corrected, f"{row.shift:.3g}")
        return table if self._rows else None


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and its quantizers in force, as long as the `with` lasts."""
    modes, slept = {module: module.training for module in model.modules()}, rests(model)
    wake(model.eval())
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if slept:
            rest(model)


# What a convolution is made from, besides its bias.
CONV2D = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class BiasedConv2d(nn.Conv2d):
    """A convolution that was given a bias."""


class BiasedLinear(nn.Linear):
    """A linear layer that was given a bias."""


def give_bias(quantized: QuantLayer) -> None:
    """Gives a quantized layer without a bias one of zeros; layers of unusual types stay as they are."""
    old = quantized.layer
    if old._parameters.get("bias") is not None:
        return
    if type(old) is nn.Conv2d:
        arguments = {name: getattr(old, name) for name in CONV2D}
        new: nn.Module = BiasedConv2d(**arguments)
    elif type(old) is nn.Linear:
        new = BiasedLinear(old.in_features, old.out_features)
    else:
        return
    weight = old.get_parameter("weight")
    new.weight, new.bias = weight, nn.Parameter(weight.new_zeros(len(weight)))
    quantized.layer = new.train(old.training)


def correct(model: nn.Module, path: str, layer: QuantLayer, norm: str | None, shift: Tensor) -> Row:
    """Takes a shift of a layer's output back."""
    largest = float(shift.abs().max())
    if norm is not None:
        find(model, norm).get_buffer("running_mean").add_(shift)
        return Row(path, f"{norm.removesuffix('.layer')} (running mean)", largest)
    bias = layer.layer._parameters.get("bias")
    if bias is None:
        return Row(path, f"nowhere: no bias can be given to a {type(layer.layer).__name__}", largest)
    scale = 1.0 if layer.output_scale is None else layer.output_scale.abs().clamp_min(1e-12)
    bias.sub_(shift / scale)
    given = isinstance(layer.layer, BiasedConv2d | BiasedLinear)
    return Row(path, "a new bias" if given else "its bias", largest)


def with_images(
    model: nn.Module, layers: Mapping[str, QuantLayer], norms: Mapping[str, str | None], inputs: Tensor
) -> list[Row]:
    """Corrects every layer so that its mean output is the float network's, in the order of execution.

    All images go through together: when a layer has given its output and is corrected, those behind it have yet to run.
    """
    wanted: dict[str, Tensor] = {}
    rows: list[Row] = []

    def remember(path: str, layer: QuantLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            wanted[path] = channel_means(layer, output)

        return hook

    def settle(path: str, layer: QuantLayer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            rows.append(correct(model, path, layer, norms[path], channel_means(layer, output) - wanted[path]))
            return layer.forward(*args)

        return hook

    for make, prepared in ((remember, rest), (settle, wake)):
        prepared(model)
        with ExitStack() as hooks:
            for path, layer in layers.items():
                hooks.callback(layer.register_forward_hook(make(path, layer)).remove)
            model(inputs)
    return rows


def channel_means(layer: QuantLayer, output: Tensor) -> Tensor:
    """The mean of each channel that a layer gives out, float64."""
    axis = output.ndim - 1 if isinstance(layer.layer, nn.Linear) else 1
    return output.double().mean([dimension for dimension in range(output.ndim) if dimension != axis])


def without_images(
    model: nn.Module, layers: Mapping[str, QuantLayer], norms: Mapping[str, str | None], example: Tensor
) -> Iterator[Row]:
    """Corrects the layers whose input's mean BatchNorms tell."""
    rest(model)
    seen = flow(model, example)
    wake(model)
    known = moments(model, seen)
    for path in (path for path in seen.gave if path in layers):
        layer = layers[path]
        found = known.get(seen.received[path][0][0])
        if found is None or not isinstance(layer.layer, (nn.Linear, *CONVOLUTIONS)):
            yield Row(path, "nowhere: the mean of its input is not known without images", 0.0)
            continue
        change = (layer.parameters_used()["weight"] - layer.layer.get_parameter("weight")).double()
        shift = weight_shift(change, found.mean, getattr(layer.layer, "groups", 1))
        yield correct(model, path, layer, norms[path], shift)
