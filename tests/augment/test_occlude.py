"""Hiding a part of images: the same black, the same crop, and the whole image kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.augment.occlude import FULL, LowerHalf, Occlude, Occluded, Part, UpperHalf, Visible, occluded
from galago.batch import Batch, Step
from galago.data import Normalize
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.recipe import parts_of
from galago.run import Run
from galago.spec import build, describe
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import Learner, finish, prepare

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distillation" / "occluded_face_triplet_kd.npz")
HALVES = pytest.mark.parametrize(("visible", "name"), [(LowerHalf(), "lower"), (UpperHalf(), "upper")])


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


class Corner(Visible):
    """A mask of one's own, and no rectangle's border: the pixels above the diagonal."""

    def __call__(self, height: int, width: int) -> Tensor:
        return torch.ones(height, width, dtype=torch.bool).triu()


class Keep(Method):
    """Keeps the batch that came to it."""

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.batch = batch
        return inner(batch)


@HALVES
def test_halves_are_the_reference_ones(visible: Visible, name: str) -> None:
    assert torch.equal(occluded(golden("image"), visible, torch.zeros(())), golden(f"{name}_half_visible"))


def test_black_after_normalization_is_the_reference_one() -> None:
    mean, std = (golden(name).view(3, 1, 1) for name in ("mean", "std"))
    found = occluded((golden("image") - mean) / std, LowerHalf(), -mean / std)
    torch.testing.assert_close(found, golden("lower_half_visible_normalized"))


@pytest.mark.parametrize("height", [2, 5, 8, 9])
def test_both_halves_are_the_whole_and_share_nothing(height: int) -> None:
    lower, upper = LowerHalf()(height, 3), UpperHalf()(height, 3)
    assert (lower ^ upper).all()
    assert upper.sum() == height // 2 * 3


@pytest.mark.parametrize("sides", [(0.0, 1.0, 0.0, 1.0), (0.25, 0.75, 0.5, 1.0), (0.0, 0.4, 0.2, 0.9)])
def test_a_part_is_visible_pixel_by_pixel(sides: tuple[float, float, float, float]) -> None:
    height, width = 8, 10
    top, bottom, left, right = sides
    seen = Part(*sides)(height, width)
    for row in range(height):
        for column in range(width):
            inside = int(top * height) <= row < int(bottom * height) and int(left * width) <= column < int(
                right * width
            )
            assert seen[row, column] == inside


def test_clips_are_hidden_frame_by_frame() -> None:
    clip, black = torch.rand(2, 5, 3, 4, 4), torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)
    found = occluded(clip, UpperHalf(), black)
    for frame in range(5):
        assert torch.equal(found[:, frame], occluded(clip[:, frame], UpperHalf(), black))
    assert torch.equal(found[0, 0, :, 3, 0], torch.tensor([-1.0, -2.0, -3.0]))


def trained_on(data: Occluded, *methods: Method) -> Batch:
    """The first batch as the model sees it in training."""
    learner = Learner(nn.Flatten(), classify(), [*methods, keep := Keep()], data.normalize)
    learner.task = NoTask(10)
    prepare(learner, data, None)
    learner(next(iter(data.train())))
    return keep.batch


class NoTask(Classify):
    """Judges nothing."""

    def losses(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"nothing": output.sum() * 0}


@pytest.mark.parametrize("visible", [LowerHalf(), UpperHalf(), Part(0.2, 0.6, 0.1, 0.9), Corner()])
def test_training_and_judging_hide_the_same_pixels_with_the_same_black(visible: Visible) -> None:
    data = Occluded(Digits(augment=[]), visible)
    hidden = Occluded(Digits(augment=[]), visible, hide_training=True)
    seen = trained_on(data, Occlude())
    (raw, *_), (judged, *_) = data.train(), hidden.train()
    assert torch.equal(seen.input, data.normalize(judged.input))  # bit for bit
    assert torch.equal(seen.extra[FULL], data.normalize(raw.input))
    assert torch.equal(judged.input.bool(), raw.input.bool() & visible(8, 8))


def test_both_views_show_the_same_crop() -> None:
    data = Occluded(Digits(), LowerHalf())
    seen = trained_on(data, Occlude())
    assert torch.equal(seen.input[:, :, 4:], seen.extra[FULL][:, :, 4:])
    assert not torch.equal(seen.input[:, :, :4], seen.extra[FULL][:, :, :4])


def test_both_views_show_the_same_mixture_behind_a_method_that_mixes() -> None:
    data = Occluded(Digits(), LowerHalf())
    plain, mixed = (trained_on(data, *first, Occlude()) for first in ([], [CutMix(probability=1.0)]))
    assert torch.equal(mixed.input[:, :, 4:], mixed.extra[FULL][:, :, 4:])
    assert not torch.equal(mixed.extra[FULL], plain.extra[FULL])


def test_the_whole_is_what_the_first_of_two_occlusions_saw() -> None:
    data = Occluded(Digits(augment=[]), LowerHalf())
    seen = trained_on(data, Occlude(), Occlude(Part(right=0.5)))
    assert torch.equal(seen.extra[FULL], data.normalize(next(iter(data.train())).input))
    black = data.normalize(torch.zeros(1, 1, 1))
    assert (seen.input[:, :, :4] == black).all()
    assert (seen.input[..., 4:] == black).all()


def test_what_else_a_batch_knows_is_kept() -> None:
    assert trained_on(Occluded(Digits(), LowerHalf()), Occlude()).extra.keys() == {"index", FULL}


def test_all_images_that_a_model_is_judged_on_are_hidden() -> None:
    inner = Digits(hold_out=100)
    data = Occluded(inner, UpperHalf())
    sets = (data.validation(), inner.validation()), (data.test(), inner.test()), (data.plain(), inner.plain())
    for found, whole in sets:
        assert len(found) == len(whole)
        for one, other in zip(found, whole, strict=True):
            assert one.input.dtype == torch.uint8
            assert not one.input[:, :, 4:].any()
            assert torch.equal(one.input[:, :, :4], other.input[:, :, :4])
            assert torch.equal(one.target, other.target)
    assert not data.example()[:, :, 4:].any()


def test_training_images_are_whole_and_the_other_sets_own() -> None:
    inner, data = Digits(), Occluded(Digits(), LowerHalf())
    inner.seed = data.seed = 4
    for one, other in zip(data.train(2, start=3), inner.train(2, start=3), strict=True):
        assert torch.equal(one.input, other.input)
        assert torch.equal(one.extra["index"], other.extra["index"])


def test_a_description_builds_the_same_data_and_method_again() -> None:
    data = Occluded(Digits(batch_size=32), Part(top=0.25), hide_training=True)
    again = build(describe(data))
    assert describe(again) == describe(data)
    assert torch.equal(next(iter(again.train())).input, next(iter(data.train())).input)
    assert build(describe(Occlude(UpperHalf()))).visible(4, 1).flatten().tolist() == [True, True, False, False]


def test_images_within_can_be_moved_to_another_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(5):
            (tmp_path / "moved" / name).mkdir(parents=True, exist_ok=True)
            picture = np.full((12, 10), 200, dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "moved" / name / f"{number}.png")
    within = {"root": str(tmp_path / "gone"), "size": 8, "channels": 1, "workers": 0}
    data = {
        "class_path": "galago.augment.occlude.Occluded",
        "init_args": {
            "visible": {"class_path": "galago.augment.occlude.UpperHalf"},
            "data": {"class_path": "galago.datasets.image_folder.ImageFolder", "init_args": within},
        },
    }
    task = {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 2}}
    run = Run(tmp_path / "run")
    run.begin({"task": task, "data": data, "probes": []}, 0)
    with pytest.raises(UserError, match="gone"):
        parts_of(run)
    example = parts_of(run, data_root=tmp_path / "moved").data.example()
    assert example[0, 0, :, 0].tolist() == [200] * 4 + [0] * 4


def test_it_obeys_the_laws() -> None:
    check_method(lambda: Occlude(LowerHalf()))
    check_method(Occlude, make_data=lambda: Occluded(TinyImages(), UpperHalf()))


def test_it_trains_a_quantized_network_that_exports() -> None:
    trial = Trial(
        tiny_network, classify(), TinyImages(), lambda: [Quantize(LSQWeight(4), LSQ(4)), Occlude(LowerHalf())]
    )
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_without_a_part_named_anywhere_it_says_what_to_do() -> None:
    with pytest.raises(UserError, match="visible is null, so the data must be"):
        Occlude().prepare(tiny_network(), TinyImages())


def test_data_that_hide_training_images_themselves_are_refused() -> None:
    with pytest.raises(UserError, match="set hide_training: false"):
        Occlude().prepare(tiny_network(), Occluded(TinyImages(), LowerHalf(), hide_training=True))


@pytest.mark.parametrize("sides", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.0, 1.0, 0.9, 0.1)])
def test_sides_that_enclose_nothing_are_refused(sides: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="is no part of an image"):
        Part(*sides)


def test_a_part_too_small_for_an_image_is_refused() -> None:
    with pytest.raises(UserError, match="nothing of an image of 4×4"):
        Part(0.5, 0.6)(4, 4)


def test_black_follows_the_normalization_of_the_data() -> None:
    data = TinyImages()
    data.normalize = Normalize([0.5, 0.25, 0.1], [0.5, 0.5, 0.2])
    method = Occlude(LowerHalf())
    method.prepare(tiny_network(), data)
    torch.testing.assert_close(method.black.flatten(), torch.tensor([-1.0, -0.5, -0.5]))
