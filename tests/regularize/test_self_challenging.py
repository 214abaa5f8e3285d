"""RSC against the official code's numbers, its closed form, and what must be true of it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Normalize
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, identical, tiny_network
from galago.method import Forward, Method
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.muting import (
    averaged_layer,
    challenge,
    channel_scores,
    class_gradient,
    lost_probability,
    only_hurt,
    place_scores,
    without_highest,
)
from galago.regularize.self_challenging import SelfChallenging
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "rsc.npz")
SHARES = {"spatial": 1 / 3, "channel": 1 / 3.2}


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def head(weight: Tensor, bias: Tensor, feature: Tensor) -> Tensor:
    return nn.functional.linear(feature.mean((2, 3)), weight, bias)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return nn.functional.one_hot(labels, classes).double()


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_every_step_is_that_of_the_official_code(case: str, kind: str) -> None:
    feature, weight = golden(f"{case}_features").requires_grad_(), golden(f"{case}_head_weight").requires_grad_()
    bias, target = golden(f"{case}_head_bias"), one_hot(golden(f"{case}_labels"), len(weight))
    answer, name = partial(head, weight, bias), f"{case}_{kind}"
    gradient = class_gradient(feature, target, answer)
    assert weight.grad is None
    scores = place_scores(feature.detach(), gradient) if kind == "spatial" else channel_scores(gradient)
    close(scores.flatten(1), golden(f"{name}_scores"))
    mask = without_highest(scores, SHARES[kind])
    assert torch.equal(mask, golden(f"{name}_mask_before_batch_selection"))
    lost = lost_probability(feature.detach(), mask, target, answer).detach()
    close((lost - 1e-4).relu(), golden(f"{name}_delta"))
    share = float(golden(f"{case}_batch_fraction"))
    whole = challenge(feature, target, answer, kind == "spatial", SHARES[kind], share)
    assert torch.equal(whole, golden(f"{name}_mask"))
    logits = answer(feature * whole)
    close(logits.detach(), golden(f"{name}_logits"))
    loss = nn.functional.cross_entropy(logits, target)
    loss.backward()
    close(loss.detach(), golden(f"{name}_loss"))
    close(feature.grad, golden(f"{name}_grad_features"))
    close(weight.grad, golden(f"{name}_grad_head_weight"))
    muted = whole.flatten(1).min(1).values == 0
    assert muted.sum() <= round(len(target) * share)
    after = answer(feature * whole).softmax(1)[muted].gather(1, golden(f"{case}_labels")[muted, None])
    before = answer(feature).softmax(1)[muted].gather(1, golden(f"{case}_labels")[muted, None])
    assert (after < before).all()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_example_of_the_card() -> None:
    feature = torch.tensor([[[[1.0, 0], [2, 1]], [[0, 1], [1, 0]], [[2, 2], [0, 0]]]])
    weight, target = torch.tensor([[1.0, -1, 0.5], [0, 2, -0.5]]), torch.tensor([[1.0, 0.0]])
    answer = partial(head, weight, torch.zeros(2))
    gradient = class_gradient(feature, target, answer)
    assert channel_scores(gradient).flatten().tolist() == [0.25, -0.25, 0.125]
    scores = place_scores(feature, gradient)
    assert scores.tolist() == [[[[0.5, 0.0], [0.25, 0.25]]]]
    for one, places, left in ((scores, True, 0.437823), (channel_scores(gradient), False, 0.377541)):
        mask = without_highest(one, SHARES["spatial" if places else "channel"])
        assert (mask == 0).sum() == 1, "ties at the threshold stay"
        assert float(answer(feature * mask).softmax(1)[0, 0]) == pytest.approx(left, abs=1e-6)


def test_scores_behind_an_average_and_a_linear_layer_have_a_closed_form() -> None:
    feature, weight = torch.randn(5, 6, 3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    target = torch.rand(5, 3, dtype=torch.float64)
    gradient = class_gradient(feature, target, partial(head, weight, torch.zeros(3, dtype=torch.float64)))
    channels = target @ weight / 12
    torch.testing.assert_close(channel_scores(gradient)[:, :, 0, 0], channels, rtol=1e-5, atol=1e-6)
    places = torch.einsum("bchw,bc->bhw", feature, channels).unsqueeze(1)
    torch.testing.assert_close(place_scores(feature, gradient), places, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "share", "muted"), [(9, 1 / 3, 3), (49, 1 / 3, 17), (64, 1 / 3.2, 20), (1, 0.5, 0)])
def test_as_many_are_muted_as_the_share_says_rounded_up(count: int, share: float, muted: int) -> None:
    mask = without_highest(torch.randperm(count).float().view(1, 1, 1, count), share)
    assert (mask == 0).sum() == muted


def test_images_that_lose_nothing_are_never_muted() -> None:
    assert only_hurt(torch.zeros(4, 2), torch.zeros(4), 1.0).all()
    assert only_hurt(torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.0, 0.0]), 0.0).all()
    assert only_hurt(torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.0, 0.0]), 1.0)[:2].sum() == 0


def trained(method: Method | None, steps: int = 3) -> tuple[dict[str, Tensor], Trial]:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [] if method is None else [method])
    for number in range(steps):
        trial.step(number)
    return trial.learner.model.state_dict(), trial


def test_without_images_to_mute_training_is_bit_for_bit_the_usual_one() -> None:
    assert identical(trained(SelfChallenging(batch_share=0.0))[0], trained(None)[0])
    assert not identical(trained(SelfChallenging())[0], trained(None)[0])


def test_the_head_may_be_named_and_be_of_any_make() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(4 * 4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)

    with pytest.raises(UserError, match="takes in no layer's averaged map"):
        SelfChallenging().prepare(network().eval(), TinyImages())
    with pytest.raises(UserError, match="do not make the network's scores"):
        SelfChallenging("1", ["4"]).prepare(network().eval(), TinyImages())
    for named in (["2", "3", "4"], ["2", "4"]):
        method = SelfChallenging("1", named)
        trial = Trial(network, classify(), TinyImages(), lambda method=method: [method])
        trial.step(0)
        assert trial.learner.model[4][1].num_batches_tracked == 1, "looking ahead is no training"


def test_the_layer_is_found_where_its_average_is_what_the_classifier_takes_in() -> None:
    assert averaged_layer(tiny_network().eval(), torch.randn(1, 3, 8, 8)) == "down"
    assert averaged_layer(resnet20().eval(), torch.randn(1, 3, 16, 16)) == "layer3"
    with pytest.raises(UserError, match="no map"):
        SelfChallenging("flatten").prepare(tiny_network().eval(), TinyImages())
    with pytest.raises(UserError, match="average over places and the classifier do not"):
        SelfChallenging("block").prepare(tiny_network().eval(), TinyImages())


@pytest.mark.parametrize(
    "make_other",
    [
        lambda: Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)),
        lambda: Distill(tiny_network(), [SoftTargets(), Attention(1.0, layers=[-1])]),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_it_trains_and_exports_beside_other_methods_and_leaves_nothing(make_other, first: bool) -> None:
    def methods() -> list[Method]:
        both = [CutMix(probability=1.0), SelfChallenging(), make_other()]
        return both if first else [both[0], both[2], both[1]]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    average = copy.deepcopy(trial.learner.model)
    assert exported(finish(trial.learner), trial.image()).isfinite().all()
    method = next(idea for idea in trial.learner.ideas if isinstance(idea, SelfChallenging))
    method.finish(average)
    assert not any(method._hook in module._forward_hooks.values() for module in average.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks there where it takes up again
def test_a_compiled_network_is_muted_as_well() -> None:
    torch.compiler.reset()
    method, model, data = SelfChallenging(batch_share=1.0), tiny_network(), TinyImages()
    method.prepare(model, data)
    batch = data.train()[0]
    batch = batch._replace(input=data.normalize(batch.input))
    forward = Forward(model.train(), classify(), [method])
    torch.manual_seed(3)
    written = forward(batch).output
    plain = model(batch.input)
    model.compile(backend="eager")
    torch.manual_seed(3)
    torch.testing.assert_close(forward(batch).output, written)
    assert not torch.allclose(written, plain)
    torch.compiler.reset()


def test_mixed_precision_costs_no_parameter_its_gradient() -> None:
    method, model, data = SelfChallenging(batch_share=1.0), tiny_network(), TinyImages()
    method.prepare(model, data)
    batch = data.train()[0]
    batch = batch._replace(input=data.normalize(batch.input))
    with torch.autocast("cpu", torch.bfloat16):
        loss = Forward(model.train(), classify(), [method])(batch).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


class Evidence(TinyImages):
    """Eight channels in noise that tell two classes, by their sign: the first strongly, the others weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize([0.0], [1.0])

    def draw(self, count: int, seed: int, strength: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(2, (count,), generator=generator)
        told = torch.tensor([strength] + 7 * [0.4]).view(1, 8, 1, 1)
        image = torch.randn(count, 8, 2, 2, generator=generator) + told * (2.0 * label - 1).view(-1, 1, 1, 1)
        return image, label

    def example(self) -> Tensor:
        return self.draw(1, 0, 1.0)[0]


class ForAndAgainst(nn.Module):
    """Every channel, and its opposite, rectified; averaged, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.head = nn.ReLU(), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(torch.cat([x, -x], 1)).mean((2, 3)))


def accuracy_without_the_strong_channel(methods: list[Method]) -> float:
    torch.manual_seed(0)
    model, data = ForAndAgainst(), Evidence()
    for method in methods:
        method.prepare(model, data)
    optimizer, (x, label) = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data.draw(512, 1, 3.0)
    for _ in range(8):
        for part in torch.arange(512).split(64):
            optimizer.zero_grad()
            batch = Batch(x[part], nn.functional.one_hot(label[part], 2).float())
            Forward(model.train(), classify(), methods)(batch).loss.backward()
            optimizer.step()
    x, label = data.draw(4000, 2, 0.0)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == label).float().mean())


def test_a_challenged_network_does_better_where_the_dominant_feature_is_gone() -> None:
    usual = accuracy_without_the_strong_channel([])
    method = SelfChallenging(channel_share=0.1, place_probability=0.0, batch_share=1.0)
    challenged = accuracy_without_the_strong_channel([method])
    assert challenged > usual + 0.05, (usual, challenged)


def test_senseless_arguments_and_targets_are_refused() -> None:
    with pytest.raises(UserError, match="batch_share is 2"):
        SelfChallenging(batch_share=2)
    with pytest.raises(UserError, match="not the layer in front"):
        SelfChallenging(head=["fc"])
    method, model, data = SelfChallenging(), tiny_network(), TinyImages()
    method.prepare(model, data)
    image = torch.randn(4, 3, 8, 8)
    with pytest.raises(UserError, match="class probabilities"):
        method.step(Batch(image, torch.zeros(4, dtype=torch.long)), Forward(model, classify()))

    class Doubles(Method):
        def step(self, batch: Batch, inner: Forward):
            return inner(batch._replace(input=torch.cat([batch.input] * 2), target=torch.cat([batch.target] * 2)))

    with pytest.raises(UserError, match="list it in front"):
        method.step(Batch(image, torch.eye(3)[[0, 1, 2, 0]]), Forward(model.train(), classify(), [Doubles()]))


def test_the_laws_of_methods_hold() -> None:
    check_method(SelfChallenging)
