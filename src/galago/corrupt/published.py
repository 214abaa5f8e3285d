"""The benchmark: which types belong to it, AlexNet's errors, and what is made of a table of errors.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

E_{s,c} is the error at severity s of type c.

    CIFAR     mean corruption error = the mean of all E_{s,c}
    ImageNet  mCE          = 100 mean_c  Σ_s E_{s,c} / Σ_s A_{s,c}
              relative mCE = 100 mean_c  Σ_s (E_{s,c} - E_clean) / Σ_s (A_{s,c} - A_clean)

where A are the errors of AlexNet (means over severities as published with AugMix; its clean error is recalled). A
network with AlexNet's errors has an mCE of 100.
"""

from __future__ import annotations

from torch import Tensor

from galago.corrupt.blur import DefocusBlur, GaussianBlur, GlassBlur, MotionBlur, ZoomBlur
from galago.corrupt.corruption import Corruption
from galago.corrupt.digital import Brightness, Contrast, ElasticTransform, JPEGCompression, Pixelate, Saturate
from galago.corrupt.liquid import Spatter
from galago.corrupt.noise import GaussianNoise, ImpulseNoise, ShotNoise, SpeckleNoise
from galago.corrupt.weather import Fog, Frost, Snow

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLEAN = 0.4348


def benchmark() -> list[Corruption]:
    """The fifteen types, in their usual order; frost with textures that are made up."""
    noise: list[Corruption] = [GaussianNoise(), ShotNoise(), ImpulseNoise()]
    blur: list[Corruption] = [DefocusBlur(), GlassBlur(), MotionBlur(), ZoomBlur()]
    weather: list[Corruption] = [Snow(), Frost(), Fog(), Brightness()]
    digital: list[Corruption] = [Contrast(), ElasticTransform(), Pixelate(), JPEGCompression()]
    return noise + blur + weather + digital


def extra() -> list[Corruption]:
    """The four types that are kept for validation, for whoever tunes a method."""
    return [SpeckleNoise(), GaussianBlur(), Spatter(), Saturate()]


def mean_corruption_error(errors: Tensor) -> float:
    """The mean over types and severities. Types×severities."""
    return float(errors.mean())


def mce(errors: Tensor, reference: Tensor) -> float:
    """Errors in relation to another network's, in percent.

    Args:
        errors: types×severities.
        reference: types×severities, or types×1 where only means over severities are known.
    """
    return float(100 * (errors.mean(1) / reference.mean(1)).mean())


def relative_mce(errors: Tensor, clean: float, reference: Tensor, reference_clean: float) -> float:
    """How much is lost to corruption, in relation to what another network loses, in percent.

    Args:
        errors: types×severities.
        clean: error without corruption.
        reference: types×severities, or types×1 where only means over severities are known.
        reference_clean: its error without corruption.
    """
    return float(100 * ((errors.mean(1) - clean) / (reference.mean(1) - reference_clean)).mean())
