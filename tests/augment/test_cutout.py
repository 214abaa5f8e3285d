import pytest
import torch
from torch import Tensor

from galago.augment.cutout import Cutout, squares
from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.testing import check_method
from galago.trainer import finish


def ones(count: int = 8, height: int = 12, width: int = 17) -> Batch:
    return Batch(torch.ones(count, 3, height, width), torch.eye(count))


def by_hand(height: int, width: int, length: int, y: int, x: int) -> Tensor:
    image = torch.ones(height, width)
    for row in range(y - length // 2, y + length // 2):
        for column in range(x - length // 2, x + length // 2):
            if 0 <= row < height and 0 <= column < width:
                image[row, column] = 0
    return image


@pytest.mark.parametrize("length", [2, 7, 8, 40])
def test_hidden_pixels_are_those_of_a_loop(length: int) -> None:
    for y, x in ((0, 0), (5, 8), (11, 16), (3, 16)):
        (box,) = squares(12, 17, length, torch.tensor([y]), torch.tensor([x])).tolist()
        found = torch.ones(12, 17)
        found[box[0] : box[1], box[2] : box[3]] = 0
        assert torch.equal(found, by_hand(12, 17, length, y, x))


def test_every_image_loses_a_square_of_its_own_that_the_border_may_cut() -> None:
    torch.manual_seed(0)
    hidden = Cutout(length=6).hide(ones(count=400)).input
    lost = (hidden == 0).all(1)
    sizes = lost.flatten(1).sum(1)
    assert torch.equal(lost, (hidden == 0).any(1))  # the same square in each channel
    assert sizes.max() == 36
    assert sizes.min() == 9
    assert len(lost.unique(dim=0)) > 100


def test_every_pixel_is_the_center_as_often_as_any_other() -> None:
    torch.manual_seed(0)
    # with squares as large as this, how often a corner is hidden tells where centers lie
    hidden = Cutout(length=2).hide(ones(count=20_000, height=4, width=4)).input[:, 0] == 0
    # a pixel is hidden where the center is itself, or to the right, below or both
    expected = torch.tensor([[4, 4, 4, 2], [4, 4, 4, 2], [4, 4, 4, 2], [2, 2, 2, 1]]) / 16
    assert (hidden.float().mean(0) - expected).abs().max() < 0.02


def test_targets_and_what_else_is_known_stay() -> None:
    batch = ones()._replace(extra={"index": torch.arange(8)})
    hidden = Cutout().hide(batch)
    assert hidden.target is batch.target
    assert hidden.extra is batch.extra
    assert (batch.input == 1).all()


def test_zero_is_the_mean_color_of_the_data() -> None:
    data = TinyImages()
    raw = data.train()[0].input
    hidden = Cutout(length=4).hide(Batch(data.normalize(raw), torch.eye(8)[:, :3])).input
    pixels = hidden * data.normalize.std + data.normalize.mean
    assert (pixels == data.normalize.mean).any()


def test_probability_is_the_share_of_images_that_lose_something() -> None:
    torch.manual_seed(0)
    hidden = Cutout(length=4, probability=0.3).hide(ones(count=4000)).input
    assert abs((hidden == 0).flatten(1).any(1).float().mean() - 0.3) < 0.03


def test_probability_zero_neither_changes_nor_draws_anything() -> None:
    trained = []
    for methods in ([Cutout(length=4, probability=0.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        torch.manual_seed(0)
        trial.step(0)
        trained.append((trial.learner.model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(trained[0][0][name], tensor) for name, tensor in trained[1][0].items())
    assert torch.equal(trained[0][1], trained[1][1])


@pytest.mark.parametrize(("length", "probability"), [(1, 1.0), (0, 1.0), (8, 1.1), (8, -0.1)])
def test_numbers_that_mean_nothing_are_refused_by_name(length: int, probability: float) -> None:
    with pytest.raises(UserError, match=r"Cutout: (length|probability) is"):
        Cutout(length, probability)


def test_a_square_as_large_as_the_images_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="length is 8, but images have 8×8 pixels"):
        Cutout(length=8).prepare(tiny_network(), TinyImages())


def test_it_obeys_the_laws() -> None:
    check_method(lambda: Cutout(length=4))


def test_a_quantized_network_trains_with_it_finishes_and_exports() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [Quantize(LSQWeight(4), LSQ(4)), Cutout(length=4)])
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_hiding_never_waits_for_what_is_on_the_device() -> None:
    on_device = Batch(torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, 5, device="meta"))  # nothing can be read
    assert Cutout().hide(on_device).input.device.type == "meta"
