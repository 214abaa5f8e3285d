"""ABN: an attention branch that scores the classes, too, and shows the rest of the network where to look.

Hiroshi Fukui, Tsubasa Hirakawa, Takayoshi Yamashita, Hironobu Fujiyoshi, "Attention Branch Network: Learning of
Attention Mechanism for Visual Explanation", CVPR 2019, arXiv:1812.10025.

A network is cut before its last stage. A copy of that stage that keeps the size of the map scores the classes and
draws a map of what it saw them by; the stage itself sees the features with that map laid over them.

    u = ReLU(BN(conv1×1(BN(stage'(x)))))        K channels, stage' with stride 1
    z_a = mean over places of conv1×1(u)        A = sigmoid(BN(conv3×3(u))), one channel
    z_p = rest(stage(x A + x))                  what the network answers

In training the outputs are `main` (z_p) and `attention` (z_a). The paper's loss CE(z_p, y) + CE(z_a, y) is the task's
and that of `galago.regularize.auxiliary_heads.AuxiliaryHeads`. A network that predicts computes z_p alone, as its file
does. `attention_maps` gives A for raw images; a report shows some.

When: a picture of what decided beside each answer, and a little accuracy (reported: CIFAR-100, ResNet-110, 22.5 against
24.1 % error), for a copy of the last stage on a map of four times the area: 2.3 times the multiply-accumulates of a
ResNet-20. With `dropout` it is the Bayesian form, which `galago.probes.attention_uncertainty` measures; dropout rests
in evaluation mode, so that the file makes one pass.

Usual setting (published code, CIFAR-100): 300 epochs, SGD 0.9 at 0.1, a tenth from 150 and 225 on, weight decay 1e-4,
batch 128.

Recipe: recipes/regularize/attention_branch_resnet20_cifar10.yaml.

Chosen here: any network that ends in a linear layer, cut at any stage of convolutions, instead of the published
families. The branch, stage' too, is drawn from N(0, 2/(k² C_out)) as in the published code; the network keeps the
weights it has. Dropout (no part of this paper) lies behind each block of stage and stage' and before both classifiers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from galago.errors import UserError
from galago.layers import classifier, find, innermost, swap, tap
from galago.probe import evaluating
from galago.spec import describe
from galago.task import scores_of

MAP = "branch.sigmoid"  # gives it, seen from the stage behind its attention


class Branch(nn.Module):
    """The attention branch: from the trunk's features N×C×h×w to class scores and a map.

    Args:
        stage: keeps the size of the map.
        channels: that it gives.
        classes: K.
        dropout: its rate before the class scores.
    """

    def __init__(self, stage: nn.Module, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.stage, self.norm = stage, nn.BatchNorm2d(channels)
        self.conv, self.conv_norm = _conv(channels, classes, 1), nn.BatchNorm2d(classes)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        self.score, self.pool, self.flatten = _conv(classes, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.gather, self.gather_norm, self.sigmoid = _conv(classes, 1, 3), nn.BatchNorm2d(1), nn.Sigmoid()
        self.apply(_draw_anew)

    def forward(self, x: Tensor) -> Tensor:
        """`u`, N×K×h×w."""
        u: Tensor = self.relu(self.conv_norm(self.conv(self.norm(self.stage(x)))))
        return u

    def scores(self, u: Tensor) -> Tensor:
        """`z_a`, N×K."""
        found: Tensor = self.flatten(self.pool(self.score(self.dropout(u))))
        return found

    def map(self, u: Tensor) -> Tensor:
        """`A`, N×1×h×w."""
        found: Tensor = self.sigmoid(self.gather_norm(self.gather(u)))
        return found


class Product(nn.Module):
    """`x A`, as a module, so that a quantizer can stand behind it."""

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        return x * attention


class Attend(nn.Module):
    """`x A + x`: features with the map laid over them, all of them still there where it is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.product = Product()

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        attended: Tensor = self.product(x, attention) + x
        return attended


class Said:
    """What the branch scored on the way, until the network's answer is complete."""

    scores: Tensor | None = None


class Attended(nn.Module):
    """The last stage behind its attention.

    Args:
        layer: the stage.
        branch: the attention branch.
        said: takes the branch's scores.
    """

    def __init__(self, layer: nn.Module, branch: Branch, said: Said) -> None:
        super().__init__()
        self.branch, self.attend, self.layer, self.said = branch, Attend(), layer, said
        self.passes, self.both = 1, False

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.passes == 1 else x.repeat(self.passes, *[1] * (x.ndim - 1))
        u = self.branch(x)
        if self.training or self.both:
            self.said.scores = self.branch.scores(u)
        output: Tensor = self.layer(self.attend(x, self.branch.map(u)))
        return output

    @contextmanager
    def asked(self, passes: int = 1) -> Iterator[None]:
        """While the `with` lasts, all from here on runs so many times on the same features, and both branches answer.

        Args:
            passes: n; their answers lie one behind another on the batch dimension.
        """
        before, (self.passes, self.both) = (self.passes, self.both), (passes, True)
        try:
            yield
        finally:
            self.passes, self.both = before


class AttentionBranch(nn.Module):
    """A network with an attention branch: N×C×H×W to scores N×K of `main` and `attention`, or of main when it predicts.

    Args:
        backbone: the network; it ends in a linear layer.
        stage: path of its last stage, which the branch copies.
        dropout: rate in both branches; 0 for none.
    """

    def __init__(self, backbone: nn.Module, stage: str, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"AttentionBranch: dropout is {dropout:g}; give a rate from 0 to below 1, usually 0.2")
        self.stage, self.dropout, self.said = stage, dropout, Said()
        last, head = find(backbone, stage), classifier(backbone)
        twin, channels = _twin(last, stage)
        branch = Branch(twin, channels, int(innermost(find(backbone, head)).weight.shape[0]), dropout)
        if dropout:
            last, branch.stage = _with_dropout(last, dropout), _with_dropout(branch.stage, dropout)
            backbone = swap(backbone, head, nn.Sequential(nn.Dropout(dropout), find(backbone, head)))
        self.backbone = swap(backbone, stage, Attended(last, branch, self.said))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        main = scores_of(self.backbone(x))
        attention, self.said.scores = self.said.scores, None
        return main if attention is None else {"main": main, "attention": attention}


def attention_branch(backbone: nn.Module, stage: str, dropout: float = 0.0) -> nn.Module:
    """Any network with an attention branch before its last stage.

    Args:
        backbone: a network that ends in a linear layer, such as galago.models.resnet.resnet20.
        stage: path of its last stage (`layer3`), which the branch copies.
        dropout: rate in both branches, 0.2 for the Bayesian form; 0 for none.
    """
    noted = "built_from" in backbone.__dict__  # a run's network, whose record must not read that run again
    model = AttentionBranch(backbone, stage, dropout)
    if noted:
        model.__dict__["built_from"] = describe(model)
    return model


def attended_in(model: nn.Module) -> str | None:
    """The path of the stage behind its attention, in whatever holds the network; None where there is none."""
    return next((path for path, part in model.named_modules() if isinstance(part, Attended)), None)


@torch.no_grad()
def attention_maps(deployed: nn.Module, images: Tensor) -> Tensor | None:
    """Where a network looks, N×h×w in [0, 1]; None for a network without attention branch.

    Args:
        deployed: from images to outputs, such as `galago.probe.Deployed`.
        images: that it takes in: raw where it normalizes them itself.
    """
    path = attended_in(deployed)
    if path is None:
        return None
    with evaluating(deployed), tap(deployed, f"{path}.{MAP}") as seen:
        deployed(images)
    found: Tensor = seen.value.squeeze(1)
    return found


def _conv(before: int, width: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, size, padding=size // 2, bias=False)


def _twin(stage: nn.Module, path: str) -> tuple[nn.Module, int]:
    """A copy of a stage with stride 1, and how many channels it gives.

    Raises:
        UserError: it does not take in a map and give one of the same size.
    """
    twin = copy.deepcopy(stage)
    for part in twin.modules():
        if isinstance(stride := getattr(part, "stride", None), int | tuple):
            part.__dict__["stride"] = 1 if isinstance(stride, int) else (1,) * len(stride)
    taken = next((part.in_channels for part in twin.modules() if isinstance(part, nn.Conv2d)), 0)
    try:
        with evaluating(twin), torch.no_grad():
            weight = next(twin.parameters())
            given = twin(torch.zeros(1, taken, 8, 8, dtype=weight.dtype, device=weight.device))
        fits = given.shape[2:] == (8, 8)
    except (RuntimeError, ValueError, TypeError, AttributeError, StopIteration):
        fits = False
    if not fits:
        raise UserError(
            f"AttentionBranch: a copy of {path!r} with stride 1 does not give a map of the size it takes in;"
            " name a stage of convolutions, such as layer3 of a ResNet"
        )
    return twin, int(given.shape[1])


def _draw_anew(layer: nn.Module) -> None:
    if isinstance(layer, _ConvNd):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif callable(begin := getattr(layer, "reset_parameters", None)):
        begin()


def _with_dropout(stage: nn.Module, rate: float) -> nn.Module:
    """Dropout behind each block of a stage; behind a stage that is not made of blocks."""
    made_of_blocks = isinstance(stage, nn.Sequential) and all(list(part.children()) for part in stage)
    blocks = list(stage.children()) if made_of_blocks else [stage]
    return nn.Sequential(*(nn.Sequential(block, nn.Dropout(rate)) for block in blocks))
