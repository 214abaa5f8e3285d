from math import sqrt

import pytest
import torch

from galago.augment.random_erasing import RandomErasing, first_fitting, sides
from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.testing import check_method
from galago.trainer import finish

DATA = TinyImages()


def erasing(probability: float = 1.0, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)) -> RandomErasing:
    method = RandomErasing(probability, area, aspect)
    method.prepare(tiny_network(), DATA)
    return method


def empty(count: int, height: int = 32, width: int = 48) -> Batch:
    """Images that no random value can look like."""
    return Batch(torch.full((count, 3, height, width), 99.0), torch.eye(count, 3))


def test_sides_have_the_area_and_the_aspect_up_to_half_a_pixel() -> None:
    torch.manual_seed(0)
    area, aspect = torch.rand(100, dtype=torch.float64) * 0.4 + 0.02, torch.rand(100, dtype=torch.float64) * 3 + 0.3
    tall, wide = sides(224, 160, area, aspect)
    for number in range(100):
        pixels = float(area[number]) * 224 * 160
        assert abs(int(tall[number]) - sqrt(pixels * float(aspect[number]))) <= 0.5 + 1e-9
        assert abs(int(wide[number]) - sqrt(pixels / float(aspect[number]))) <= 0.5 + 1e-9


def test_the_first_try_that_fits_counts_as_in_a_loop() -> None:
    torch.manual_seed(0)
    tall, wide = torch.randint(1, 14, (200, 5)), torch.randint(1, 20, (200, 5))
    found = torch.stack(first_fitting(9, 13, tall, wide), 1).tolist()
    for own_tall, own_wide, one in zip(tall.tolist(), wide.tolist(), found, strict=True):
        fitting = [[h, w] for h, w in zip(own_tall, own_wide, strict=True) if h <= 9 and w <= 13]
        assert one == (fitting or [[0, 0]])[0]


def test_rectangles_lie_within_the_image_and_have_the_size_asked_for() -> None:
    torch.manual_seed(0)
    top, bottom, left, right = erasing().boxes(5000, 32, 48).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= 32).all()
    assert (right <= 48).all()
    tall, wide = (bottom - top).double(), (right - left).double()
    assert (tall > 0).all()
    share, aspect = tall * wide / (32 * 48), tall / wide
    # rounding adds up to half a pixel to each side
    assert (((tall - 0.5) * (wide - 0.5)) / (32 * 48) <= 0.4).all()
    assert (((tall + 0.5) * (wide + 0.5)) / (32 * 48) >= 0.02).all()
    assert ((tall - 0.5) / (wide + 0.5) <= 1 / 0.3).all()
    assert ((tall + 0.5) / (wide - 0.5) >= 0.3).all()
    assert share.min() < 0.04
    assert share.max() > 0.37
    assert aspect.min() < 0.4
    assert aspect.max() > 2.5


def test_a_rectangle_may_lie_anywhere_where_it_fits() -> None:
    torch.manual_seed(0)
    boxes = erasing(area=(0.25, 0.25), aspect=(1.0, 1.0)).boxes(4000, 8, 8)
    counts = torch.zeros(5, 5)
    for top, bottom, left, right in boxes.tolist():
        assert bottom - top == right - left == 4
        counts[top, left] += 1
    assert (counts / 4000 - 1 / 25).abs().max() < 0.015


def test_inside_are_pixels_of_all_colors_and_outside_the_image() -> None:
    torch.manual_seed(0)
    batch = empty(500)
    found = erasing().erase(batch).input
    changed = found != 99
    assert torch.equal(changed.all(1), changed.any(1))
    raw = (found * DATA.normalize.std + DATA.normalize.mean)[changed]
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6
    assert abs(raw.mean() - 0.5) < 0.01
    assert abs(raw.var() - 1 / 12) < 0.005
    assert (batch.input == 99).all()


def test_probability_is_the_share_of_images_that_lose_something_and_targets_stay() -> None:
    torch.manual_seed(0)
    batch = empty(4000, 8, 8)
    found = erasing(0.5).erase(batch)
    assert abs((found.input != 99).flatten(1).any(1).float().mean() - 0.5) < 0.03
    assert found.target is batch.target


def test_an_image_that_no_rectangle_fits_is_left_whole() -> None:
    batch = empty(50, 2, 60)
    assert torch.equal(erasing(area=(0.3, 0.3), aspect=(1.0, 1.0)).erase(batch).input, batch.input)


def test_probability_zero_neither_changes_nor_draws_anything() -> None:
    trained = []
    for methods in ([RandomErasing(probability=0.0)], []):
        trial = Trial(tiny_network, classify(), DATA, lambda methods=methods: methods)
        torch.manual_seed(0)
        trial.step(0)
        trained.append((trial.learner.model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(trained[0][0][name], tensor) for name, tensor in trained[1][0].items())
    assert torch.equal(trained[0][1], trained[1][1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": 1.5},
        {"area": (0.0, 0.4)},
        {"area": (0.4, 0.02)},
        {"area": (0.1, 1.2)},
        {"area": (0.1,)},
        {"aspect": (-1.0, 2.0)},
        {"aspect": (3.0, 0.3)},
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(wrong) -> None:
    with pytest.raises(UserError, match=f"RandomErasing: {next(iter(wrong))} is"):
        RandomErasing(**wrong)


def test_it_obeys_the_laws() -> None:
    check_method(lambda: RandomErasing(probability=1.0))


def test_a_quantized_network_trains_with_it_finishes_and_exports() -> None:
    trial = Trial(tiny_network, classify(), DATA, lambda: [Quantize(LSQWeight(4), LSQ(4)), RandomErasing(1.0)])
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert exported(finish(trial.learner), trial.image()).isfinite().all()
