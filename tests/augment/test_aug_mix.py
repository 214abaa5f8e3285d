"""AugMix: what operations do, what a view is made of, and how far three answers are apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from galago.augment.aug_mix import AugMix, chain, divergence, drawn_operations, mixed_view
from galago.augment.cutmix import CutMix
from galago.batch import Batch, Step
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, close, exported, identical, tiny_network
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.testing import check_method
from galago.trainer import finish
from noise import normalized_batch


def prepared(method: AugMix) -> AugMix:
    method.prepare(nn.Identity(), TinyImages())
    return method


def picture(count: int = 6, channels: int = 3, size: int = 12) -> Tensor:
    ramp = (torch.arange(size * size).view(1, 1, size, size) / (size * size)) ** 2 * 200 + 20
    return (ramp + torch.randint(0, 30, (count, channels, size, size))).clamp(0, 255).to(torch.uint8)


def test_the_divergence_is_the_mean_distance_from_the_mixture() -> None:
    scores = torch.randn(3, 5, 4, dtype=torch.float64)
    said = scores.softmax(2)
    mixture = said.mean(0).log()
    wanted = sum(kl_div(mixture, one, reduction="batchmean") for one in said) / 3
    torch.testing.assert_close(divergence(scores), wanted)


def test_equal_answers_are_no_distance_apart_and_none_is_farther_than_ln_3() -> None:
    same = torch.randn(1, 5, 4).expand(3, -1, -1)
    assert divergence(same).item() == pytest.approx(0.0, abs=1e-6)
    apart = 1000 * torch.eye(3).view(3, 1, 3)
    assert divergence(apart).item() == pytest.approx(math.log(3))
    apart.requires_grad_()
    assert torch.autograd.grad(divergence(apart), apart)[0].isfinite().all()


def test_every_operation_gives_an_image_and_changes_it_if_strong() -> None:
    image = picture(size=32)
    draws = [drawn_operations(10.0, (32, 32)) for _ in range(10)]
    for operation in (one for operations in draws for one in operations):
        found = operation(image.clone())
        assert found.shape == image.shape
        assert found.dtype == torch.uint8
    for operations in zip(*draws, strict=True):
        assert any(not torch.equal(operation(image.clone()), image) for operation in operations)


def test_operations_are_stronger_the_more_severe() -> None:
    def turned(severity: float) -> float:
        angles = [drawn_operations(severity, (12, 12))[4].keywords["angle"] for _ in range(200)]
        assert min(angles) < 0 < max(angles)
        return max(map(abs, angles))

    assert 6 < turned(3.0) <= 9
    assert 24 < turned(10.0) <= 30


def test_images_of_a_chain_go_different_ways_and_the_given_ones_stay() -> None:
    image = picture(1).expand(32, -1, -1, -1).contiguous()
    before = image.clone()
    found = chain(image, 3.0)
    assert torch.equal(image, before)
    assert len({tuple(one.flatten().tolist()) for one in found}) > 8


def test_a_view_of_chains_that_change_nothing_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights sum to 1, whatever is drawn."""
    monkeypatch.setattr("galago.augment.aug_mix.chain", lambda image, severity: image)
    image, normalize = picture(), TinyImages().normalize
    torch.testing.assert_close(mixed_view(image, 4, 3.0, normalize), normalize(image))


def test_a_view_lies_between_the_image_and_its_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galago.augment.aug_mix.chain", lambda image, severity: 255 - image)
    image, normalize = picture(400), TinyImages().normalize
    clean, turned = normalize(image), normalize(255 - image)
    view = mixed_view(image, 3, 3.0, normalize)
    share = ((view - turned) / (clean - turned)).flatten(1).median(1).values
    torch.testing.assert_close(view, torch.lerp(turned, clean, share.view(-1, 1, 1, 1)), rtol=1e-4, atol=1e-4)
    assert abs(share.mean() - 0.5) < 0.06, "m ~ Beta(1, 1)"
    assert abs(share.var() - 1 / 12) < 0.02


def test_views_of_normalized_images_are_made_of_their_exact_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr("galago.augment.aug_mix.mixed_view", lambda raw, *rest: given.append(raw) or raw.float())
    raw = TinyImages().train()[0].input
    views = prepared(AugMix()).views(TinyImages().normalize(raw))
    assert torch.equal(given[0], raw)
    assert views.shape == (16, 3, 8, 8)


def test_the_loss_compares_the_image_with_both_views_and_labels_are_the_images_alone() -> None:
    model, batch = tiny_network().eval(), normalized_batch()
    method = prepared(AugMix(7.0))
    torch.manual_seed(5)
    step = method.step(batch, Forward(model, classify()))
    torch.manual_seed(5)
    said = model(method.views(batch.input)).chunk(2)
    clean = model(batch.input)
    torch.testing.assert_close(step.losses["aug_mix"], 7 * divergence(torch.stack([clean, *said])))
    torch.testing.assert_close(step.losses["cross_entropy"], nn.functional.cross_entropy(clean, batch.target))
    assert step.batch is batch


def test_a_teacher_in_front_compares_the_image_and_not_its_views() -> None:
    def losses(methods: list[Method]) -> dict[str, Tensor]:
        trial = Trial(lambda: tiny_network().eval(), classify(), TinyImages(), lambda: methods)
        trial.learner.model.train = lambda mode=True: trial.learner.model  # statistics of its own for every pass
        return clone(trial.step(0).losses)

    torch.manual_seed(0)
    teacher = tiny_network()
    plain = losses([Distill(teacher, [Attention(1.0, layers=[-1])])])
    both = losses([Distill(teacher, [Attention(1.0, layers=[-1])]), AugMix()])
    assert torch.equal(plain["attention"], both["attention"])


def test_learning_from_it_alone_brings_answers_together() -> None:
    model, batch = tiny_network().train(), normalized_batch()
    method = prepared(AugMix())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(15):
        torch.manual_seed(2)
        loss = method.step(batch, Forward(model, classify())).losses["aug_mix"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_obeys_the_laws() -> None:
    check_method(AugMix)


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize("first", [lambda: [CutMix()], lambda: [quantize()]])
def test_it_trains_finishes_and_exports_behind_others(first) -> None:
    def methods() -> list[Method]:
        return [*first(), AugMix()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    finished = finish(trial.learner)
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_views_are_the_same_for_the_same_draws_and_leave_the_batch_alone() -> None:
    method, batch, found = prepared(AugMix()), normalized_batch(), []
    before = batch.input.clone()
    for _ in range(2):
        torch.manual_seed(9)
        found.append(method.views(batch.input))
    assert identical(*found)
    assert torch.equal(batch.input, before)


def test_grey_images_have_views_too() -> None:
    assert mixed_view(picture(4, channels=1), 3, 3.0, lambda image: image.float()).shape == (4, 1, 12, 12)


class Multispectral(TinyImages):
    """Five channels."""

    def example(self) -> Tensor:
        return torch.zeros(1, 5, 8, 8, dtype=torch.uint8)


def test_images_of_other_than_1_or_3_channels_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="images of 5×8×8; its operations need 1 or 3 channels"):
        AugMix().prepare(nn.Identity(), Multispectral())


class Half(Method):
    """Shows the rest of the list half of the batch, as methods do that set a part aside."""

    def step(self, batch: Batch, inner: Forward) -> Step:
        return inner(Batch(batch.input[::2], batch.target[::2], {}))


def test_a_method_behind_it_that_sets_images_aside_is_named_before_anything_is_compared() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [AugMix(), Half()])
    with pytest.raises(UserError, match="a method behind it changes how many images there are; list it in front"):
        trial.step(0)
    Trial(tiny_network, classify(), TinyImages(), lambda: [Half(), AugMix()]).step(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"weight": -1.0}, "weight -1"), ({"chains": 0}, "0 chains"), ({"severity": 11.0}, "severity")],
)
def test_numbers_that_mean_nothing_are_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AugMix(**arguments)
