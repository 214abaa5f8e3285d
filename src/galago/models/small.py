"""CNN-LC: plain convolutional networks of low complexity, for a handful of images of each class.

Lorenzo Brigato, Luca Iocchi, "A Close Look at Deep Learning with Small Data", ICPR 2020, arXiv:2003.12843.

Blocks of a 3×3 convolution, ReLU, 2×2 max-pooling and dropout, each with twice as many channels as the one before; then
dropout and one linear layer. No BatchNorm, whose statistics of few images are learned by heart.

When: 10 to 1,280 images of each class. The paper's finding is that such networks are as good as large ones there, or
better, and that dropout helps. With 10 classes, 32×32 pixels in color and three blocks, a width of 8, 16 or 32 makes
11,162, 33,834 or 113,738 parameters (6,362, 24,234 or 94,538 with global pooling).
Recipe: recipes/regularize/small_data_cifar10.yaml; the protocol is `benchmarks/small_data.py`.

Only the paper's abstract could be had, and no code is public: the family is designed here, with its defaults: three
blocks, dropout at 0.4, biases of 0 and He's initialization of convolutions. The last layer begins with a tenth of the
deviation 1 / sqrt(inputs): max-pooling and dropout have made activations large, and with He's its scores would be so
large too that the loss begins at 20 instead of 3 and most of a short training goes by before it has come down.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from galago.errors import UserError
from galago.models.weights import load_weights


class SmallCNN(nn.Module):
    """Plain convolutional network, N×C×H×W to class scores N×K.

    Args:
        classes: number of outputs.
        channels: of the input image.
        size: height and width of the input image.
        width: channels of the first block; each further one has twice as many.
        depth: blocks, each of which halves the image.
        dropout: probability of an activation to be dropped.
        global_pool: average each channel over the image instead of keeping every place.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        size: int = 32,
        width: int = 16,
        depth: int = 3,
        dropout: float = 0.4,
        global_pool: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.channels, self.size, self.width = classes, channels, size, width
        self.depth, self.dropout, self.global_pool = depth, dropout, global_pool
        left = size >> depth
        if left < 1:
            raise UserError(f"SmallCNN: {depth} blocks leave nothing of {size} pixels; make depth smaller")
        widths = [channels, *(width << number for number in range(depth))]
        blocks = [_block(before, after, dropout) for before, after in pairwise(widths)]
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1] * (1 if global_pool else left**2), classes)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.drop(self.flatten(self.pool(self.features(x)))))
        return scores


def _block(before: int, width: int, dropout: float) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout))


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.1 / layer.in_features**0.5)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.zeros_(layer.get_parameter("bias"))


def cnn_lc(
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    width: int = 16,
    depth: int = 3,
    dropout: float = 0.4,
    global_pool: bool = False,
    weights: Path | None = None,
) -> nn.Module:
    """A plain network of low complexity for few images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        size: height and width of the input image.
        width: channels of the first block; each further one has twice as many.
        depth: blocks, each of which halves the image.
        dropout: probability of an activation to be dropped.
        global_pool: average each channel over the image instead of keeping every place.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(SmallCNN(classes, channels, size, width, depth, dropout, global_pool), weights)
