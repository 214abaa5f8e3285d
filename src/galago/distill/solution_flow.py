"""FSP: flow of solution procedure, how one layer's features lead to the next one's.

Junho Yim, Donggyu Joo, Jihoon Bae, Junmo Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning", CVPR 2017 (no arXiv number).

    G[a, c] = (1 / HW) Σ_place F_i[a, place] F_{i+1}[c, place],   the larger map averaged to the smaller one's size
    L = Σ_i mean_{n, a, c} (G_i^student - G_i^teacher)²

When: networks of the same widths and different depths. It costs a product of the channels of neighboring layers.

The paper has two stages, here two recipes: the first with this loss alone at weight 1 (`task_weight: 0`), the second
from there (`galago.quantize.two_steps.StartFrom`) with labels alone and a fresh optimizer. Public re-implementations
give the first 30 or 50 epochs. Layers: the stem and the ends of the stages.

Recipe: recipes/distill/fsp_resnet20_cifar10.yaml.

Chosen here: where channels differ, a 1×1 convolution brings the model's to the teacher's; the paper asks for equal
widths. The default is three stages, two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen, View
from galago.distill.sizes import require_maps, to_one_size
from galago.errors import UserError
from galago.schedule import Schedule


def flow_matrix(first: Tensor, second: Tensor) -> Tensor:
    """How channels go together, N×M×K, of maps N×M×H×W and N×K×H×W; sizes may differ.

    >>> flow_matrix(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 5.0))
    tensor([[[15.]]])
    """
    one, other = (feature.flatten(2) for feature in to_one_size(first, second))
    return torch.bmm(one, other.transpose(1, 2)) / one.shape[2]


class SolutionFlow(Lesson):
    """How the features of one layer go together with those of the next.

    Args:
        weight: of this loss, or a schedule of it.
        layers: at least two feature maps of the model, by path or number of stage; the last three stages.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: Sequence[str | int] = (-3, -2, -1),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        if len(self.layers) < 2:
            raise UserError(f"SolutionFlow: it leads from layer to layer, so name at least two; got {self.layers}")
        self.widths = nn.ModuleList()

    def fit(self, student: View, teacher: View) -> None:
        require_maps(self, student, teacher)
        pairs = zip(student.features, teacher.features, strict=True)
        self.widths = nn.ModuleList(to_width(own.shape[1], its.shape[1]) for own, its in pairs)

    def forward(self, seen: Seen) -> Tensor:
        own = [widen(feature) for widen, feature in zip(self.widths, seen.student.features, strict=True)]
        matrices = ([flow_matrix(*both) for both in pairwise(features)] for features in (own, seen.teacher.features))
        return torch.stack([(a - b).square().mean() for a, b in zip(*matrices, strict=True)]).sum()

    def adapters(self) -> list[str]:
        return ["" if isinstance(widen, nn.Identity) else "Conv2d 1×1" for widen in self.widths]


def to_width(own: int, its: int) -> nn.Module:
    """A 1×1 convolution to the teacher's number of channels, or nothing where they are equal."""
    return nn.Identity() if own == its else nn.Conv2d(own, its, 1)
