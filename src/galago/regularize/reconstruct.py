"""Reconstruction: a small decoder rebuilds the image from the last feature map, which keeps features honest.

After Lorenzo Brigato, Luca Iocchi, "A Close Look at Deep Learning with Small Data", ICPR 2020, arXiv:2003.12843, which
regularizes a small network by an unsupervised loss.

Few labels leave features free to be anything; having to rebuild the image from them is a second task that needs no
labels. The decoder is thrown away at the end.

    L = CE(f(x + ε), y) + λ mean (x̂ - x)²,   x̂ = decoder(last feature map of f at x + ε)

When: some ten or hundred images of each class and a small network. It costs a few convolutions in each step, the last
of them at full size; the deployed network is the same.

Usual setting: λ from 0.1 to 1; noise ε of deviation 0.1 in the denoising variant, of normalized images.
Recipe: recipes/regularize/small_data_reconstruct_cifar10.yaml.

The paper's own network could not be had: all of this is designed here. The error is the mean over all values of
normalized images as the methods before this one left them, without the noise. The decoder doubles the map as often as
the network halved the image, in steps of nearest-neighbor upsampling and a 3×3 convolution with half as many channels.
Its weights are drawn without a trace in the random state. Where the map has dropout behind it, as in
`galago.models.small`, images are rebuilt from what is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.checkpoint import keep_random_state
from galago.data import Data
from galago.errors import UserError
from galago.layers import removing
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.taps import Taps


def mirrored(image: int, feature: int) -> list[int]:
    """The sizes that halving leads through, from the one above the feature's up to the image's.

    >>> mirrored(28, 3), mirrored(32, 32)
    ([7, 14, 28], [32])
    """
    sizes = [image]
    while sizes[0] // 2 > feature:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def decoder(feature: torch.Size, image: torch.Size) -> nn.Sequential:
    """From a feature map N×D×h×w to images N×C×H×W: upsampling and convolutions, with a ReLU between.

    >>> tuple(decoder(torch.Size([1, 8, 3, 3]), torch.Size([1, 3, 28, 28]))(torch.zeros(2, 8, 3, 3)).shape)
    (2, 3, 28, 28)
    """
    heights, widths = (mirrored(image[side], feature[side]) for side in (2, 3))
    steps = max(len(heights), len(widths))
    heights, widths = ([sizes[0]] * (steps - len(sizes)) + sizes for sizes in (heights, widths))
    channels = [max(feature[1] >> number, image[1]) for number in range(steps)] + [image[1]]
    layers: list[nn.Module] = []
    for number, size in enumerate(zip(heights, widths, strict=True)):
        convolution = nn.Conv2d(channels[number], channels[number + 1], 3, padding=1)
        layers += [nn.Upsample(size), convolution, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def last_map(model: nn.Module, image: Tensor) -> str:
    """The path of the layer that gives the last feature map of more than one place.

    Raises:
        UserError: there is none.
    """
    found: list[str] = []

    def note(path: str, inputs: tuple[Any, ...], output: Any) -> None:
        passed_on = any(output is given for given in inputs)
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1 and not passed_on:
            found.append(path)

    handles = [
        module.register_forward_hook(lambda module, inputs, output, path=path: note(path, inputs, output))
        for path, module in model.named_modules()
        if path
    ]
    with removing(handles), torch.no_grad():
        model(image)
    if not found:
        raise UserError(f"Reconstruct: {type(model).__name__} has no feature map to rebuild images from")
    return found[-1]


class Reconstruct(Method):
    """Adds the error of rebuilding the image from a feature map.

    Args:
        weight: λ; 0 is training without it.
        noise: deviation of noise on what the network sees, in units of normalized images.
        layer: path of the feature map; null for the last.
    """

    def __init__(self, weight: float = 0.5, noise: float = 0.0, layer: str | None = None) -> None:
        super().__init__()
        if weight < 0 or noise < 0:
            raise UserError(f"Reconstruct: weight is {weight:g} and noise {noise:g}; give 0 or more, usually 0.5 and 0")
        self.weight, self.noise, self.layer = weight, noise, layer
        self.decoder = nn.Sequential()
        self._taps: Taps | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Builds the decoder and taps the feature map.

        Raises:
            UserError: there is no such layer, or it gives no feature map.
        """
        if self.weight == 0:
            return model
        device = device_of(model)
        image = normalized(data, data.example()[:1], device)
        with evaluating(model), keep_random_state(), torch.no_grad():
            path = last_map(model, image) if self.layer is None else self.layer
            self._taps = Taps(model, [path])
            model(image)
            self._taps.check("Reconstruct")
            feature = self.feature()
            if feature.ndim != 4:
                shape = "×".join(map(str, feature.shape))
                raise UserError(f"Reconstruct: layer {path!r} gives {shape}; name one that gives a map N×C×H×W")
            self.decoder = decoder(feature.shape, image.shape).to(device)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        if self.weight == 0:
            return inner(batch)
        step = inner(batch._replace(input=self.disturbed(batch.input)))
        feature = self.feature()[: len(batch.input)]  # a network in branches puts the others' features behind
        wrong = (self.decoder(feature) - batch.input).square().mean()
        return step.add(reconstruction=self.weight * wrong)

    def disturbed(self, image: Tensor) -> Tensor:
        """What the network sees; a new tensor where there is noise."""
        if self.noise == 0:
            return image
        drawn = torch.randn(image.shape, device="cpu", dtype=image.dtype)
        return image + self.noise * drawn.to(image.device)

    def feature(self) -> Tensor:
        """The feature map of the last pass."""
        assert self._taps is not None, "prepare comes first"
        value: Tensor = self._taps.values[self._taps.paths[0]]
        return value

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hook away; the decoder was never part of the network."""
        if self._taps is not None:
            self._taps.remove(model)
        return model

    def summary(self) -> str | None:
        """What the image is rebuilt from, and what that takes."""
        if self._taps is None:
            return None
        count = sum(parameter.numel() for parameter in self.decoder.parameters())
        return f"Reconstruct: from {self._taps.paths[0]}, by a decoder of {count:,} parameters that goes in the end"
