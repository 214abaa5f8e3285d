"""DropBlock: squares of feature maps are set to zero, so that what is around them cannot fill them in.

Golnaz Ghiasi, Tsung-Yi Lin, Quoc V. Le, "DropBlock: A Regularization Method for Convolutional Networks", NeurIPS 2018,
arXiv:1810.12890 (recalled; one of the regularizers compared in arXiv:2003.03879).

Neighboring pixels of a feature map say nearly the same, so dropping single ones hides nothing. DropBlock drops whole
squares, more of them as training goes on, and the rest is made larger in return.

    M = H×W, 0 in every s×s square whose corner was drawn, 1 elsewhere;   corners ~ Bernoulli(γ), where a square fits
    γ = (1 - k) / s² · H W / ((H - s + 1) (W - s + 1)),   1 - k rises from 0 in a straight line
    y ← y M · count(M) / sum(M)

When: convolutional networks trained for long; on small images use small squares and late layers. It costs random
numbers and a max-pooling a layer, nothing at inference: nothing is dropped then.

Usual setting, the defaults: s = 7, k = 0.9 at the end, the last two stages (paper: behind every convolution and
shortcut in them, ImageNet, ResNet-50). Recipe: recipes/regularize/drop_block_resnet20_cifar10.yaml.

Chosen here: each image and channel has squares of its own, and one factor makes up for what all of them lost. By
default only the ends of stages are dropped from; name more layers to drop from more. On a smaller map the square is as
large as the map's shorter side. Squares may overlap, so that a little more than k stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.stages import shapes_at
from galago.taps import Changes


def corner_rate(height: int, width: int, size: int, kept: float) -> float:
    """`γ`: how likely a square begins at a pixel, so that about `kept` of all pixels stay.

    >>> corner_rate(4, 4, 4, 0.75)
    0.25

    Args:
        height: of the map.
        width: of the map.
        size: s, no larger than either.
        kept: k.
    """
    return (1 - kept) / size**2 * height * width / ((height - size + 1) * (width - size + 1))


def blocks(corners: Tensor, size: int) -> Tensor:
    """`M`, N×C×H×W, of corners N×C×(H-s+1)×(W-s+1), 1 where a square begins.

    >>> blocks(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]), 2)[0, 0]
    tensor([[1., 0., 0.],
            [1., 0., 0.],
            [1., 1., 1.]])
    """
    return 1 - max_pool2d(pad(corners, [size - 1] * 4), size, stride=1)


def dropped(y: Tensor, size: int, dropping: Tensor | float) -> Tensor:
    """`y M · count(M) / sum(M)`, of y's shape.

    Args:
        y: N×C×H×W.
        size: s; on a smaller map its shorter side.
        dropping: 1 - k.
    """
    height, width = y.shape[2:]
    size = min(size, height, width)
    shape = (*y.shape[:2], height - size + 1, width - size + 1)
    rate = corner_rate(height, width, size, 0.0) * dropping
    mask = blocks((torch.rand(shape, device=y.device) < rate).float(), size)
    # in float32: with a bfloat16 mask in another memory format than y, PyTorch 2.15's compiled gradients were NaN
    return (y * (mask * (mask.numel() / mask.sum().clamp_min(1.0)))).to(y.dtype)


class DropBlock(Method):
    """Drops squares of feature maps.

    Args:
        layers: whose feature maps, by path or number of stage; the last two stages.
        size: s, the side of a square in pixels of the map.
        kept: k, the share of a map that stays when training ends.
    """

    dropping: Tensor

    def __init__(self, layers: Sequence[str | int] = (-2, -1), size: int = 7, kept: float = 0.9) -> None:
        super().__init__()
        if size < 1 or not 0 < kept <= 1:
            raise UserError(f"DropBlock: squares of {size} pixels that leave {kept:g} of a map; give 1 or more, 0 to 1")
        if not layers:
            raise UserError("DropBlock: layers is empty; name at least one, or the number of a stage")
        self.layers, self.size, self.kept = list(layers), size, kept
        self.register_buffer("dropping", torch.zeros(()), persistent=False)  # every step sets it
        self._changes: Changes | None = None
        self._paths: list[str] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """From now on the layers drop squares in training mode.

        Raises:
            UserError: there is no such layer, or it gives no feature map.
        """
        shapes = shapes_at(model, data, self.layers, "DropBlock")
        for path, shape in shapes.items():
            if len(shape) != 4:
                raise UserError(
                    f"DropBlock: layer {path!r} gives {'×'.join(map(str, shape))}; name one that gives a map"
                )
        self._paths = list(shapes)
        self._changes = Changes(model, self._paths, lambda place, y: dropped(y, self.size, self.dropping))
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.dropping.fill_((1 - self.kept) * inner.progress)
        return inner(batch)

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hooks out."""
        if self._changes is not None:
            self._changes.remove(model)
        return model

    def summary(self) -> str | None:
        """What is dropped from."""
        side = f"{self.size}×{self.size}"
        return f"DropBlock: squares of {side} in what {', '.join(self._paths)} give" if self._paths else None
