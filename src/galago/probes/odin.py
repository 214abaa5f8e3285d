"""ODIN: out-of-distribution detector for neural networks, by temperature and a small step on the input.

Shiyu Liang, Yixuan Li, R. Srikant, "Enhancing the Reliability of Out-of-distribution Image Detection in Neural
Networks", ICLR 2018, arXiv:1706.02690.

An image is changed a little so that the network becomes surer of what it says anyway. That moves images of the classes
further than others; what a very flat softmax says of them afterwards tells the two apart.

    x̃ = x - ε sign(∇_x CE(z(x) / T, ŷ)),   ŷ = arg max z(x)          S = max_k softmax(z(x̃) / T)_k

    auroc_odin_{set}, fpr95_odin_{set}            and means over the sets of all figures of `galago.probes.detection`

When: a network that ships as a PyTorch model and may take three times as long for an image. It costs two passes forward
and one back over `images` of each set. A file has no gradients, nor has an integer module: nothing is told of them. A
network in training for low bits is differentiated as it trains, with straight-through gradients.

Usual setting, the defaults: T = 1000, ε = 0.0014 (official table: 0.0014 for CIFAR-10 and a DenseNet, up to 0.0028 for
CIFAR-100 and noise); choose ε on validation images from 0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01. No recipe of its
own.

Chosen here: ε is that of pixels in [0, 1], before normalization, and x̃ is not cut to [0, 1]; the sign of 0 is +1, as in
the official code; the softmax is in float64, or float32 would round its small differences away at T = 1000. Images are
spread evenly over each set. They are test images: choose nothing by these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.outside import Outside
from galago.outside_made_up import chosen
from galago.probe import Probe, device_of, evaluating, has_gradients
from galago.probes.detection import told_apart
from galago.probes.stepping import stepped
from galago.task import Task, class_scores


def odin(network: Callable[[Tensor], Tensor], image: Tensor, temperature: float, epsilon: float) -> Tensor:
    """`max_k softmax(z(x̃) / T)_k`, N numbers, float64, on the CPU, as not every device has that.

    Args:
        network: z, from images in [0, 1] to class scores N×K, in evaluation mode.
        image: x, N×C×H×W.
        temperature: T.
        epsilon: ε.

    >>> odin(lambda x: x.flatten(1), torch.tensor([[[[0.5, 0.1]]]], dtype=torch.float64), temperature=1.0, epsilon=0.3)
    tensor([0.7311], dtype=torch.float64)
    """
    with torch.no_grad():
        said = network(image).argmax(1)

    def loss(seen: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(seen) / temperature, said, reduction="none")

    moved = stepped(image, loss, epsilon)
    with torch.no_grad():
        scores = network(moved).cpu().double() / temperature
    return scores.softmax(1).max(1).values


class ODIN(Probe):
    """How well ODIN tells test images from images of other sets, as `auroc_odin_uniform`.

    Args:
        outside: sets of other images; None for five made-up ones.
        temperature: T, that scores are divided by.
        epsilon: ε, length of the step, where pixels go to 1.
        images: how many of each set are used.
    """

    def __init__(
        self,
        outside: Sequence[Outside] | None = None,
        temperature: float = 1000.0,
        epsilon: float = 0.0014,
        images: int = 1000,
    ) -> None:
        if temperature <= 0 or epsilon < 0 or images < 1:
            raise UserError(
                f"ODIN: temperature {temperature:g} must be above 0, epsilon {epsilon:g} 0 or more, images {images} 1"
                " or more; 1000, 0.0014 and 1000 are usual"
            )
        self.outside = chosen(outside, "ODIN")
        self.temperature, self.epsilon, self.images = temperature, epsilon, images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device = device_of(deployed)

        def score(image: Tensor) -> Tensor:
            pixels = image.to(device) / 255
            return odin(lambda seen: class_scores(deployed(seen), task), pixels, self.temperature, self.epsilon)

        with evaluating(deployed):
            if not has_gradients(deployed, data.example().to(device)):
                return {}
            return told_apart("odin", score, data, self.outside, self.images)
