"""Any two methods train together: a sample of pairs in every run, all of them with GALAGO_ALL_PAIRS=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import cycle, permutations, product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from galago.augment.cutout import Cutout
from galago.augment.occlude import LowerHalf, Occlude
from galago.catalogue import ideas
from galago.distill.adjust import AdjustedTargets
from galago.distill.attention import Attention
from galago.distill.correlation import Correlation
from galago.distill.distill import Distill
from galago.distill.feature_fusion import FeatureFusion
from galago.distill.hints import Hints
from galago.distill.logits import SoftTargets
from galago.distill.mutual import MutualLearning
from galago.distill.native_ensemble import NativeEnsemble
from galago.distill.planting import Planting
from galago.errors import UserError
from galago.laws.method import goes_on
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, tiny_network
from galago.layers import find
from galago.method import Method
from galago.outside_made_up import Blobs
from galago.quantize.adaround import AdaRound
from galago.quantize.brecq import BRECQ
from galago.quantize.ewgs import EWGS
from galago.quantize.few_images import FewImages
from galago.quantize.lbt import AdaptiveInterval
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.mixed_precision import MixedPrecision
from galago.quantize.quantize import Quantize
from galago.quantize.quantize_gradient import QuantizeGradient
from galago.quantize.two_steps import StartFrom
from galago.regularize.autogenous import Autogenous
from galago.regularize.energy_margin import EnergyMargin
from galago.regularize.label_refinery import LabelRefinery
from galago.regularize.max_dropout import MaxDropout
from galago.run import Run
from galago.trainer import finish

# Methods that need arguments, and methods that need another before them. All others are found and made by themselves.
GIVEN: dict[str, Callable[[], Method]] = {
    "AdjustedTargets": lambda: AdjustedTargets(tiny_network()),
    "AdaRound": lambda: AdaRound(iterations=2, batches=1),
    "Autogenous": lambda: Autogenous(tiny_network(), ["stem"], [2]),
    "BRECQ": lambda: BRECQ(iterations=2, scale_iterations=2, batches=1),
    "Cutout": lambda: Cutout(length=4),
    "Distill": lambda: Distill(tiny_network(), [SoftTargets(), Attention(1.0, layers=[-1]), Hints(1.0, layers=[-1])]),
    "EnergyMargin": lambda: EnergyMargin(outside=[Blobs(images=20)]),
    "FeatureFusion": lambda: FeatureFusion(branch_at="down"),
    "FewImages": lambda: FewImages(iterations=2, batches=1),
    "MaxDropout": lambda: MaxDropout(layers=["block", "down"]),
    "LabelRefinery": lambda: LabelRefinery(epochs=1, shares=[0.3], folds=2, views=1),
    "MixedPrecision": lambda: MixedPrecision(mean_weight_bits=6, widths=(4, 8), edges=True),
    "MutualLearning": lambda: MutualLearning([tiny_network()]),
    "NativeEnsemble": lambda: NativeEnsemble("down"),
    "Planting": lambda: Planting(Distill(tiny_network(), [Correlation()])),
    "Occlude": lambda: Occlude(LowerHalf()),
    "Quantize": lambda: Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8)),
    "QuantizeGradient": lambda: QuantizeGradient(AdaptiveInterval(4, alpha=0.3)),
    "StartFrom": lambda: StartFrom(finished_run()),
}
BEFORE = {
    "AdaRound": "Quantize",
    "BRECQ": "Quantize",
    "CorrectBias": "Quantize",
    "DampenOscillations": "Quantize",
    "EWGSDelta": "Quantize",
    "FewImages": "Quantize",
    "FreezeOscillations": "Quantize",
    "GPTQ": "Quantize",
    "MixedPrecision": "Quantize",
    "ReestimateNorm": "Quantize",
    "SignFlips": "Quantize",
    "StatAssist": "Quantize",
}
FIRST = {"Equalize", "Smooth"}  # which change the float network
FIRST |= {"SelfChallenging", "SubclassDistillation"}  # which look for their layer in a network without branches
LATE = {"ShakeDrop", "StochasticDepth"}  # which stand inside the quantizers that they find
FOREMOST = {"MLTP", "OnlineLabelRefinery"}  # which give parts of a batch to the rest of the list
SECOND = {"AugMix"}  # which makes three of every image
LAST = {"FreezeOscillations", "Planting", "SignFlips"}  # which have to know all layers
LAST |= {"NoiseInjection", "ParametricNoise"}  # which add noise in front of the quantizers that they find
VERY_LAST = {"WeightAveraging"}  # which averages weights under the names that they have in the end
RANKS = {-3: FOREMOST, -2: SECOND, -1: FIRST, 1: LATE, 2: LAST, 3: VERY_LAST}  # in a list of methods; all others have 0
ALONE = {"CompactStructure"}  # which refuse quantizers beside them: a second run quantizes what they leave
ELSEWHERE = {"NasKd"}  # needs a network of its own to search in: tests/search/test_nas_kd.py
METHODS = {idea.name: idea.class_path for idea in ideas() if idea.kind == "method" and idea.name not in ELSEWHERE}
# A growing network: not with those that keep a number for each weight, or run a layer twice. A branched one: by
# one method only.
APART = [
    {"FeatureFusion", "NativeEnsemble"},
    {"Planting", "FreezeOscillations"},
    {"Planting", "NoiseInjection"},
    {"Planting", "ParametricNoise"},
    {"Planting", "SignFlips"},
]
PAIRS = sorted(pair for pair in permutations(METHODS, 2) if {*pair} not in APART)


@cache
def finished_run() -> Path:
    """A run of the network that is trained here, for methods that need one."""
    run = Run(mkdtemp())
    run.save_model(tiny_network(), TinyImages().normalize)
    return run.folder


def make(name: str) -> Method:
    if name in GIVEN:
        return GIVEN[name]()
    module, _, kind = METHODS[name].rpartition(".")
    made = getattr(import_module(module), kind)()
    assert isinstance(made, Method)
    return made


def quantizes(name: str) -> bool:
    return name == "Quantize" or BEFORE.get(name) == "Quantize"


def together(outer: str, inner: str) -> bool:
    """Whether two methods may be in one recipe."""
    return not any(one in ALONE and quantizes(other) for one, other in ((outer, inner), (inner, outer)))


def sample() -> list[tuple[str, str]]:
    """Each method once before and once behind another; every pair if asked for."""
    if os.environ.get("GALAGO_ALL_PAIRS"):
        return [pair for pair in PAIRS if together(*pair)]
    names = sorted(METHODS.keys() - ALONE)
    apart = [pair for name in sorted(ALONE) for pair in (("Distill", name), (name, "CutMix"))]
    return [*(pair for pair in zip(names, names[1:] + names[:1], strict=True) if {*pair} not in APART), *apart]


def triples() -> list[tuple[str, str, str]]:
    """Each regularizer with an augmentation, quantized or in float; with all of both, both ways, if asked for."""
    augmentations, regularizers = (
        sorted(name for name, path in METHODS.items() if path.startswith(f"galago.{folder}."))
        for folder in ("augment", "regularize")
    )
    if os.environ.get("GALAGO_ALL_PAIRS"):
        return list(product(augmentations, regularizers, ("Quantize", "float")))
    return list(zip(cycle(augmentations), regularizers, cycle(["Quantize", "float"]), strict=False))


def trial(*names: str, saved: dict[str, Any] | None = None) -> Trial:
    wanted = dict.fromkeys(name for one in names for name in (BEFORE.get(one), one) if name is not None)
    ordered = sorted(wanted, key=lambda name: next((rank for rank, those in RANKS.items() if name in those), 0))
    return Trial(tiny_network, classify(), TinyImages(), lambda: [make(name) for name in ordered], saved)


@pytest.mark.parametrize(("outer", "inner"), sample())
def test_a_pair_of_methods_trains_one_step_and_finishes(outer: str, inner: str) -> None:
    started = trial(outer, inner)
    before = clone(find(started.learner.model, "head").weight)
    names = dict(started.learner.model.named_parameters()).keys()
    assert started.step(0).loss.isfinite()
    after = dict(started.learner.model.named_parameters())
    assert after.keys() == names
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(find(started.learner.model, "head").weight, before)
    scores = exported(finish(started.learner), started.image())
    assert scores.shape == (2, 3)
    assert scores.isfinite().all()


@pytest.mark.parametrize(("augmentation", "regularizer", "precision"), triples())
def test_an_augmentation_with_a_regularizer_quantized_or_not_resumes(
    augmentation: str, regularizer: str, precision: str
) -> None:
    names = [name for name in (augmentation, regularizer, precision) if name != "float"]
    goes_on(lambda saved=None: trial(*names, saved=saved))


def test_every_method_is_in_the_sample() -> None:
    assert {name for pair in sample() for name in pair} == set(METHODS) >= {"CutMix", "Mixup", "LabelSmoothing"}


@pytest.mark.parametrize("name", sorted(ALONE))
@pytest.mark.parametrize("first", [True, False])
def test_what_cannot_be_quantized_in_the_same_run_says_so_before_the_first_step(name: str, first: bool) -> None:
    with pytest.raises(UserError, match="second run"):
        trial(*([name, "Quantize"] if first else ["Quantize", name]))


def test_losses_of_both_methods_are_there() -> None:
    losses = trial("Distill", "CutMix").step(0).losses
    assert losses.keys() == {"cross_entropy", "soft_targets", "attention", "hints"}


def test_a_batch_goes_down_the_list_in_order() -> None:
    torch.manual_seed(1)
    first = trial("CutMix", "LabelSmoothing").step(0).batch.target
    second = trial("LabelSmoothing", "CutMix").step(0).batch.target
    torch.testing.assert_close(first, second)  # smoothing and mixing are linear
    assert (first > 0).all()
