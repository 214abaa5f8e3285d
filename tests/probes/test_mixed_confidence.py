"""Confidence of mixtures: which images are mixed, and correlation against SciPy."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.probe import Outputs
from galago.probes.mixed_confidence import PERCENT, MixedConfidence, partners, rank_correlation, ranks
from galago.tasks.classify import Classify
from galago.testing import TinyImages, check_probe


class Sorted(TinyImages):
    """Test images in the order of their classes, in batches of unequal size."""

    classes = ("a", "b")
    batch_size = 6

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels
        self.image = torch.arange(len(labels)).mul(10).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)

    def test(self) -> list[Batch]:
        target = torch.eye(2)[self.labels]
        return [Batch(*pair) for pair in zip(self.image.split(6), target.split(6), strict=True)]


def seen(data: Sorted, images: int, percent: int) -> Batch:
    found = list(MixedConfidence(images).views(data)[f"mixed/{images}/{percent}"])
    assert all(len(batch.input) <= data.batch_size for batch in found)
    return Batch(torch.cat([batch.input for batch in found]), torch.cat([batch.target for batch in found]))


def test_each_image_is_mixed_with_its_partner_and_so_is_its_target() -> None:
    data = Sorted(torch.arange(20) // 10)
    found = seen(data, 100, 70)
    assert found.input.dtype == torch.uint8
    for i in range(20):
        partner = int(partners(20)[i])
        assert found.input[i, 0, 0, 0] == round(0.7 * 10 * i + 0.3 * 10 * partner)
        torch.testing.assert_close(
            found.target[i],
            0.7 * data.labels[i].eq(torch.arange(2)).float() + 0.3 * data.labels[partner].eq(torch.arange(2)).float(),
        )


def test_images_that_keep_all_of_themselves_are_those_of_the_test_set() -> None:
    data = Sorted(torch.arange(20) // 10)
    assert torch.equal(seen(data, 100, 100).input, data.image)


def test_fewer_images_are_taken_evenly_from_the_whole_set() -> None:
    found = seen(Sorted(torch.arange(24) // 12), 4, 100)
    assert found.input[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


def test_ranks_and_their_correlation_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(5, (300,), generator=generator)
    y = (x + 3 * torch.rand(300, generator=generator, dtype=torch.float64)).mul(4).round()
    assert ranks(y).tolist() == rankdata(y.numpy()).tolist()
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert rank_correlation(x, -y) == pytest.approx(-rank_correlation(x, y), abs=1e-12)


def test_a_constant_confidence_orders_nothing() -> None:
    assert rank_correlation(torch.arange(5), torch.ones(5)) == 0


def outputs(confidences: dict[int, list[float]], same: list[bool]) -> dict[str, Outputs]:
    whole = torch.eye(2)[[0] * len(same)]
    views = {}
    for percent, values in confidences.items():
        stated = torch.tensor(values).double()
        share = torch.where(torch.tensor(same), 1.0, percent / 100)[:, None]
        views[f"mixed/9/{percent}"] = Outputs(
            torch.stack([stated.log(), (1 - stated).log()], 1), share * whole + (1 - share) * whole.flip(1)
        )
    return views


def test_numbers_are_means_over_pairs_of_different_classes() -> None:
    stated = {percent: [percent / 100 + 0.01, 0.51, percent / 100] for percent in PERCENT}
    stated[100] = [0.999, 0.51, 0.991]
    stated[50] = [0.52, 0.51, 0.53]
    found = MixedConfidence(9).score(outputs(stated, [False, True, False]), Classify(2))
    assert found["mixed_confidence_50"] == pytest.approx(0.525)
    assert found["mixed_confidence_80"] == pytest.approx(0.805)
    assert found["mixed_confidence_100"] == pytest.approx(0.995)
    assert found["mixed_confidence_correlation"] == pytest.approx(
        spearmanr(sorted([*PERCENT, *PERCENT]), [0.52, 0.53, 0.61, 0.6, 0.71, 0.7, 0.81, 0.8, 0.91, 0.9]).statistic
    )


def test_a_network_that_is_always_as_sure_has_no_correlation() -> None:
    stated = {percent: [0.7, 0.7] for percent in (*PERCENT, 100)}
    found = MixedConfidence(9).score(outputs(stated, [False, False]), Classify(2))
    assert found["mixed_confidence_correlation"] == 0
    assert found["mixed_confidence_50"] == found["mixed_confidence_100"] == pytest.approx(0.7)


def test_images_of_one_class_are_refused() -> None:
    with pytest.raises(UserError, match="no two test images have different classes"):
        MixedConfidence()(nn.Sequential(nn.Flatten(), Halves()), Classify(2), Sorted(torch.zeros(8).long()))


class Halves(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image[:, :2].float()


def test_a_single_image_cannot_be_mixed() -> None:
    with pytest.raises(UserError, match="images is 1"):
        MixedConfidence(1)


def test_the_laws_of_probes_hold() -> None:
    check_probe(MixedConfidence)
