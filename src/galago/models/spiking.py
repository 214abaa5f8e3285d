"""A spiking network for small images: convolutions between neurons that fire, read out by counting spikes.

The neurons are those of `galago.models.lif`, the network is ours: for each width a 3×3 convolution, BatchNorm, LIF
neurons and 2×2 average pooling; then a linear layer, BatchNorm and one output neuron a class. The image is shown for
`steps` time steps, and the class whose neuron fires most often wins.

    constant current (the default): the image itself, in every step, is what the first convolution reads
    rate coding: S[t] = 1[x > r[t]], so that a pixel of brightness x in [0, 1] fires in a share x of the steps

When to use it: as teacher, intermediate and student of `galago.distill.spikes`, and to see what spikes cost
(`galago.probes.spikes`). A network of widths 16, 32 has 20,548 parameters on 28×28 pixels. It is slow to train: 16
steps are 16 images to all layers but the first, and the neurons' own arithmetic takes longer than the convolutions.
`Quantize` makes its layers integer and leaves the neurons float; begin it with a trained network.

Recipe: recipes/distill/spikes_teacher_mnist.yaml.

Design choices: BatchNorm is shared over the time steps, in its statistics as in its parameters, so it folds into the
layer as in any network. Without one in front of the output, neurons of classes fall silent within a few steps of
training, too far below the threshold for the surrogate gradient to wake them. With constant current the first
convolution runs once, as it gives the same in each step. Rate coding wants pixels in [0, 1] (data with `mean: [0.0]`
and `std: [1.0]`). Its numbers r are drawn once, the same in every network of this size and number of steps, of fewer
steps the first of them: two networks see the same spikes, and a file is as good as the model. They are (m + 1/2) / 255,
m evenly drawn from 0 … 254: exactly right for 8-bit images, none of whose values any engine can find on the other side.
All neurons of a network are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.models.lif import LIF, SpikeCount, at_each_step, membranes
from galago.models.weights import load_weights


class RateCode(nn.Module):
    """Images N×C×H×W in [0, 1] to spikes N×C×H×W×T that are as frequent as a pixel is bright.

    Args:
        channels: of the image.
        size: height and width.
        steps: T.
    """

    levels: Tensor

    def __init__(self, channels: int, size: int, steps: int) -> None:
        super().__init__()
        self.channels, self.size, self.steps = channels, size, steps
        drawn = torch.randint(255, (steps, 1, channels, size, size), generator=torch.Generator().manual_seed(0))
        self.register_buffer("levels", (drawn + 0.5) / 255)

    def forward(self, image: Tensor) -> Tensor:
        return (image > self.levels).to(image.dtype).movedim(0, -1)


class SpikingBlock(nn.Module):
    """A 3×3 convolution, BatchNorm, neurons and 2×2 average pooling: N×C×H×W×T to spikes per neuron, halved.

    Args:
        before: channels in.
        width: channels out.
        steps: T; what comes in may also have one step, which is then repeated.
        neurons: behind the convolution.
    """

    def __init__(self, before: int, width: int, steps: int, neurons: LIF) -> None:
        super().__init__()
        self.before, self.width, self.steps = before, width, steps
        self.conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.neurons = neurons
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        current = at_each_step(lambda image: self.bn(self.conv(image)), x)
        return at_each_step(self.pool, self.neurons(current.expand(-1, -1, -1, -1, self.steps)))


class SpikingNet(nn.Module):
    """Spiking convolutional network, N×C×H×W to class scores N×K.

    Args:
        classes: number of outputs.
        channels: of the input image.
        size: height and width of the input image.
        widths: channels of each block; every block halves the image.
        steps: how many time steps an image is shown.
        rate_coded: pixels come as spikes, and not as the same current in each step.
        leak: what is left of a membrane after one step, 0 to 1.
        threshold: where a neuron fires.
        slope: how steep the surrogate gradient falls away from the threshold.
        scale: the score of a class whose neuron fires in every step.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        size: int = 28,
        widths: Sequence[int] = (16, 32),
        steps: int = 16,
        rate_coded: bool = False,
        leak: float = 0.9,
        threshold: float = 1.0,
        slope: float = 10.0,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.classes, self.channels, self.size, self.widths = classes, channels, size, list(widths)
        self.steps, self.rate_coded, self.scale = steps, rate_coded, scale
        self.leak, self.threshold, self.slope = leak, threshold, slope
        if steps < 1:
            raise UserError(f"SpikingNet: steps is {steps}; give 1 or more, usually 16")
        if not widths or not (left := size // 2 ** len(widths)):
            raise UserError(
                f"SpikingNet: {len(widths)} widths halve an image of {size} pixels as often; give at least one width"
                " and no more than leave a pixel"
            )
        self.encoding = RateCode(channels, size, steps) if rate_coded else None
        pairs = zip([channels, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(SpikingBlock(*pair, steps, LIF(leak, threshold, slope)) for pair in pairs))
        self.head = nn.Linear(widths[-1] * left**2, classes, bias=False)
        self.bn = nn.BatchNorm1d(classes)
        self.output = LIF(leak, threshold, slope)
        self.readout = SpikeCount(scale)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[1:] != (self.channels, self.size, self.size):
            raise UserError(
                f"SpikingNet was made for images of {self.channels}×{self.size}×{self.size}, these are"
                f" {'×'.join(map(str, image.shape[1:]))}; set its channels and size"
            )
        shown = image.unsqueeze(-1) if self.encoding is None else self.encoding(image)
        current = at_each_step(lambda features: self.bn(self.head(features.flatten(1))), self.blocks(shown))
        spikes = self.output(current)
        scores: Tensor = self.readout(spikes, membranes(current.detach(), spikes.detach(), self.leak))
        return scores


def spiking_net(
    classes: int = 10,
    channels: int = 1,
    size: int = 28,
    widths: Sequence[int] = (16, 32),
    steps: int = 16,
    rate_coded: bool = False,
    weights: Path | None = None,
) -> nn.Module:
    """A spiking network for images of 8×8 to 32×32 pixels, with usual neurons.

    Args:
        classes: number of outputs.
        channels: of the input image.
        size: height and width of the input image.
        widths: channels of each block; every block halves the image.
        steps: how many time steps an image is shown.
        rate_coded: pixels come as spikes, and not as the same current in each step.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(SpikingNet(classes, channels, size, widths, steps, rate_coded), weights)
