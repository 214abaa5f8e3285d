import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix, boxes, kept_share, paste_each, paste_one
from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.method import Forward, Method
from galago.mixing import draw_kept, mix_targets
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.schedule import Constant, LinearDecay, Steps
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "cutmix.npz")


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def place_image(count: int, height: int, width: int) -> torch.Tensor:
    """Each pixel says which image it comes from and where it stood."""
    place = torch.arange(count * height * width, dtype=torch.float32)
    return place.view(count, 1, height, width)


def one_hot_batch(count: int = 6, height: int = 9, width: int = 14, classes: int = 6) -> Batch:
    return Batch(place_image(count, height, width), torch.eye(classes)[torch.arange(count) % classes])


def test_boxes_are_those_of_the_official_code() -> None:
    rows = torch.from_numpy(GOLDEN["boxes"])
    for row in rows:
        height, width = int(row[0]), int(row[1])
        box = boxes(height, width, row[2:3], row[3:4].long(), row[4:5].long())
        assert box[0].tolist() == row[5:9].long().tolist()
        assert kept_share(box, height, width).item() == row[9].item()


@pytest.mark.parametrize(
    ("size", "kept", "center", "box", "adjusted"),
    [
        (32, 0.50, (16, 16), (5, 27, 5, 27), 0.52734375),
        (32, 0.50, (0, 0), (0, 11, 0, 11), 0.8818359375),
        (32, 0.90, (31, 5), (26, 32, 0, 10), 0.94140625),
        (32, 0.04, (16, 16), (1, 31, 1, 31), 0.12109375),
        (8, 0.75, (3, 3), (1, 5, 1, 5), 0.75),
        (8, 0.98, (3, 3), (3, 3, 3, 3), 1.0),
        (32, 0.0, (16, 16), (0, 32, 0, 32), 0.0),
        (32, 1.0, (16, 16), (16, 16, 16, 16), 1.0),
    ],
)
def test_box_is_the_one_on_the_card(
    size: int, kept: float, center: tuple[int, int], box: tuple[int, ...], adjusted: float
) -> None:
    found = boxes(size, size, double([kept]), torch.tensor([center[0]]), torch.tensor([center[1]]))
    assert tuple(found[0].tolist()) == box
    assert kept_share(found, size, size).item() == adjusted


def test_an_interior_box_has_twice_the_truncated_half_side() -> None:
    for size in (7, 24, 224):
        for kept in (0.1, 0.37, 0.5, 0.83):
            top, bottom, left, right = boxes(
                size * 3, size * 3, double([1 - (1 - kept) / 9]), torch.tensor([size]), torch.tensor([size])
            )[0].tolist()
            side = 2 * (math.floor(size * 3 * math.sqrt(1 - (1 - (1 - kept) / 9))) // 2)
            assert bottom - top == right - left == side


@pytest.mark.parametrize("paste", [paste_one, paste_each])
def test_mixed_batch_and_loss_are_those_of_the_official_code(paste) -> None:
    image, partners = torch.from_numpy(GOLDEN["x"]), torch.from_numpy(GOLDEN["permutation"])
    center = torch.from_numpy(GOLDEN["center_yx"])
    box = boxes(12, 12, double([float(GOLDEN["lam"])]), center[:1], center[1:])
    assert box[0].tolist() == GOLDEN["box_y1y2x1x2"].tolist()
    mixed = paste(image, partners, box[0] if paste is paste_one else box.expand(len(image), 4))
    assert torch.equal(mixed, torch.from_numpy(GOLDEN["x_mixed"]))
    targets = mix_targets(
        torch.eye(5, dtype=torch.float64)[torch.from_numpy(GOLDEN["labels"])], partners, kept_share(box, 12, 12)
    )
    torch.testing.assert_close(targets, torch.from_numpy(GOLDEN["soft_targets"]))
    logits = torch.from_numpy(GOLDEN["logits"]).requires_grad_()
    loss = nn.functional.cross_entropy(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss.item(), float(GOLDEN["loss"]))
    torch.testing.assert_close(logits.grad, torch.from_numpy(GOLDEN["grad_logits"]))


@pytest.mark.parametrize("size", [32, 224])
def test_clipping_keeps_more_than_half_on_average(size: int) -> None:
    torch.manual_seed(0)
    count = 50_000
    box = boxes(size, size, draw_kept(1.0, count), torch.randint(size, (count,)), torch.randint(size, (count,)))
    kept = kept_share(box, size, size)
    assert abs(kept.mean().item() - float(GOLDEN[f"lambda_mean_{size}"])) < 0.005
    assert abs((kept < 0.5).double().mean().item() - float(GOLDEN[f"lambda_below_half_{size}"])) < 0.005
    assert abs((kept == 1).double().mean().item() - float(GOLDEN[f"empty_box_{size}"])) < 0.005


@pytest.mark.parametrize("per_image", [False, True])
def test_each_target_tells_the_share_of_pixels_from_each_image(per_image: bool) -> None:
    method, batch = CutMix(probability=1.0, per_image=per_image), one_hot_batch()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed = method.mix(batch)
        for image, target in zip(mixed.input, mixed.target, strict=True):
            came_from = (image // (9 * 14)).long().flatten().bincount(minlength=6)
            torch.testing.assert_close(target, came_from / (9 * 14))


@pytest.mark.parametrize("per_image", [False, True])
def test_pixels_keep_their_place_in_images_that_are_not_square(per_image: bool) -> None:
    method, batch = CutMix(probability=1.0, per_image=per_image), one_hot_batch()
    torch.manual_seed(3)
    mixed = method.mix(batch)
    assert torch.equal(mixed.input % (9 * 14), batch.input % (9 * 14))
    assert not torch.equal(mixed.input, batch.input)


def test_images_of_one_batch_share_a_box_unless_drawn_per_image() -> None:
    batch = one_hot_batch(count=16, classes=16)
    for per_image, expected in ((False, 2), (True, 3)):
        torch.manual_seed(1)
        shares = CutMix(probability=1.0, per_image=per_image).mix(batch).target.max(1).values.round(decimals=5)
        different = len(set(shares.tolist()))
        assert (different <= expected) if not per_image else (different >= expected)


@pytest.mark.parametrize("per_image", [False, True])
def test_clips_are_cut_in_space_and_not_in_time(per_image: bool) -> None:
    clip = place_image(4, 8, 10).view(4, 1, 1, 8, 10).expand(4, 3, 2, 8, 10)
    torch.manual_seed(0)
    mixed = CutMix(probability=1.0, per_image=per_image).mix(Batch(clip, torch.eye(4))).input
    assert mixed.shape == clip.shape
    assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
    assert not torch.equal(mixed, clip)


@pytest.mark.parametrize("per_image", [False, True])
def test_probability_is_the_share_of_what_is_mixed(per_image: bool) -> None:
    torch.manual_seed(0)
    batch, changed, total = one_hot_batch(count=16, height=32, width=32, classes=16), 0.0, 400
    method = CutMix(alpha=1.0, probability=0.3, per_image=per_image)
    for _ in range(total):
        mixed = method.mix(batch).target
        changed += (
            (mixed != batch.target).any(1).double().mean().item() if per_image else float(mixed is not batch.target)
        )
    # per image, one partner in 16 is the image itself, and a few boxes are empty
    expected = 0.3 * (15 / 16) * 0.996 if per_image else 0.3
    assert abs(changed / total - expected) < 0.08


def test_probability_zero_neither_changes_nor_draws_anything() -> None:
    batch, seen = one_hot_batch(), []
    before = torch.get_rng_state()
    CutMix(probability=0.0).step(batch, spy(seen))
    assert seen[0] is batch
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_is_a_factor_on_the_probability() -> None:
    batch, method = one_hot_batch(), CutMix(probability=0.8, schedule=LinearDecay())
    for progress, expected in ((0.0, 0.8), (0.5, 0.4), (0.9, 0.08)):
        torch.manual_seed(0)
        mixed = sum(method.mix(batch, progress) is not batch for _ in range(2000)) / 2000
        assert abs(mixed - expected) < 0.04
    assert method.mix(batch, 1.0) is batch


def test_a_schedule_that_has_ended_leaves_training_without_cutmix() -> None:
    method, batch = CutMix(probability=1.0, schedule=Steps(milestones=[0.9], factor=0.0)), one_hot_batch()
    for progress, ended in ((0.0, False), (0.89, False), (0.9, True), (1.0, True)):
        seen: list[Batch] = []
        before = torch.get_rng_state()
        method.step(batch, replace(spy(seen), progress=progress))
        assert (seen[0] is batch) == ended
        assert torch.equal(torch.get_rng_state(), before) == ended


def test_the_usual_schedule_changes_no_draw() -> None:
    found = []
    for schedule in (Constant(), Steps(milestones=[0.5], factor=1.0)):
        torch.manual_seed(5)
        method = CutMix(schedule=schedule)
        found.append(torch.stack([method.mix(one_hot_batch(), 0.7).input for _ in range(10)]))
    assert torch.equal(*found)


def test_the_given_batch_is_left_alone() -> None:
    for per_image in (False, True):
        batch = one_hot_batch()
        CutMix(probability=1.0, per_image=per_image).mix(batch)
        fresh = one_hot_batch()
        assert torch.equal(batch.input, fresh.input)
        assert torch.equal(batch.target, fresh.target)


def test_soft_labels_and_two_cross_entropies_agree() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    partners, kept, labels = torch.randperm(6), double([0.37]), torch.arange(6)
    soft = nn.functional.cross_entropy(logits, mix_targets(torch.eye(6, dtype=torch.float64), partners, kept))
    (by_soft,) = torch.autograd.grad(soft, logits)
    two = 0.37 * nn.functional.cross_entropy(logits, labels) + 0.63 * nn.functional.cross_entropy(
        logits, labels[partners]
    )
    (by_two,) = torch.autograd.grad(two, logits)
    torch.testing.assert_close(soft, two, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_soft, by_two, rtol=0, atol=1e-12)


def test_the_same_seed_draws_the_same_batch() -> None:
    mixed = []
    for _ in range(2):
        torch.manual_seed(7)
        mixed.append(CutMix(probability=1.0).mix(one_hot_batch()))
    assert torch.equal(mixed[0].input, mixed[1].input)


@pytest.mark.parametrize(("alpha", "probability"), [(0.0, 0.5), (-1.0, 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_numbers_out_of_range_are_refused_by_name(alpha: float, probability: float) -> None:
    with pytest.raises(UserError, match=r"alpha|probability"):
        CutMix(alpha, probability)


def test_labels_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(UserError, match="class probabilities"):
        CutMix(probability=1.0).mix(Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])))


def spy(seen: list[Batch]) -> Forward:
    class Seeing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :6]

    class Noting(Classify):
        def losses(self, output, batch):
            seen.append(batch)
            return super().losses(output, batch)

    return Forward(Seeing(), Noting(6))


@pytest.mark.parametrize("per_image", [False, True])
def test_it_obeys_the_laws(per_image: bool) -> None:
    check_method(lambda: CutMix(probability=1.0, per_image=per_image, schedule=Steps(factor=0.5)))


@pytest.mark.parametrize("methods", [("Quantize", "CutMix"), ("CutMix", "Quantize")])
def test_a_quantized_network_trains_with_it_finishes_and_exports(methods: tuple[str, str]) -> None:
    def made() -> list[Method]:
        both: dict[str, Method] = {"Quantize": Quantize(LSQWeight(4), LSQ(4)), "CutMix": CutMix(probability=1.0)}
        return [both[name] for name in methods]

    trial = Trial(tiny_network, classify(), TinyImages(), made)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


@pytest.mark.parametrize("per_image", [False, True])
def test_mixing_never_waits_for_what_is_on_the_device(per_image: bool) -> None:
    on_device = Batch(torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, 5, device="meta"))  # nothing can be read
    mixed = CutMix(probability=1.0, per_image=per_image).mix(on_device)
    assert mixed.input.device.type == mixed.target.device.type == "meta"
