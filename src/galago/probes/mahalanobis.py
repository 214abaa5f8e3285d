"""Mahalanobis distance: how far an image's features are from those of the nearest class.

Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples
and Adversarial Attacks", NeurIPS 2018, arXiv:1807.03888.

The features in front of the classifier are taken for a Gaussian around each class's mean, with one covariance for all
classes. An image far from all means belongs to none.

    μ_c = mean of f_i with y_i = c,   Σ = (1 / N) Σ_i (f_i - μ_{y_i})(f_i - μ_{y_i})ᵀ          of training images
    M(x) = max_c -½ (f(x) - μ_c)ᵀ Σ⁻¹ (f(x) - μ_c)
    S = M(x̃),   x̃ = x - ε sign(∇_x(-M))

    auroc_mahalanobis_{set}, fpr95_mahalanobis_{set}   and means over the sets, as `galago.probes.detection` has them

When: features are worth more than scores, which is often so for images of another kind and seldom for classes close to
the trained ones. It costs a pass over `training_images`, and one over `images` of each set (with ε two and one back).
The statistics are taken anew each time, so they are those of the network as it is now. A file gives no features, nor
does an integer module: nothing is told of them.

Usual setting, the defaults: ε = 0. The paper chooses ε from 0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01, and weights
several layers by a logistic regression on images from outside; here it is the last layer alone, which needs none. No
recipe of its own.

Chosen here: Σ + shrinkage · tr(Σ) / d · I is inverted, so that features which never change do no harm (with a
pseudo-inverse: if none of them changes, all scores are equal); classes without a training image have no mean; training
images are as `galago.probes.embedding` says. All in float64. The images are test images: choose nothing by these
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.outside import Outside
from galago.outside_made_up import chosen
from galago.probe import Deployed, Probe, device_of, evaluating, has_gradients
from galago.probes.detection import told_apart
from galago.probes.embedding import embedding, fitted_on
from galago.probes.stepping import stepped
from galago.task import Task


class Gaussians(NamedTuple):
    """Classes as Gaussians with one covariance, float64."""

    means: Tensor  # μ, C×d, of the classes that there were
    covariance: Tensor  # Σ, d×d
    precision: Tensor  # Σ⁻¹, d×d, of the shrunk covariance


def gaussians(feature: Tensor, label: Tensor, shrinkage: float = 1e-6) -> Gaussians:
    """Class means, tied covariance and its inverse.

    Args:
        feature: f, N×d.
        label: y, N integers.
        shrinkage: how much of the mean variance is added to each variance before the inverse is taken.

    >>> found = gaussians(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2]), shrinkage=0.0)
    >>> found.means.flatten(), found.covariance.item()
    (tensor([2., 5.], dtype=torch.float64), 0.6666666666666666)
    """
    feature, present = feature.double(), label.bincount().nonzero()[:, 0]
    means = torch.stack([feature[label == one].mean(0) for one in present])
    centered = feature - means[torch.searchsorted(present, label)]
    covariance = centered.T @ centered / len(feature)
    shrunk = covariance + shrinkage * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    return Gaussians(means, covariance, torch.linalg.pinv(shrunk, hermitian=True))


def mahalanobis(feature: Tensor, classes: Gaussians) -> Tensor:
    """`max_c -½ (f - μ_c)ᵀ Σ⁻¹ (f - μ_c)`: N numbers of features N×d, at most 0."""
    apart = [feature.double() - mean for mean in classes.means]
    return torch.stack([-0.5 * (one @ classes.precision * one).sum(1) for one in apart]).max(0).values


class Mahalanobis(Probe):
    """How well the distance to class means tells test images from others, as `auroc_mahalanobis_uniform`.

    Args:
        outside: sets of other images; None for five made-up ones.
        epsilon: ε, length of a step on the image, where pixels go to 1; 0 for none.
        shrinkage: how much of the mean variance is added to each variance.
        training_images: how many training images means and covariance are of.
        images: how many of each set are used.
    """

    def __init__(
        self,
        outside: Sequence[Outside] | None = None,
        epsilon: float = 0.0,
        shrinkage: float = 1e-6,
        training_images: int = 5000,
        images: int = 1000,
    ) -> None:
        if epsilon < 0 or shrinkage < 0:
            raise UserError(f"Mahalanobis: epsilon {epsilon:g} and shrinkage {shrinkage:g} must be 0 or more")
        if training_images < 2 or images < 1:
            raise UserError(
                f"Mahalanobis: training_images {training_images} must be at least 2 and images {images} at least 1;"
                " 5000 and 1000 are usual"
            )
        self.outside = chosen(outside, "Mahalanobis")
        self.epsilon, self.shrinkage, self.training_images, self.images = epsilon, shrinkage, training_images, images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device = device_of(deployed)
        with evaluating(deployed):
            if not isinstance(deployed, Deployed) or not has_gradients(deployed, data.example().to(device)):
                return {}
            with embedding(deployed) as embed:
                feature, label = fitted_on(embed, data, self.training_images, device, "mahalanobis")
                classes = gaussians(feature, label, self.shrinkage)

                def score(image: Tensor) -> Tensor:
                    pixels = image.to(device) / 255
                    moved = stepped(pixels, lambda seen: -mahalanobis(embed(seen), classes), self.epsilon)
                    with torch.no_grad():
                        return mahalanobis(embed(moved), classes)

                return told_apart("mahalanobis", score, data, self.outside, self.images)
