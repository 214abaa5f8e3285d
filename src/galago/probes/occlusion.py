"""Occlusion curves: how the error grows as more of the middle, or of the border, of every image is hidden.

Sanghyuk Chun, Seong Joon Oh, Sangdoo Yun, Dongyoon Han, Junsuk Choe, Youngjoon Yoo, "An Empirical Evaluation on
Robustness and Uncertainty of Regularization Methods", ICML 2019 workshop, arXiv:2003.03879; the same curves explain the
gain of `galago.augment.cutmix` in its paper.

    center(s)      x[a : a + s, a : a + s] = mean color,  a = ⌊(S - s) / 2⌋
    boundary(s)    everything outside that square = mean color
    s = 0, S/8, 2S/8, …, S

    error_center_occluded_16          share of test images that are misjudged with a hole of 16×16 pixels
    error_boundary_occluded_16        with nothing but these 16×16 pixels left
    mean_error_center_occluded        over all nine sizes
    mean_error_boundary_occluded

When: to compare regularizers that hide parts of images, or to learn how much a network leans on the middle. It costs
seventeen passes over the test images; hidden images are raw, so that a model and its exported file are told the same.
The images are test images: choose nothing by these numbers.

Chosen here: the mean color of the data, 0 after normalization, is the nearest of 256 levels, so that the network sees
up to half a level beside 0. On images that are not square the hole has their shape. A hole of nothing and a border of
nothing are the test images themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from galago.batch import Batch
from galago.data import Data, Loader
from galago.errors import UserError
from galago.probe import TEST, Outputs, ViewsProbe
from galago.task import Task

Hole = tuple[int, int]  # height and width of what is in the middle
CENTER, BOUNDARY = "occluded/center/", "occluded/boundary/"  # of views; the hole follows


def middle(height: int, width: int, hole: Hole) -> Tensor:
    """True in the middle, H×W.

    >>> middle(3, 4, (1, 2)).int().tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    top, left = (height - hole[0]) // 2, (width - hole[1]) // 2
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[top : top + hole[0], left : left + hole[1]] = True
    return inside


def center_occluded(image: Tensor, hole: Hole, color: Tensor) -> Tensor:
    """Images N×C×H×W with a color in their middle. A new tensor.

    Args:
        image: N×C×H×W.
        hole: height and width of the middle.
        color: C×1×1, of the image's type.
    """
    return torch.where(middle(image.shape[-2], image.shape[-1], hole).to(image.device), color, image)


def boundary_occluded(image: Tensor, hole: Hole, color: Tensor) -> Tensor:
    """Images N×C×H×W with a color everywhere but in their middle. Arguments as those of `center_occluded`."""
    return torch.where(middle(image.shape[-2], image.shape[-1], hole).to(image.device), image, color)


def holes(height: int, width: int, steps: int) -> list[Hole]:
    """From nothing to the whole image.

    >>> holes(32, 32, 4)
    [(0, 0), (8, 8), (16, 16), (24, 24), (32, 32)]
    """
    return list(dict.fromkeys((height * step // steps, width * step // steps) for step in range(steps + 1)))


def mean_color(data: Data) -> Tensor:
    """The nearest bytes to the color that normalization makes 0, C×1×1, uint8."""
    return (255 * data.normalize.mean.cpu()).round().clamp(0, 255).to(torch.uint8)


def named(hole: Hole) -> str:
    """A hole as a part of a name: its side, or height and width.

    >>> named((16, 16)), named((16, 24))
    ('16', '16x24')
    """
    return str(hole[0]) if hole[0] == hole[1] else f"{hole[0]}x{hole[1]}"


class OcclusionCurves(ViewsProbe):
    """`error_center_occluded_16`, `mean_error_center_occluded`, … and the same of boundaries, on test images.

    Args:
        steps: how many sizes there are beside nothing.
    """

    def __init__(self, steps: int = 8) -> None:
        if steps < 1:
            raise UserError(f"OcclusionCurves: steps is {steps}; give 1 or more, usually 8")
        self.steps = steps

    def views(self, data: Data) -> dict[str, Loader]:
        """The test images, and those with each hole and each border; of both the whole image as its last size."""
        height, width = data.example().shape[-2:]
        color, found = mean_color(data), dict[str, Loader]({TEST: data.test()})
        sizes = holes(height, width, self.steps)
        found |= {f"{CENTER}{named(hole)}": Hidden(data.test(), center_occluded, hole, color) for hole in sizes[1:]}
        found |= {
            f"{BOUNDARY}{named(hole)}": Hidden(data.test(), boundary_occluded, hole, color) for hole in sizes[:-1]
        }
        return found

    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        errors = {name: error(one, task) for name, one in outputs.items()}
        whole = [name.removeprefix(CENTER) for name in errors if name.startswith(CENTER)][-1]
        center = {"0": errors[TEST]} | _of(CENTER, errors)
        boundary = _of(BOUNDARY, errors) | {whole: errors[TEST]}
        found: dict[str, float] = {}
        for place, curve in (("center", center), ("boundary", boundary)):
            found |= {f"error_{place}_occluded_{size}": number for size, number in curve.items()}
            found[f"mean_error_{place}_occluded"] = sum(curve.values()) / len(curve)
        return found


class Hidden:
    """A `Loader`: the batches of another one, their images hidden in part.

    Args:
        batches: of raw images.
        occluded: hides a part of them.
        hole: height and width of the middle.
        color: what is put there.
    """

    def __init__(
        self, batches: Loader, occluded: Callable[[Tensor, Hole, Tensor], Tensor], hole: Hole, color: Tensor
    ) -> None:
        self.batches, self.occluded, self.hole, self.color = batches, occluded, hole, color

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch._replace(input=self.occluded(batch.input, self.hole, self.color))


def error(outputs: Outputs, task: Task) -> float:
    """The share of images that are misjudged."""
    return float((task.decisions(outputs.output) != outputs.target.argmax(1)).double().mean())


def _of(kind: str, errors: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(kind): number for name, number in errors.items() if name.startswith(kind)}
