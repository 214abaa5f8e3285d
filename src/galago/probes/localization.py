"""Localization without having learned it: whether the class-activation map of a classifier lies on the object.

Bolei Zhou, Aditya Khosla, Agata Lapedriza, Aude Oliva, Antonio Torralba, "Learning Deep Features for Discriminative
Localization", CVPR 2016, arXiv:1512.04150; as `galago.augment.cutmix` is evaluated in its paper (recalled; thresholds
are a design choice).

    map_k(y, x) = Σ_c W_kc F_c(y, x)      F what the last convolution gives, W the classifier's weights, k the decision
    min-max normalized, bilinear to the size of the image
    box = the tight box of the largest connected part that is not below 0.2 (parts touch along an edge)
    found where the intersection with a true box is at least half of the union

    localization_accuracy         the class is right and the box is found
    box_accuracy                  the box of the predicted class is found, right or wrong
    box_overlap                   mean intersection over union, with the best true box
    whole_image_box_accuracy      what a box as large as the image would score: compare with it

When: to see whether a regularizer makes a classifier look at whole objects. It needs data with boxes
(`galago.datasets.boxed`) and a network that ends in pooling and one linear layer; it costs one pass over the test
images. An exported file has no maps to look at and gives no numbers.

Chosen here: the last convolution is the last layer whose map is 4-dimensional and has as many channels as the
classifier takes in. Where several true boxes are known, the best counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import classifier, find, innermost, removing, tap
from galago.probe import Deployed, Probe, device_of, evaluating
from galago.task import Task

BOX = "box"  # of a batch's `extra`: N×4 or N×M×4, top, bottom, left, right; bottom and right are outside


def activation_map(features: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """`Σ_c W_kc F_c` of each image's class, from 0 to 1, N×h×w; 0 everywhere where it is flat.

    Args:
        features: F, N×C×h×w.
        weight: W, K×C.
        label: k, N.

    >>> activation_map(torch.tensor([[[[1.0, 3.0]], [[9.0, 0.0]]]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    tensor([[[0., 1.]]])
    """
    raw = torch.einsum("nchw,nc->nhw", features, weight[label])
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    return (raw - low) / (high - low).clamp_min(torch.finfo(raw.dtype).tiny)


def largest_part(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part; the first one of several; nothing where nothing is inside. H×W.

    >>> largest_part(np.array([[True, False, True], [False, False, True]])).astype(int).tolist()
    [[0, 0, 1], [0, 0, 1]]
    """
    left, best = inside.copy(), list[tuple[int, int]]()
    for row, column in zip(*np.nonzero(inside), strict=True):
        if left[row, column]:
            part = _grown(left, (int(row), int(column)))
            best = part if len(part) > len(best) else best
    found = np.zeros_like(inside)
    for place in best:
        found[place] = True
    return found


def _grown(left: npt.NDArray[np.bool_], seed: tuple[int, int]) -> list[tuple[int, int]]:
    """All places that a seed is connected with, which are then taken."""
    height, width = left.shape
    left[seed] = False
    part, waiting = [seed], deque([seed])
    while waiting:
        row, column = waiting.popleft()
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < height and 0 <= x < width and left[y, x]:
                left[y, x] = False
                part.append((y, x))
                waiting.append((y, x))
    return part


def tight_box(inside: npt.NDArray[np.bool_]) -> list[int]:
    """Top, bottom, left, right; bottom and right are outside. All 0 where nothing is inside.

    >>> tight_box(np.array([[False, False, False], [False, True, True]]))
    [1, 2, 1, 3]
    """
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1] if len(rows) else [0, 0, 0, 0]


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes …×4; 0 with an empty one.

    >>> overlap(torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 0.0, 2.0]))
    tensor(0.3333)
    """
    top, left = (torch.maximum(first[..., i], second[..., i]) for i in (0, 2))
    bottom, right = (torch.minimum(first[..., i], second[..., i]) for i in (1, 3))
    common = (bottom - top).clamp_min(0) * (right - left).clamp_min(0)
    union = area(first) + area(second) - common
    return torch.where(union > 0, common / union, 0.0)


def area(box: Tensor) -> Tensor:
    """Of boxes …×4."""
    return (box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2])


class Localization(Probe):
    """`localization_accuracy`, `box_accuracy`, `box_overlap` and `whole_image_box_accuracy`, on test images.

    Args:
        threshold: of the map, where a box begins.
        least_overlap: from which a box counts as found.
        layer: path of the last convolution, or what stands behind it; None for the last map that fits the classifier.
    """

    def __init__(self, threshold: float = 0.2, least_overlap: float = 0.5, layer: str | None = None) -> None:
        for name, share in (("threshold", threshold), ("least_overlap", least_overlap)):
            if not 0 < share <= 1:
                raise UserError(f"Localization: {name} is {share:g}; give a share above 0 and up to 1")
        self.threshold, self.least_overlap, self.layer = threshold, least_overlap, layer

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        if not isinstance(deployed, Deployed):
            return {}
        with evaluating(deployed), torch.no_grad():
            network = deployed.network
            head = classifier(network)
            weight = innermost(find(network, head)).weight
            image = data.example().to(device_of(deployed))
            layer = last_map(deployed, image, weight.shape[1]) if self.layer is None else self.layer
            found = list(self.judged(deployed, task, data, layer, weight))
        right, best, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        return {
            "localization_accuracy": float((right & (best >= self.least_overlap)).double().mean()),
            "box_accuracy": float((best >= self.least_overlap).double().mean()),
            "box_overlap": float(best.double().mean()),
            "whole_image_box_accuracy": float((whole >= self.least_overlap).double().mean()),
        }

    def judged(
        self, deployed: Deployed, task: Task, data: Data, layer: str, weight: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each batch: whether the class is right, the box's overlap, and that of the whole image, N each."""
        device = device_of(deployed)
        for batch in data.test():
            if BOX not in batch.extra:
                raise UserError("Localization: the data know no boxes; wrap them in galago.datasets.boxed.Boxed")
            height, width = batch.input.shape[-2:]
            with tap(deployed.network, layer) as features:
                label = task.decisions(deployed(batch.input.to(device)))
            maps = activation_map(features_of(features.value, weight, layer), weight, label)
            sized = nn.functional.interpolate(maps[:, None].float(), (height, width), mode="bilinear")[:, 0]
            boxes = [tight_box(largest_part(one >= self.threshold)) for one in sized.cpu().numpy()]
            true = batch.extra[BOX].float().view(len(boxes), -1, 4)
            image = torch.tensor([0, height, 0, width]).float()
            best, whole = (overlap(one, true).amax(1) for one in (torch.tensor(boxes).float()[:, None], image))
            yield label.cpu() == batch.target.argmax(1), best, whole


def features_of(features: Any, weight: Tensor, layer: str) -> Tensor:
    """A feature map that the classifier's weights fit.

    Raises:
        UserError: it is none.
    """
    if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != weight.shape[1]:
        raise UserError(
            f"Localization: layer {layer!r} gives no map of {weight.shape[1]} channels, as the classifier takes in"
        )
    return features


def last_map(deployed: Deployed, image: Tensor, channels: int) -> str:
    """The path of the last layer that gives a map of so many channels, larger than a pixel.

    Raises:
        UserError: there is none.
    """
    seen: list[str] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            fits = isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == channels
            if fits and max(output.shape[2:]) > 1:
                seen.append(path)

        return hook

    with removing([part.register_forward_hook(note(path)) for path, part in deployed.network.named_modules() if path]):
        deployed(image)
    if not seen:
        raise UserError(
            f"Localization: no layer gives a map of {channels} channels, as the classifier takes in; the network must"
            " end in pooling and one linear layer"
        )
    return seen[-1]
