"""Images made up: their distributions, that they are reproducible, and names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galago.checkpoint import random_state
from galago.errors import UserError
from galago.laws.trial import TinyImages, identical
from galago.outside import OtherData, Outside
from galago.outside_made_up import Blobs, Gaussian, MadeUp, Permuted, Rademacher, Uniform, chosen, smooth
from outsiders import Pictures, noise

DATA = TinyImages()
KINDS = [Gaussian, Uniform, Rademacher, Blobs]


def images(outside: Outside, data: TinyImages | Pictures = DATA) -> Tensor:
    return torch.cat([batch.input for batch in outside.test(data)])


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_images_as_asked_for_of_the_data_sets_size(kind: type[MadeUp]) -> None:
    found = images(kind(images=19))
    assert found.shape == (19, 3, 8, 8)
    assert found.dtype == torch.uint8
    assert [len(batch.input) for batch in kind(images=19).test(DATA)] == [8, 8, 3]
    assert len(kind(images=19).test(DATA)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_hangs_on_the_seed_and_its_number_alone(kind: type[MadeUp]) -> None:
    found = images(kind(images=19))
    assert torch.equal(images(kind(images=19)), found)
    assert torch.equal(images(kind(images=8)), found[:8])
    assert torch.equal(images(kind(images=19), TinyImages(batch_size=5)), found)
    assert not torch.equal(images(kind(images=19, seed=1)), found)
    training = torch.cat([batch.input for batch in kind(images=19).training(DATA)])
    assert not (training == found).flatten(1).all(1).any()


@pytest.mark.parametrize("outside", [*(kind(images=9) for kind in KINDS), Permuted()], ids=lambda one: one.name)
def test_the_global_random_state_is_left_alone(outside: Outside) -> None:
    before = random_state()
    images(outside)
    assert identical(before, random_state())


def test_distributions_are_as_their_names_say() -> None:
    gaussian, uniform, rademacher = (images(kind(images=200)).double() / 255 for kind in KINDS[:3])
    tail = 0.5 * (1 - torch.erf(torch.tensor(0.5 / 2**0.5)).item())  # P(N(0.5, 1) < 0)
    assert float((gaussian == 0).double().mean()) == pytest.approx(tail, abs=0.01)
    assert float((gaussian == 1).double().mean()) == pytest.approx(tail, abs=0.01)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.002)
    assert rademacher.unique().tolist() == [0, 1]
    assert float(rademacher.mean()) == pytest.approx(0.5, abs=0.01)


def test_half_of_a_blob_image_is_white_and_neighbors_are_mostly_alike() -> None:
    found = images(Blobs(images=50), Pictures(noise(5, 3, 32, 32))).double() / 255
    assert found.unique().tolist() == [0, 1]
    assert torch.equal(found.mean((2, 3)), torch.full((50, 3), 0.5).double())
    assert float((found[..., 1:] == found[..., :-1]).double().mean()) > 0.85


def test_smoothing_agrees_with_a_loop_over_pixels() -> None:
    image = torch.rand(1, 4, 5)
    weight = [[torch.exp(torch.tensor(-(a * a + b * b) / 2.0)).item() for b in range(-3, 4)] for a in range(-3, 4)]
    total = sum(map(sum, weight))
    for y in range(4):
        for x in range(5):
            wanted = sum(
                weight[a + 3][b + 3] * float(image[0, min(max(y + a, 0), 3), min(max(x + b, 0), 4)])
                for a in range(-3, 4)
                for b in range(-3, 4)
            )
            assert float(smooth(image, 1.0)[0, y, x]) == pytest.approx(wanted / total, abs=1e-5)


def test_permuted_images_hold_the_same_pixels_with_their_colors_in_another_order() -> None:
    own, found = torch.cat([batch.input for batch in DATA.test()]), images(Permuted())
    assert torch.equal(found, images(Permuted()))
    assert not torch.equal(found, images(Permuted(seed=1)))
    for before, after in zip(own, found, strict=True):
        assert sorted(map(tuple, before.flatten(1).T.tolist())) == sorted(map(tuple, after.flatten(1).T.tolist()))
        assert not torch.equal(before, after)
    assert not torch.equal(own[0].flatten().argsort(stable=True), found[0].flatten().argsort(stable=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 9), (4, 3, 3)])
def test_the_smallest_images_and_any_number_of_channels_can_be_made_up(shape: tuple[int, int, int]) -> None:
    data = Pictures(noise(5, *shape))
    assert all(images(kind(images=3), data).shape == (3, *shape) for kind in KINDS)


def test_a_views_name_says_what_decides_its_images() -> None:
    assert Uniform(images=7, seed=3).view == "ood/uniform/7/3"
    assert Permuted(seed=2).view == "ood/permuted/2"
    assert OtherData("svhn", DATA).view == "ood/svhn"


def test_five_sets_are_taken_where_none_are_named_and_wrong_names_are_refused() -> None:
    assert [one.name for one in chosen(None, "X")] == ["gaussian", "uniform", "rademacher", "permuted", "blobs"]
    with pytest.raises(UserError, match="X: outside is empty"):
        chosen([], "X")
    with pytest.raises(UserError, match="two sets of `outside` are called 'uniform'"):
        chosen([Uniform(), Uniform(seed=1)], "X")
    for name in ("mean", "a b", "", "ood/x"):
        with pytest.raises(UserError, match=f"'{name}' is no name"):
            chosen([OtherData(name, DATA)], "X")
    with pytest.raises(UserError, match="Blobs: images is 0"):
        Blobs(images=0)
