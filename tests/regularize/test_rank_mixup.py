"""RankMixup against the official code's numbers, loops over images, and the identities of its losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.datasets.digits import Digits
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.native_ensemble import NativeEnsemble
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, tiny_network
from galago.method import Forward, Method
from galago.mixing import draw_kept
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.probes.mixed_confidence import PERCENT, MixedConfidence
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.label_smoothing import LabelSmoothing
from galago.regularize.rank_mixup import (
    GainRanking,
    MarginRanking,
    Mixtures,
    Ranking,
    RankMixup,
    gain_ranking,
    margin_ranking,
    resting_statistics,
)
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden/regularization/rankmixup.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def golden_case(count: int) -> tuple[Tensor, Mixtures]:
    """Raw scores and mixtures of the golden file, λ̂ and equal labels made from λ, π and labels."""
    labels, partners, kept = golden("labels"), golden(f"n{count}_permutation"), golden(f"n{count}_lambda")
    same = labels == labels[partners]
    share = torch.maximum(kept, 1 - kept)[:, None].expand(same.shape).masked_fill(same, 1)
    return golden("logits").clone(), Mixtures(golden(f"n{count}_mixed_logits").clone(), share, same)


def test_effective_coefficients_are_the_largest_entries_of_the_golden_targets() -> None:
    for count in (1, 2, 3):
        _, mixtures = golden_case(count)
        torch.testing.assert_close(mixtures.share, golden(f"n{count}_mixed_targets").amax(2))
    assert torch.equal(golden_case(1)[1].same[0], golden("n1_same_label"))


def test_the_margin_equals_the_golden_loss_of_each_image_and_its_gradients() -> None:
    scores, mixtures = golden_case(1)
    scores.requires_grad_(), mixtures.scores.requires_grad_()
    each = margin_ranking(scores, mixtures.scores, mixtures.same, float(GOLDEN["n1_margin"]))
    torch.testing.assert_close(each[0], golden("n1_mrl_per_sample"), rtol=0, atol=1e-12)
    loss = MarginRanking(2.0)(scores, mixtures)
    torch.testing.assert_close(loss, golden("n1_mrl_loss"), rtol=0, atol=1e-12)
    first, second = torch.autograd.grad(loss, [scores, mixtures.scores])
    torch.testing.assert_close(first, golden("n1_mrl_grad_logits"), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, golden("n1_mrl_grad_mixed_logits"), rtol=0, atol=1e-12)


def test_the_margin_is_masked_image_by_image_and_not_as_the_released_code_does() -> None:
    scores, mixtures = golden_case(1)
    hinge = (mixtures.scores.amax(2) - scores.amax(1) + 2).relu()[0]
    released = (~mixtures.same[0]).double().mean() * hinge.mean()
    torch.testing.assert_close(released, golden("n1_mrl_broadcast_compat"), rtol=0, atol=1e-12)
    assert float(MarginRanking(2.0)(scores, mixtures)) != pytest.approx(float(released), abs=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_the_gain_equals_the_golden_loss_of_each_image_and_its_gradients(count: int) -> None:
    scores, mixtures = golden_case(count)
    scores.requires_grad_(), mixtures.scores.requires_grad_()
    each = gain_ranking(scores, mixtures.scores, mixtures.share)
    torch.testing.assert_close(each, golden(f"n{count}_mndcg_per_sample"), rtol=0, atol=1e-12)
    loss = GainRanking()(scores, mixtures)
    torch.testing.assert_close(loss, golden(f"n{count}_mndcg_loss"), rtol=0, atol=1e-12)
    first, second = torch.autograd.grad(loss, [scores, mixtures.scores], retain_graph=True)
    torch.testing.assert_close(first, golden(f"n{count}_mndcg_grad_logits"), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, golden(f"n{count}_mndcg_grad_mixed_logits"), rtol=0, atol=1e-12)
    total = nn.functional.cross_entropy(scores, golden("labels")) + 0.1 * loss
    torch.testing.assert_close(total, golden(f"n{count}_total_loss_weight_0.1"), rtol=0, atol=1e-12)


def card() -> tuple[Tensor, Mixtures]:
    """The example of two images that can be followed by hand."""
    scores = torch.tensor([[4, 1, 0], [0.5, 3, 0.5]]).double()
    mixed = torch.tensor(
        [[[2, 1.5, 0], [1, 2, 0.5]], [[3, 0.5, 0], [1, 1.2, 0.8]], [[1, 1, 1], [0, 2.5, 0]]], dtype=torch.float64
    )
    share = torch.tensor([0.7, 0.9, 0.6], dtype=torch.float64)[:, None].expand(3, 2)
    return scores, Mixtures(mixed, share, torch.zeros(3, 2, dtype=torch.bool))


def test_two_images_give_the_values_of_the_card() -> None:
    scores, mixtures = card()
    assert margin_ranking(scores, mixtures.scores[:1], mixtures.same[:1], 2.0).tolist() == [[0, 1]]
    each = gain_ranking(scores, mixtures.scores, mixtures.share)
    assert each.tolist() == pytest.approx([0.115784133, 0.174415605], abs=1e-9)
    assert float(GainRanking()(scores, mixtures)) == pytest.approx(0.145099869, abs=1e-9)


def some(images: int = 6, mixtures: int = 4, classes: int = 5, seed: int = 0) -> tuple[Tensor, Mixtures]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    share = 0.5 + 0.5 * torch.rand(mixtures, images, generator=generator, dtype=torch.float64)
    same = torch.rand(mixtures, images, generator=generator) < 0.3
    return 2 * draw(images, classes), Mixtures(draw(mixtures, images, classes), share.masked_fill(same, 1), same)


def test_both_losses_agree_with_loops() -> None:
    scores, mixtures = some()
    for b in range(6):
        conf = lambda z: float(z.softmax(0).max())  # noqa: E731
        ranked = sorted(
            zip(mixtures.share[:, b].tolist(), map(conf, mixtures.scores[:, b]), strict=True), key=lambda p: -p[0]
        )
        items = [(1.0, conf(scores[b])), *ranked]
        gain, ideal = (sum(item[i] / math.log2(r + 2) for r, item in enumerate(items)) for i in (1, 0))
        found = gain_ranking(scores, mixtures.scores, mixtures.share)[b]
        assert float(found) == pytest.approx(1 - min(gain, ideal) / max(gain, ideal))
        for i in range(4):
            wanted = max(0.0, float(mixtures.scores[i, b].max() - scores[b].max()) + 1.5) * (not mixtures.same[i, b])
            assert float(margin_ranking(scores, mixtures.scores, mixtures.same, 1.5)[i, b]) == pytest.approx(wanted)


def test_confidences_that_equal_the_coefficients_lose_nothing() -> None:
    share = torch.tensor([0.6, 0.9, 0.75]).double()[:, None]
    two = lambda p: torch.stack([p.log(), (1 - p).log()], -1)  # noqa: E731
    certain = torch.tensor([[800.0, 0.0]]).double()
    assert float(gain_ranking(certain, two(share), share)) == pytest.approx(0, abs=1e-12)


def test_the_gain_does_not_depend_on_the_order_in_which_mixtures_are_made() -> None:
    scores, mixtures = some(seed=3)
    share = mixtures.share + 1e-3 * torch.arange(4)[:, None]  # without ties
    order = torch.tensor([2, 0, 3, 1])
    first, second = (
        gain_ranking(scores, mixtures.scores, share),
        gain_ranking(scores, mixtures.scores[order], share[order]),
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert ((first >= 0) & (first < 1)).all()


def test_the_gain_falls_with_every_confidence_and_most_with_that_of_the_image() -> None:
    _, mixtures = card()
    ideal = 2.176242713
    confidence = torch.tensor([0.5, 0.4, 0.45, 0.35]).double().requires_grad_()
    rest = (1 - confidence).log() - math.log(9)
    ten = torch.cat([confidence.log()[:, None], rest[:, None].expand(4, 9)], 1)
    loss = gain_ranking(ten[:1], ten[1:, None], mixtures.share[:, :1])
    (gradient,) = torch.autograd.grad(loss.sum(), confidence)
    expected = [-1 / (ideal * math.log2(rank + 1)) for rank in (1, 3, 2, 4)]  # by coefficient 0.9, 0.7, 0.6
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_margin_is_zero_just_when_every_mixture_is_far_enough_below() -> None:
    scores, mixtures = some()
    open_mask = torch.zeros_like(mixtures.same)
    below = scores.amax(1)[None, :, None] - mixtures.scores.amax(2, keepdim=True)
    moved = mixtures.scores + below - 1.5
    assert float(margin_ranking(scores, moved, open_mask, 1.5).sum()) == pytest.approx(0, abs=1e-12)
    assert float(margin_ranking(scores, moved + 0.1, open_mask, 1.5).sum()) == pytest.approx(0.1 * 24)
    equal = margin_ranking(scores, scores[None], open_mask[:1], 1.5)
    torch.testing.assert_close(equal, torch.full_like(equal, 1.5))


def test_an_active_margin_pulls_two_scores_only() -> None:
    scores, mixtures = some(images=4, mixtures=1)
    scores.requires_grad_(), mixtures.scores.requires_grad_()
    loss = 0.1 * MarginRanking(50.0)(scores, mixtures._replace(same=torch.zeros(1, 4, dtype=torch.bool)))
    first, second = torch.autograd.grad(loss, [scores, mixtures.scores])
    top = nn.functional.one_hot(scores.argmax(1), 5)
    torch.testing.assert_close(first, -0.1 / 4 * top.double())
    torch.testing.assert_close(second[0], 0.1 / 4 * nn.functional.one_hot(mixtures.scores[0].argmax(1), 5).double())


class Watching(nn.Module):
    """Scores that are the first pixels, and a note of every batch seen."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes, self.seen = classes, list[Tensor]()

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return image.flatten(1)[:, : self.classes]


def batch(labels: list[int], classes: int = 4) -> Batch:
    image = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return Batch(image, torch.eye(classes)[labels])


def test_all_mixtures_pass_the_network_together_right_behind_the_images() -> None:
    model, given = Watching(), batch([0, 1, 2, 3, 0])
    step = RankMixup(mixtures=2).step(given, Forward(model, Classify(4)))
    assert [len(seen) for seen in model.seen] == [5, 10]
    assert model.seen[0] is given.input
    assert step.losses.keys() == {"cross_entropy", "mixup_ranking"}
    assert torch.equal(step.batch.input, given.input)


def test_images_are_mixed_with_their_partners_by_one_coefficient_a_mixture() -> None:
    model, given = Watching(), batch([0, 1, 2, 3, 0, 1])
    torch.manual_seed(0)
    found = RankMixup(mixtures=3, alpha=0.5).mixed(model, given)
    torch.manual_seed(0)
    partners, kept = [torch.randperm(6) for _ in range(3)], draw_kept(0.5, 3).tolist()
    for i, seen in enumerate(model.seen[0].view(3, 6, 3, 4, 4)):
        for b in range(6):
            partner = int(partners[i][b])
            torch.testing.assert_close(seen[b], kept[i] * given.input[b] + (1 - kept[i]) * given.input[partner])
            equal = torch.equal(given.target[b], given.target[partner])
            assert bool(found.same[i, b]) is equal
            assert float(found.share[i, b]) == pytest.approx(1 if equal else max(kept[i], 1 - kept[i]))


def test_equal_labels_in_all_of_a_batch_cost_no_margin_and_count_as_whole_images() -> None:
    found = RankMixup(mixtures=2).mixed(Watching(), batch([2] * 6))
    assert found.same.all()
    assert (found.share == 1).all()
    assert float(MarginRanking()(torch.zeros(6, 4), found)) == 0


def test_smoothed_labels_agree_where_hard_ones_do() -> None:
    given, smoothed = batch([0, 1, 0, 1, 2]), batch([0, 1, 0, 1, 2])
    smoothed = smoothed._replace(target=0.9 * smoothed.target + 0.025)
    found = []
    for one in (given, smoothed):
        torch.manual_seed(3)
        found.append(RankMixup().mixed(Watching(), one))
    assert torch.equal(found[0].same, found[1].same)
    assert found[0].same.any()
    assert torch.equal(found[0].share, found[1].share)


def test_coefficients_lie_between_a_half_and_one() -> None:
    torch.manual_seed(0)
    found = RankMixup(mixtures=50, alpha=0.7).mixed(Watching(), batch([0, 1, 2, 3]))
    assert float(found.share.min()) >= 0.5
    assert float(found.share.max()) == 1


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize(("update", "passes"), [(True, 2), (False, 1)])
def test_running_statistics_count_the_mixtures_only_if_told_to(update: bool, passes: int) -> None:
    torch.manual_seed(0)
    model, given = Normed(), batch([0, 1, 2, 3])
    plain = Normed()
    plain.load_state_dict(model.state_dict())
    RankMixup(update_norm=update).step(given, Forward(model, Classify(4)))
    plain(given.input)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked == passes
    assert norm.track_running_stats
    same = torch.equal(norm.running_mean, plain[1].running_mean)  # type: ignore[arg-type]
    assert same is not update


def test_resting_statistics_still_normalize_by_the_batch_and_leave_frozen_layers_alone() -> None:
    model, given = Normed(), batch([0, 1, 2, 3])
    with resting_statistics(model):
        inside = model(given.input)
    torch.testing.assert_close(inside, model(given.input))
    model[1].eval()
    before = model(given.input)
    with resting_statistics(model):
        assert torch.equal(model(given.input), before)


def test_statistics_rest_no_longer_when_a_pass_fails() -> None:
    model = Normed()
    with pytest.raises(RuntimeError), resting_statistics(model):
        model(torch.zeros(2, 5, 4, 4))
    assert model[1].track_running_stats


def test_at_weight_zero_no_pass_is_made_and_nothing_is_drawn() -> None:
    model, state = Watching(), torch.get_rng_state()
    RankMixup(weight=0.0).step(batch([0, 1]), Forward(model, Classify(4)))
    assert len(model.seen) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("before", [True, False])
def test_what_another_method_made_of_the_images_is_what_is_mixed(before: bool) -> None:
    model, given = Watching(), batch([0, 1, 2, 3] * 2)
    torch.manual_seed(0)
    methods: list[Method] = [CutMix(probability=1.0), RankMixup(mixtures=1, alpha=1000.0)]
    step = Forward(model, Classify(4), methods if before else methods[::-1])(given)
    raw, mixed = model.seen
    assert torch.equal(raw, step.batch.input)
    assert not torch.equal(raw, given.input)
    near = [min(float((image - (own + other) / 2).abs().mean()) for own in raw for other in raw) for image in mixed]
    assert max(near) < 0.06  # λ is close to a half
    assert step.loss.isfinite()


@pytest.mark.parametrize("ranking", [GainRanking(), MarginRanking(1.0)])
def test_it_obeys_the_laws(ranking: Ranking) -> None:
    check_method(lambda: RankMixup(ranking, mixtures=2))


def test_it_obeys_the_laws_with_resting_statistics() -> None:
    check_method(lambda: RankMixup(update_norm=False, mixtures=1))


def started(*methods: Method) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), lambda: [*methods])


def test_features_that_a_lesson_compares_are_those_of_the_images_and_not_of_the_mixtures() -> None:
    losses = []
    for extra in ([], [RankMixup()]):
        torch.manual_seed(0)
        trial = started(Distill(tiny_network(), [Attention(1.0, layers=[-1])]), *extra)
        losses.append(trial.step(0).losses["attention"])
    torch.testing.assert_close(losses[0], losses[1])


def test_branches_are_judged_by_the_images_and_not_by_the_mixtures() -> None:
    losses = []
    for extra in ([], [RankMixup()]):
        torch.manual_seed(0)
        losses.append(started(NativeEnsemble("down"), *extra).step(0).losses)
    names = losses[0].keys()
    assert losses[1].keys() == {*names, "mixup_ranking"}
    for name in names:
        torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("others", [[], [CutMix(probability=1.0)], [LabelSmoothing()]], ids=["alone", "cut", "smooth"])
def test_a_quantized_network_trains_with_it_and_exports(others: list[Method]) -> None:
    trial = started(*others, RankMixup(mixtures=2), Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8)))
    for number in range(2):
        assert trial.step(number).losses["mixup_ranking"].isfinite()
    finished = finish(trial.learner).eval()
    with torch.no_grad():
        assert close(finished(trial.image()), exported(finished, trial.image()))


WRONG: list[tuple[dict[str, Any], str]] = [({"mixtures": 0}, "mixtures is 0"), ({"alpha": 0.0}, "alpha is 0")]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_numbers_out_of_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankMixup(**arguments)


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(UserError, match="margin is -1"):
        MarginRanking(-1)


def test_labels_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(UserError, match="RankMixup needs class probabilities"):
        RankMixup().mixed(Watching(), Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])))


def test_mixing_never_waits_for_what_is_on_the_device() -> None:
    on_device = Batch(torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, 5, device="meta"))  # nothing can be read
    scores, mixtures = torch.zeros(4, 4, device="meta"), RankMixup().mixed(Watching(), on_device)
    for ranking in (GainRanking(), MarginRanking()):
        assert ranking(scores, mixtures).device.type == "meta"


def test_digits_are_ranked_by_how_much_they_are_mixed_better_than_by_plain_training(tmp_path: Path) -> None:
    plain, ranked = (mixed_confidence(methods, tmp_path / str(len(methods))) for methods in ([], [RankMixup()]))
    assert ranked["mixed_confidence_correlation"] > plain["mixed_confidence_correlation"] + 0.05
    assert ranked["mixed_confidence_100"] > max(ranked[f"mixed_confidence_{percent}"] for percent in PERCENT)
    assert ranked["mixed_confidence_50"] < ranked["mixed_confidence_70"] < ranked["mixed_confidence_90"]


def mixed_confidence(methods: list[Method], run: Path) -> dict[str, float]:
    torch.manual_seed(0)
    data, task = Digits(), Classify(10)
    network = train(Tiny(width=8), task, data, run, epochs=10, methods=methods, accelerator="cpu")
    return MixedConfidence()(Deployed(network, data.normalize, task), task, data)
