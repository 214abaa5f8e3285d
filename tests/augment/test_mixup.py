import pytest
import torch

from galago.augment.mixup import Mixup
from galago.batch import Batch
from galago.errors import UserError
from galago.mixing import average
from galago.testing import check_method


def identity_batch(count: int = 8) -> Batch:
    """The image is its own label, so that both must be mixed alike."""
    image = torch.eye(count).view(count, 1, 1, count).contiguous()
    return Batch(image, torch.eye(count))


def test_images_and_labels_are_averaged_with_the_same_weights() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = Mixup().mix(identity_batch())
        torch.testing.assert_close(mixed.input.flatten(1), mixed.target)
        torch.testing.assert_close(mixed.target.sum(1), torch.ones(8))


def test_average_keeps_everything_at_one_and_takes_everything_at_zero() -> None:
    image, partners = torch.randn(4, 3, 5, 5), torch.tensor([2, 3, 1, 0])
    assert torch.equal(average(image, partners, 1.0), image)
    assert torch.equal(average(image, partners, 0.0), image[partners])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_weight_is_drawn_from_the_beta_distribution(alpha: float) -> None:
    torch.manual_seed(0)
    two = Batch(torch.tensor([[1.0], [0.0]]).view(2, 1, 1, 1), torch.eye(2))
    shares = []
    while len(shares) < 2000:
        mixed = Mixup(alpha).mix(two)
        if mixed.target[0, 1] > 0:  # the partner is the other image
            shares.append(mixed.target[0, 0].item())
    drawn = torch.tensor(shares)
    assert abs(drawn.mean().item() - 0.5) < 0.04
    assert abs(drawn.var().item() - 1 / (4 * (2 * alpha + 1))) < 0.02


def test_the_given_batch_is_left_alone() -> None:
    batch = identity_batch()
    Mixup().mix(batch)
    assert torch.equal(batch.input, identity_batch().input)
    assert torch.equal(batch.target, identity_batch().target)


def test_probability_is_the_share_of_batches_mixed() -> None:
    torch.manual_seed(0)
    batch, method = identity_batch(), Mixup(probability=0.25)
    mixed = sum(method.mix(batch) is not batch for _ in range(800))
    assert abs(mixed / 800 - 0.25) < 0.06


@pytest.mark.parametrize(("alpha", "probability"), [(0.0, 1.0), (1.0, 2.0)])
def test_numbers_out_of_range_are_refused_by_name(alpha: float, probability: float) -> None:
    with pytest.raises(UserError, match=r"Mixup: (alpha|probability)"):
        Mixup(alpha, probability)


def test_it_obeys_the_laws() -> None:
    check_method(Mixup)


def test_mixing_never_waits_for_what_is_on_the_device() -> None:
    on_device = Batch(torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, 5, device="meta"))  # nothing can be read
    mixed = Mixup().mix(on_device)
    assert mixed.input.device.type == mixed.target.device.type == "meta"
