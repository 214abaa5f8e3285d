"""The golden numbers of noise injection, and networks to attack: what tests of noise and attacks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.laws.trial import TinyImages, Trial, classify, tiny_network

_FILE = np.load(Path(__file__).parent / "golden" / "distillation" / "adaptive_noise_injection.npz")


def golden(name: str) -> Tensor:
    """One array, in float64 where it is no integer."""
    return torch.from_numpy(np.asarray(_FILE[name]))


def attacked_network() -> nn.Module:
    """The network that the golden attacks attack: from pixels in [0, 1] to scores, float64."""
    convolution, linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(108, 4)
    network = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear).double()
    weights = ("atk_conv_weight", "atk_conv_bias", "atk_fc_weight", "atk_fc_bias")
    with torch.no_grad():
        for parameter, name in zip(network.parameters(), weights, strict=True):
            parameter.copy_(golden(name))
    return network


def trained_network(steps: int = 24) -> nn.Module:
    """The laws' network after a few epochs on the laws' images, in evaluation mode."""
    trial = Trial(tiny_network, classify(), TinyImages(), list)
    for number in range(steps):
        trial.step(number % len(trial.batches))
    return trial.learner.model.eval()


def normalized_batch(data: TinyImages | None = None) -> Batch:
    """One training batch of the laws' images as methods see it."""
    data = data or TinyImages()
    batch = data.train()[0]
    return batch._replace(input=data.normalize(batch.input))
