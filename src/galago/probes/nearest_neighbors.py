"""Nearest neighbors: how far an image's features are from those of the training images most like it.

Yiyou Sun, Yifei Ming, Xiaojin Zhu, Yixuan Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022,
arXiv:2204.06507 (recalled; the formula as public benchmark code has it, without the square).

The features in front of the classifier are scaled to length 1. An image whose k-th nearest training image is far away
is like none of them.

    f̂ = f / ‖f‖₂          S(x) = -‖f̂(x) - f̂_(k)‖₂,   f̂_(k) the k-th nearest of training images

    auroc_knn_{set}, fpr95_knn_{set}             and means over the sets, as `galago.probes.detection` has them

When: features are worth more than scores, and classes are too crooked to be Gaussians
(`galago.probes.mahalanobis`). It costs a pass over `training_images`, whose features a deployment would have to keep,
and one over `images` of each set. A file gives no features, nor does an integer module: nothing is told of them.

Usual setting: k = 50 of all of 50,000 training images, the benchmark's default, chosen on validation images from 50,
100, 200, 500, 1000; fewer for a few hundred images. Here k = 50 of 5,000 that are drawn once. No recipe of its own.

Chosen here: features that are all 0 stay so; training images are as `galago.probes.embedding` says. All in float64. The
images are test images: choose nothing by these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.outside import Outside
from galago.outside_made_up import chosen
from galago.probe import Deployed, Probe, device_of, evaluating, has_gradients
from galago.probes.detection import told_apart
from galago.probes.embedding import embedding, fitted_on
from galago.task import Task


def of_length_one(feature: Tensor) -> Tensor:
    """`f / ‖f‖₂`, float64; N×d. What is 0 stays 0."""
    return nn.functional.normalize(feature.double(), dim=1, eps=torch.finfo(torch.float64).tiny)


def nearness(feature: Tensor, known: Tensor, k: int) -> Tensor:
    """`-‖f̂ - f̂_(k)‖₂`: N numbers, at most 0.

    Args:
        feature: f, N×d.
        known: features of training images, of length 1, M×d.
        k: which neighbor counts, from 1 to M.

    >>> known = of_length_one(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    >>> nearness(torch.tensor([[0.0, 5.0]]), known, k=1).item() == 0
    True
    """
    apart = torch.cdist(of_length_one(feature), known, compute_mode="donot_use_mm_for_euclid_dist")
    return -apart.kthvalue(k, dim=1).values


class NearestNeighbors(Probe):
    """How well the distance to the k-th nearest training image tells test images from others, as `auroc_knn_uniform`.

    Args:
        outside: sets of other images; None for five made-up ones.
        k: which neighbor counts.
        training_images: how many training images there are to be near to.
        images: how many of each set are used.
    """

    def __init__(
        self,
        outside: Sequence[Outside] | None = None,
        k: int = 50,
        training_images: int = 5000,
        images: int = 1000,
    ) -> None:
        if not 1 <= k <= training_images:
            raise UserError(f"NearestNeighbors: k is {k}; give a number from 1 to training_images, {training_images}")
        if images < 1:
            raise UserError(f"NearestNeighbors: images is {images}; give 1 or more, 1000 is usual")
        self.outside = chosen(outside, "NearestNeighbors")
        self.k, self.training_images, self.images = k, training_images, images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device = device_of(deployed)
        with evaluating(deployed), torch.no_grad():
            if not isinstance(deployed, Deployed) or not has_gradients(deployed, data.example().to(device)):
                return {}
            with embedding(deployed) as embed:
                known = of_length_one(fitted_on(embed, data, self.training_images, device, "knn")[0])
                if self.k > len(known):
                    raise UserError(
                        f"NearestNeighbors: k is {self.k}, but there are {len(known)} training images; make k smaller"
                    )
                return told_apart(
                    "knn",
                    lambda image: nearness(embed(image.to(device)), known, self.k),
                    data,
                    self.outside,
                    self.images,
                )
