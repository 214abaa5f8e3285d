"""AT: attention transfer, look where the teacher looks.

Sergey Zagoruyko, Nikos Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional
Neural Networks via Attention Transfer", ICLR 2017, arXiv:1612.03928.

A feature map's attention is how strongly each place answers, over all channels; it has no channels any more, so that
networks of any width compare, without adapters.

    Q(F) = vec(mean_c |F_c|^p) / ‖·‖_2
    L = Σ_layers mean_{n, place} (Q^student - Q^teacher)²

When: networks of one family, with stages of the same sizes. It costs next to nothing beside the teacher.

Usual setting (public benchmark, and the defaults): p = 2, weight 1000, the ends of the stages; the task's own weight 1.

Recipe: recipes/distill/at_resnet20_cifar10.yaml.

As the released code has it, and not the paper's (β / 2) Σ ‖·‖: the mean of squares. The larger map is averaged to the
smaller one's size before powers are taken. A map that is all zero has no attention and no gradient. Chosen here: three
stages, counted from the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen, View
from galago.distill.sizes import require_maps, to_one_size
from galago.schedule import Schedule


def attention(feature: Tensor, power: float = 2.0) -> Tensor:
    """Where a feature map N×C×H×W answers, N×(H·W), each of length 1.

    >>> attention(torch.tensor([[[[3.0]], [[0.0]]]]))
    tensor([[1.]])
    """
    return nn.functional.normalize(feature.abs().pow(power).mean(1).flatten(1))


def attention_distance(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean squared difference of both attentions, a scalar; maps N×C×H×W, channels may differ."""
    own, its = to_one_size(student, teacher)
    return (attention(own, power) - attention(its, power)).square().mean()


class Attention(Lesson):
    """Where each stage of the teacher looks.

    Args:
        power: p of the channels' answers.
        weight: of this loss, or a schedule of it.
        layers: feature maps of the model, by path or number of stage; the last three stages.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        power: float = 2.0,
        weight: float | Schedule = 1000.0,
        layers: Sequence[str | int] = (-3, -2, -1),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        self.power = power

    def fit(self, student: View, teacher: View) -> None:
        require_maps(self, student, teacher)

    def forward(self, seen: Seen) -> Tensor:
        pairs = zip(seen.student.features, seen.teacher.features, strict=True)
        return torch.stack([attention_distance(own, its, self.power) for own, its in pairs]).sum()
