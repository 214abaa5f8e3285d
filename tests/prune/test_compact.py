"""CompactStructure: golden numbers, a cut that resumes bit for bit, budgets that are met, files that are proved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from galago.augment.cutmix import CutMix
from galago.deploy import onnx, openvino
from galago.deploy.verify import compare
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, identical
from galago.layers import Wrapper
from galago.method import Method
from galago.models.resnet import ResNet
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.prune.blocks import Block
from galago.prune.compact import CompactStructure, applied, controlled, hint_loss
from galago.prune.cost import Operations, Parameters, costs_of
from galago.prune.groups import strengths
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.run import Run, load
from galago.schedule import Constant
from galago.testing import check_method, tiny_network
from galago.train import train
from galago.trainer import finish
from samples import StopAt, Stopped

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distillation" / "compact_cnn_kd.npz")
RECIPE = {"model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"classes": 3, "channels": 3, "width": 5}}}


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def test_control_has_the_golden_numbers() -> None:
    left, target = golden("ctrl_cost_ratio"), golden("ctrl_target")
    bounds = [float(GOLDEN[f"ctrl_{name}"]) for name in ("eta", "min", "max")]
    stored = controlled(golden("ctrl_lambda"), left, target, *bounds)
    torch.testing.assert_close(stored, golden("ctrl_lambda_stored_after"))
    torch.testing.assert_close(applied(stored, left, target), golden("ctrl_lambda_applied_after"))


def test_the_hint_has_the_golden_loss_and_gradient() -> None:
    feature = golden("hint_f_student").clone().requires_grad_()
    loss = hint_loss(feature, golden("hint_f_teacher"), golden("hint_alive").double())
    loss.backward()
    torch.testing.assert_close(loss.item(), float(GOLDEN["hint_loss"]))
    torch.testing.assert_close(feature.grad, golden("hint_grad"))


def test_the_hint_is_a_mean_over_living_channels_and_nothing_where_none_lives() -> None:
    feature, wanted, alive = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([1.0, 0.0, 0.0, 1.0])
    one_by_one = [
        (feature[n, c, y, x] - wanted[n, c, y, x]) ** 2
        for n in range(2)
        for c in (0, 3)
        for y in range(3)
        for x in range(3)
    ]
    torch.testing.assert_close(hint_loss(feature, wanted, alive), torch.stack(one_by_one).mean())
    assert hint_loss(feature, wanted, torch.zeros(4)) == 0


def resnet() -> nn.Module:
    return ResNet([1, 1], [6, 10], classes=3)


def pressed(make: Callable[[], nn.Module] = resnet, **options: object) -> Trial:
    """A training whose first epoch has begun; nothing is cut in it."""
    return Trial(make, classify(), TinyImages(), lambda: [CompactStructure(**{"until": 1.0, **options})])


def method_of(trial: Trial) -> CompactStructure:
    (method,) = trial.learner.ideas
    assert isinstance(method, CompactStructure)
    return method


def test_losses_are_what_their_formulas_say_one_by_one() -> None:
    trial = pressed(pressure=0.3, blocks=[Block("layer2", target=0.8)])
    method, seed = method_of(trial), copy.deepcopy(trial.learner.model).eval()
    method.strength.copy_(torch.tensor([0.2, 0.7]))
    step = trial.step(0)
    model, groups = copy.deepcopy(seed), method.groups
    gates, costs = strengths(model, groups).detach(), costs_of(groups, Operations())
    layers = costs.regularizer(torch.ones(groups.count).double(), gates.double())
    whole = costs.cost(torch.ones(groups.count).double()).sum()
    blocks = [0.2 if path.startswith(("conv1", "layer1")) else 0.7 for path in (layer.path for layer in groups.layers)]
    wanted = sum(one * float(layer) for one, layer in zip(blocks, layers, strict=True)) / float(whole)
    assert step.losses["resource"].item() == pytest.approx(wanted, rel=1e-5)
    maps = {}
    for name, network in (("own", model.train()), ("full", seed)):
        x = network.relu(network.bn1(network.conv1(step.batch.input)))
        maps[name] = [x := network.layer1(x), network.layer2(x)]
    hints = sum((own - full).square().mean() for own, full in zip(maps["own"], maps["full"], strict=True))
    torch.testing.assert_close(step.losses["hint"], hints.detach(), rtol=1e-4, atol=1e-6)


def test_the_pressure_is_a_share_of_the_loss_in_the_first_step() -> None:
    trial = pressed(pressure=0.25, hint=0.0)
    losses = trial.step(0).losses
    assert losses.keys() == {"cross_entropy", "resource"}
    assert losses["resource"].item() == pytest.approx(0.25 * losses["cross_entropy"].item(), rel=1e-5)
    before = method_of(trial).strength.clone()
    trial.step(1)
    assert torch.equal(method_of(trial).strength, before)


def test_a_strength_given_by_hand_stays_and_the_others_grow_while_their_targets_are_not_met() -> None:
    trial = pressed(blocks=[Block("layer2", strength=0.25)], rate=2.0)
    method = method_of(trial)
    trial.step(0)
    before = method.strength.clone()
    method.epoch(trial.learner.model, 1)
    assert method.strength[1] == 0.25
    torch.testing.assert_close(method.strength[0], before[0] * np.exp(2.0 * 0.5))


def test_more_strength_on_one_block_makes_that_block_cheaper_and_leaves_the_other() -> None:
    def costs(strength: float) -> Tensor:
        trial = pressed(
            blocks=[Block("layer1", strength=0.0), Block("layer2", strength=strength)], hint=0.0, threshold=0.05
        )
        for norm in (m for m in trial.learner.model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.data.copy_(torch.linspace(0.02, 1.0, norm.num_features))
        for _ in range(4):
            for number in range(6):
                trial.step(number)
        method = method_of(trial)
        return method.exact.left(method._measured(trial.learner.model)[1])

    weak, strong = costs(0.0), costs(0.5)
    assert strong[1] < weak[1] - 0.05
    assert abs(strong[0] - weak[0]) < 0.05


def test_in_a_block_that_has_met_its_target_nothing_is_pressed() -> None:
    trial = pressed(blocks=[Block("layer1", target=1.0), Block("layer2", strength=0.5)])
    method, model = method_of(trial), trial.learner.model
    gates = strengths(model, method.groups)
    method._pressure(gates, torch.ones_like(gates), torch.tensor(1.0)).backward()
    assert not model.layer1[0].bn1.weight.grad.any()
    assert model.layer2[0].bn1.weight.grad.all()


def test_factors_and_shifts_do_not_decay_and_everything_else_does() -> None:
    trial = pressed()
    groups = trial.learner.parameter_groups()
    free = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    norms = [m for m in trial.learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert free == {id(p) for norm in norms for p in norm.parameters()}
    finished = finish(trial.learner)
    assert not any("own_rates" in vars(module) for module in finished.modules())
    assert not any(module._forward_hooks for module in finished.modules())


class Course:
    """Trainings of the same small network, to their ends or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, methods: list[Method], **options: object) -> nn.Module:
        torch.manual_seed(3)
        given = {"epochs": 4, "schedule": Constant(), "optimizer": lambda p: SGD(p, lr=0.05, momentum=0.9), **options}
        return train(
            tiny_network(), classify(), TinyImages(), self.folder / name, methods=methods, recipe=RECIPE, **given
        )


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


@contextmanager
def dying(at: int) -> Iterator[None]:
    StopAt.at = at
    try:
        yield
    finally:
        StopAt.at = 0


@pytest.mark.parametrize("at", [6, 11, 14, 18, 23])  # batches of six an epoch; the cut comes before the thirteenth
@pytest.mark.parametrize("every", [None, 2])
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(course: Course, at: int, every: int | None) -> None:
    def methods() -> list[Method]:
        return [StopAt(), CompactStructure(budget=0.6, until=0.5, pressure=1.0), CutMix()]

    options = {"checkpoint_every": every, "average": 0.5, "log_every": 1}
    whole = course("whole", methods(), **options)
    with dying(at), pytest.raises(Stopped):
        course("parts", methods(), **options)
    parts = course("parts", methods(), **options)
    assert identical(whole.state_dict(), parts.state_dict())
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in Run(course.folder / name).history()]
        for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert whole.stem[0].out_channels < 5


def test_the_cut_comes_at_the_first_epoch_that_begins_late_enough(course: Course) -> None:
    class Widths(Method):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
            self.seen.append(sum(p.numel() for p in model.parameters()))
            return model

    full = sum(p.numel() for p in tiny_network().parameters())
    for until, whole in ((0.0, 0), (0.2, 1), (0.25, 1), (0.5, 2), (0.75, 3), (0.9, 4), (1.0, 4)):
        widths = Widths()
        course(f"until {until}", [CompactStructure(until=until), widths])
        assert [size == full for size in widths.seen] == [True] * whole + [False] * (4 - whole)


def test_a_budget_that_is_met_before_its_time_is_cut_at_once(course: Course) -> None:
    trial = pressed(tiny_network, budget=0.9)
    method, model = method_of(trial), trial.learner.model
    trial.step(0)
    with torch.no_grad():
        for norm in (model.block.first[1], model.down[1]):
            norm.weight[:3] = 0.0
    method.epoch(model, 1)
    assert method.kept is not None
    assert model.block.first[0].out_channels == 2
    assert model.down[0].out_channels == 7


@pytest.mark.parametrize("resource", [Operations(), Parameters()])
@pytest.mark.parametrize("budget", [0.8, 0.3])
def test_what_is_shipped_is_within_its_budget_and_is_loaded_as_it_was(
    course: Course, resource: Operations | Parameters, budget: float
) -> None:
    method = CompactStructure(budget, resource, until=0.5)
    model = course("run", [method], epochs=2)
    assert method.kept is not None
    alive = method.kept.double()
    assert (method.exact.left(alive) <= budget).all()
    weights = sum(layer.get_parameter("weight").numel() for layer in map(model.get_submodule, multiplying(method)))
    assert weights == costs_of(method.groups, Parameters()).cost(alive).sum()
    image = torch.randn(2, 3, 8, 8)
    again = load(course.folder / "run")
    assert torch.equal(again(image), model(image))
    assert identical(again.state_dict(), model.state_dict())


def multiplying(method: CompactStructure) -> list[str]:
    return [layer.path for layer in method.groups.layers]


def test_the_best_epoch_is_one_of_the_cut_network(course: Course) -> None:
    best = course("best", [CompactStructure(budget=0.3, until=0.5)], restore_best=True)
    assert best.stem[0].out_channels < 5
    saved = Run(course.folder / "best").load_checkpoint(Run(course.folder / "best").best)
    assert saved is not None
    assert torch.equal(saved["learner"]["model.stem.0.weight"], best.stem[0].weight)


def test_taught_by_the_full_network_the_cut_one_stays_closer_to_it(course: Course) -> None:
    full = course("full", [], epochs=6)
    state, divergences = copy.deepcopy(full.state_dict()), []
    for taught in (True, False):
        start = tiny_network()
        start.load_state_dict(state)
        methods: list[Method] = [CompactStructure(budget=0.5, until=0.0, hint=float(taught))]
        methods += [Distill(copy.deepcopy(full), [SoftTargets()], 0.1)] if taught else []
        cut = train(
            start, classify(), TinyImages(), course.folder / f"{taught}", epochs=6, methods=methods, recipe=RECIPE
        )
        image = TinyImages().normalize(torch.cat([batch.input for batch in TinyImages().train()]))
        with torch.no_grad():
            scores = [network(image).div(4).log_softmax(1) for network in (cut, full)]
        divergences.append(nn.functional.kl_div(*scores, log_target=True, reduction="batchmean").item())
    assert divergences[0] < 0.7 * divergences[1]


def test_hints_of_another_method_see_the_model_and_not_its_copy() -> None:
    def methods() -> list[Method]:
        return [Distill(Tiny(3, 3, 5), [SoftTargets()]), CompactStructure(until=1.0), CutMix()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    assert trial.step(0).losses.keys() == {"cross_entropy", "soft_targets", "hint", "resource"}


def test_a_second_run_quantizes_the_cut_network_and_its_files_are_proved(course: Course) -> None:
    course("thin", [CompactStructure(budget=0.5, until=0.5), CutMix()], epochs=2)
    data, task, thin = TinyImages(), classify(), load(course.folder / "thin")
    recipe = {"model": {"class_path": "galago.run.load", "init_args": {"run": str(course.folder / "thin")}}}
    quantize = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))
    train(thin, task, data, course.folder / "small", epochs=1, methods=[quantize], recipe=recipe)
    small = load(course.folder / "small")
    assert any(isinstance(module, Wrapper) for module in small.modules())
    assert small.stem[0].weight.shape == load(course.folder / "thin").stem[0].weight.shape
    trained = Deployed(small, data.normalize, task).eval()
    files = {"onnxruntime": course.folder / "model.onnx", "openvino": course.folder / "model.xml"}
    onnx.export(trained, data.example(), files["onnxruntime"])
    openvino.export(trained, data.example(), files["openvino"])
    outcome = compare(trained, files, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


def test_the_full_network_is_never_trained() -> None:
    trial = pressed()
    full = method_of(trial).full
    assert full is not None
    before = copy.deepcopy(full.state_dict())
    trial.step(0)
    assert not full.network.training
    assert identical(before, full.state_dict())
    assert not any(parameter.requires_grad for parameter in full.parameters())


@pytest.mark.parametrize("until", [0.0, 1.0])
def test_it_obeys_the_laws_of_a_method(until: float) -> None:
    # cut at the end, it is not trained any further, so that its answer is another
    check_method(lambda: CompactStructure(until=until), same_answer=until == 0.0)


def test_its_page_before_training_shows_blocks_and_targets() -> None:
    shown = method_of(pressed(blocks=[Block("layer2", target=0.25)])).summary()
    assert [list(column.cells) for column in shown.columns][0::5] == [["layer1", "layer2"], ["0.5", "0.25"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.0}, "budget is 0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"until": 2.0}, "until is 2"),
        ({"pressure": 0.0}, "pressure"),
        ({"lowest": 0.0}, "lowest"),
        ({"lowest": 2.0}, "lowest"),
        ({"hint": -1.0}, "hint"),
        ({"threshold": -0.1}, "threshold"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CompactStructure(**options)


def test_a_budget_below_what_is_possible_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"block 'layer1' cannot be cut down to 0\.01 of its operations"):
        pressed(budget=0.01)


def test_a_network_of_which_nothing_can_be_cut_is_refused_with_the_reasons() -> None:
    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    with pytest.raises(UserError, match=r"no channel that it could cut: 1 \(it gives the network's answer\)"):
        pressed(linear)


@pytest.mark.parametrize("first", [True, False])
def test_a_network_that_is_quantized_in_the_same_run_is_refused_before_the_first_step(first: bool) -> None:
    def methods() -> list[Method]:
        both: list[Method] = [Quantize(LSQWeight(4), LSQ(4)), CompactStructure()]
        return both if first else both[::-1]

    with pytest.raises(UserError, match="quantize in a second run"):
        Trial(tiny_network, classify(), TinyImages(), methods)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    trial = pressed(tiny_network, until=0.0)
    saved = trial.save()
    with pytest.raises(UserError, match="another network"):
        Trial(resnet, classify(), TinyImages(), lambda: [CompactStructure(until=0.0)], saved=saved)
