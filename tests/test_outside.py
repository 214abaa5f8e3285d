"""Another data set as images from outside: sizes, channels, targets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.outside import OtherData, drawing, fit
from outsiders import Pictures, noise

DATA = TinyImages()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 5, 11), (1, 40, 3), (3, 1, 1)])
def test_images_of_any_size_become_those_of_the_data_set(shape: tuple[int, int, int]) -> None:
    view = OtherData("other", Pictures(noise(12, *shape), classes=7)).test(DATA)
    batches = list(view)
    assert len(view) == len(batches) == 3
    assert [tuple(batch.input.shape) for batch in batches] == [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
    assert all(batch.input.dtype == torch.uint8 for batch in batches)
    assert all(torch.equal(batch.target, torch.zeros(len(batch.input), 3)) for batch in batches)


def test_images_of_the_right_size_stay_as_they_are() -> None:
    images = noise(5, 3, 8, 8)
    (batch,) = OtherData("other", Pictures(images)).test(DATA)
    assert torch.equal(batch.input, images)


def test_grey_is_repeated_and_rgb_becomes_grey_by_its_usual_weights() -> None:
    images = noise(2, 1, 4, 4)
    assert torch.equal(fit(images, (3, 4, 4)), torch.cat([images] * 3, 1))
    colors = torch.tensor([255, 0, 0, 0, 255, 0, 0, 0, 255], dtype=torch.uint8).view(3, 3, 1, 1)
    assert fit(colors, (1, 1, 1)).flatten().tolist() == [76, 150, 29]
    assert torch.equal(fit(fit(images, (3, 4, 4)), (1, 4, 4)), images)


def test_a_smaller_image_is_an_average_and_an_even_one_stays_even() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(8, 4)[None, None]
    assert (fit(image, (1, 1, 1)).int() - 128).abs().item() <= 1
    assert fit(torch.full((1, 1, 5, 7), 93, dtype=torch.uint8), (1, 12, 3)).unique().tolist() == [93]


def test_channels_that_are_neither_grey_nor_rgb_are_refused() -> None:
    with pytest.raises(UserError, match="images of 4 channels cannot stand for images of 3"):
        list(OtherData("other", Pictures(noise(5, 4, 8, 8))).test(DATA))


def test_a_set_without_images_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="nothing_there holds no images"):
        OtherData("nothing_there", Pictures(noise(0, 3, 8, 8))).test(DATA)


def test_nothing_is_loaded_before_a_view_is_iterated() -> None:
    class Costly(Pictures):
        def example(self) -> torch.Tensor:
            raise AssertionError("an image was loaded")

    view = OtherData("other", Pictures(noise(5, 3, 8, 8))).test(Costly(noise(5, 3, 8, 8)))
    assert len(view) == 1


def test_images_for_training_are_those_that_the_other_set_trains_on() -> None:
    (wanted, *_), (found, *_) = DATA.plain(), OtherData("own", DATA).training(DATA)
    assert torch.equal(found.input, wanted.input)


def test_every_image_is_drawn_from_a_stream_of_its_own() -> None:
    places = [(seed, part, number) for seed in (0, 1, 2) for part in (0, 1) for number in (0, 1, 2)]
    assert len({float(torch.rand(1, generator=drawing(*place))) for place in places}) == len(places)
