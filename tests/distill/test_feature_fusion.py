"""Feature fusion against the official code, and what the paper's method has to keep, in branches and with peers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.deploy import onnx, openvino
from galago.deploy.verify import compare
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.divergence import SHIFT, softened_divergence
from galago.distill.ensemble import Ensemble, ensemble_in
from galago.distill.feature_fusion import FeatureFusion, Fusion, mutual_divergences
from galago.distill.hints import Hints
from galago.distill.similarity import Similarity
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.measure import unwrapped
from galago.method import Forward, Method
from galago.models.mobilenet import MobileNetV2
from galago.models.resnet import ResNet, resnet32
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.regularize.label_smoothing import LabelSmoothing
from galago.run import load
from galago.schedule import Constant, RampUp
from galago.taps import Passed
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from galago.trainer import Learner, finish, new_optimizer
from lessons import Golden, equal
from samples import Stripes

GOLDEN = Golden("ffl", prefix="")


def det(rows: int, columns: int, frequency: float) -> Tensor:
    numbers = torch.arange(1, rows * columns + 1, dtype=torch.float64)
    return 2 * (frequency * numbers).sin().view(rows, columns)


def batch(model_data: TinyImages | Stripes) -> Batch:
    given = model_data.train()[0]
    return given._replace(input=model_data.normalize(given.input))


def prepared(method: FeatureFusion, model: nn.Module | None = None) -> Ensemble:
    made = method.prepare(tiny_network() if model is None else model, TinyImages())
    assert isinstance(made, Ensemble)
    return made


# The official code's numbers.


def test_losses_and_gradients_are_the_official_ones() -> None:
    scores = [GOLDEN.learnt(name) for name in ("z1", "z2", "zf")]
    found = mutual_divergences(scores[:2], scores[2], float(GOLDEN("T")))
    equal(found["fused_from_ensemble"], GOLDEN("kl_zf_from_ze"))
    equal(found["branch_1_from_fused"], GOLDEN("kl_z1_from_zf"))
    equal(found["branch_2_from_fused"], GOLDEN("kl_z2_from_zf"))
    crossed = sum(nn.functional.cross_entropy(one, GOLDEN("y")) for one in scores)
    equal(crossed, GOLDEN("loss_ce"))
    total = crossed + GOLDEN("ramp_weight") * sum(found.values())
    equal(total, GOLDEN("loss_total"))
    total.backward()
    for one, name in zip(scores, ("z1", "z2", "zf"), strict=True):
        equal(one.grad, GOLDEN(f"grad_{name}"))


def test_the_cards_numbers_come_out() -> None:
    branches, fused = [det(4, 5, 1.0), det(4, 5, 1.3)], det(4, 5, 0.4)
    found = mutual_divergences(branches, fused, 3.0)
    assert found["fused_from_ensemble"].item() == pytest.approx(0.643220997, abs=1e-9)
    taught = found["branch_1_from_fused"] + found["branch_2_from_fused"]
    assert taught.item() == pytest.approx(2.221752003, abs=1e-9)


def test_the_ramp_is_the_official_one() -> None:
    ramp = RampUp(until=80 / 300)
    for epoch, expected in zip(GOLDEN("ramp_epochs").tolist(), GOLDEN("ramp_values").tolist(), strict=True):
        assert ramp(epoch / 300) == pytest.approx(expected, rel=1e-12)
    assert [round(ramp(epoch / 300), 6) for epoch in (0, 40, 80)] == [0.006738, 0.286505, 1.0]
    rising = [ramp(epoch / 300) for epoch in range(300)]
    assert rising == sorted(rising)
    assert RampUp(until=0)(0.0) == 1
    with pytest.raises(ValueError, match="until is a share"):
        RampUp(until=80)


def fusion() -> Fusion:
    module = Fusion([4, 4], 4, 7).double()
    layers = {"dw": module.fuse[0], "bn1": module.fuse[1], "pw": module.fuse[3], "bn2": module.fuse[4]}
    with torch.no_grad():
        for name, layer in (layers | {"fc": module.linear}).items():
            layer.weight.copy_(GOLDEN(f"fusion_{name}_weight"))
            if layer.bias is not None:
                layer.bias.copy_(GOLDEN(f"fusion_{name}_bias"))
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(GOLDEN(f"fusion_{name}_mean"))
                layer.running_var.copy_(GOLDEN(f"fusion_{name}_var"))
    return module


def fused(module: Fusion, *maps: Tensor) -> Tensor:
    scores: Tensor = module([torch.zeros(())] * len(maps), [Passed(None, one) for one in maps])
    return scores


def test_the_fused_classifier_is_the_official_one_in_both_modes() -> None:
    module, maps = fusion(), [GOLDEN.learnt("f1"), GOLDEN.learnt("f2")]
    equal(fused(module.eval(), *maps), GOLDEN("fusion_logits_eval"))
    scores = fused(module.train(), *maps)
    equal(scores, GOLDEN("fusion_logits_train"))
    nn.functional.cross_entropy(scores, GOLDEN("y")).backward()
    equal(maps[0].grad, GOLDEN("fusion_grad_f1"))
    equal(maps[1].grad, GOLDEN("fusion_grad_f2"))
    equal(module.fuse[0].weight.grad, GOLDEN("fusion_grad_dw_weight"))
    equal(module.fuse[3].weight.grad, GOLDEN("fusion_grad_pw_weight"))
    equal(module.fuse[1].running_mean, GOLDEN("fusion_bn1_mean_after"))
    equal(module.fuse[1].running_var, GOLDEN("fusion_bn1_var_after"))


class Large(Stripes):
    """Images of CIFAR's size."""

    def __init__(self) -> None:
        super().__init__(size=32)


def by_formula(tensors: list[Tensor]) -> None:
    frequency = float(GOLDEN("trunk8_freq"))
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            size = (2 / (tensor.shape[0] * tensor[0, 0].numel())) ** 0.5
            amplitude = 1.4 * size if tensor.ndim == 4 else 0.1
            place = torch.arange(1, tensor.numel() + 1, dtype=torch.float64) + 17 * number
            tensor.copy_((amplitude * (frequency * place).sin()).view_as(tensor))


def weights_of(ensemble: Ensemble) -> list[Tensor]:
    model = ensemble.layer
    blocks = [model.layer1[0], model.layer2[0], model.layer3.layer[0], model.layer3.others[0][0]]
    found = [model.conv1.weight]
    for block in blocks:
        found += [block.conv1.weight, block.conv2.weight]
        found += [block.shortcut[0].weight] if isinstance(block.shortcut, nn.Sequential) else []
    heads = [model.linear.layer, model.linear.others[0]]
    return [
        *found,
        *(head.weight for head in heads),
        ensemble.joint.fuse[0].weight,
        ensemble.joint.fuse[3].weight,
        ensemble.joint.linear.weight,
    ]


def test_a_whole_training_step_of_two_branches_is_the_official_one() -> None:
    torch.manual_seed(0)
    model = ResNet([1, 1, 1], [16, 32, 64], classes=7, project=True)
    assert sum(p.numel() for p in model.parameters()) == int(GOLDEN("vanilla8_param_count"))
    method = FeatureFusion(branch_at="layer3")
    ensemble = method.prepare(model, Large()).double().train()
    trained = sum(p.numel() for p in ensemble.layer.parameters())
    assert trained == int(GOLDEN("trunk8_param_count"))
    weights = weights_of(ensemble)
    by_formula(weights)
    for head in (ensemble.layer.linear.layer, ensemble.layer.linear.others[0], ensemble.joint.linear):
        nn.init.zeros_(head.bias)
    x = (float(GOLDEN("trunk8_x_freq")) * torch.arange(1, 3 * 3 * 32 * 32 + 1, dtype=torch.float64)).sin()
    target = nn.functional.one_hot(GOLDEN("trunk8_y"), 7).double()
    given = Batch(x.view(3, 3, 32, 32), target)
    twin = copy.deepcopy(ensemble)
    heads = twin.heads(given.input)
    for found, name in zip((*heads.branches, heads.joint), ("z1", "z2", "zf"), strict=True):
        equal(found, GOLDEN(f"trunk8_{name}_train"), 1e-8)

    learner = Learner(ensemble, Classify(7), [method], nn.Identity())
    rates = {"lr": float(GOLDEN("lr")), "momentum": float(GOLDEN("momentum")), "nesterov": True}
    optimizer = new_optimizer(learner, partial(torch.optim.SGD, weight_decay=float(GOLDEN("weight_decay")), **rates))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4, float(GOLDEN("weight_decay_fusion"))}
    step = Forward(ensemble, Classify(7), [method], progress=float(GOLDEN("epoch")) / 300)(given)
    loss = torch.stack(list(step.losses.values())).sum()
    equal(loss, GOLDEN("trunk8_loss"), 1e-8)
    loss.backward()
    norms = torch.stack([weight.grad.norm() for weight in weights])
    equal(norms, GOLDEN("trunk8_grad_norms"), 1e-7)
    optimizer.step()
    heads = ensemble.eval().heads(given.input)
    for found, name in zip((*heads.branches, heads.joint), ("z1", "z2", "zf"), strict=True):
        equal(found, GOLDEN(f"trunk8_{name}_eval_after_step"), 1e-7)


# What must be true.


def test_teachers_are_not_taught() -> None:
    branches, last = [GOLDEN.learnt("z1"), GOLDEN.learnt("z2")], GOLDEN.learnt("zf")
    found = mutual_divergences(branches, last, 3.0)
    found["fused_from_ensemble"].backward(retain_graph=True)
    assert [one.grad for one in branches] == [None, None]
    last.grad = None
    (found["branch_1_from_fused"] + found["branch_2_from_fused"]).backward()
    assert last.grad is None


def test_the_ensemble_is_the_mean_of_scores() -> None:
    branches, last = [GOLDEN("z1"), GOLDEN("z2")], GOLDEN("zf")
    mean = (branches[0] + branches[1]) / 2
    expected = softened_divergence(last, mean, 3.0, SHIFT)
    equal(mutual_divergences(branches, last, 3.0)["fused_from_ensemble"], expected)


def test_when_all_agree_next_to_nothing_is_left_to_learn() -> None:
    scores = GOLDEN("agree_z")
    total = sum(mutual_divergences([scores, scores], scores, 3.0).values())
    assert total.item() == pytest.approx(3 * 9 * scores.shape[1] * SHIFT, rel=1e-3)


@pytest.mark.parametrize(("branches", "width", "classes", "count"), [(2, 64, 100, 16228), (3, 16, 10, 1498)])
def test_the_fused_classifier_has_as_many_parameters_as_the_formula_says(
    branches: int, width: int, classes: int, count: int
) -> None:
    module = Fusion([width] * branches, width, classes)
    total = branches * width
    assert sum(p.numel() for p in module.parameters()) == count
    assert count == 9 * total + 2 * total + total * width + 2 * width + width * classes + classes
    assert module.fuse[0].weight.std().item() == pytest.approx((2 / (9 * total)) ** 0.5, rel=0.15)
    assert module.fuse[3].weight.std().item() == pytest.approx((2 / width) ** 0.5, rel=0.15)
    assert int(GOLDEN("fusion_param_count")) == sum(p.numel() for p in fusion().parameters())


def test_networks_may_change_places_if_their_channels_do() -> None:
    module, maps = fusion().eval(), (GOLDEN("f1"), GOLDEN("f2"))
    other = copy.deepcopy(module)
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    for layer in other.fuse[:2]:
        for tensor in (*layer.parameters(), *(one for one in layer.buffers() if one.ndim)):
            tensor.data.copy_(tensor[order])
    other.fuse[3].weight.data.copy_(other.fuse[3].weight[:, order])
    torch.testing.assert_close(fused(module, *maps), fused(other, *reversed(maps)))


def test_two_last_stages_of_resnet32_have_the_papers_number_of_parameters() -> None:
    model = ResNet([5] * 3, [16, 32, 64], classes=100, project=True)
    assert sum(p.numel() for p in model.parameters()) == int(GOLDEN("vanilla32_param_count_100_classes"))
    ensemble = FeatureFusion(branch_at="layer3").prepare(model, Large())
    assert sum(p.numel() for p in ensemble.layer.parameters()) == int(GOLDEN("ffl32_param_count_100_classes"))
    assert sum(p.numel() for p in ensemble.joint.parameters()) == 16228


def test_the_branch_that_ships_answers_as_it_did_among_the_others_and_is_as_large_as_the_network_was() -> None:
    plain, method = resnet32(classes=2), FeatureFusion(branch_at="layer3")
    names = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    ensemble = method.prepare(plain, Large())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ensemble.train()(images)
        expected = ensemble.eval().heads(images).branches[0]
        single = method.finish(ensemble)
        assert type(single) is ResNet
        torch.testing.assert_close(single(images), expected, rtol=0, atol=1e-6)
    assert {name: tensor.shape for name, tensor in single.state_dict().items()} == names
    assert not any(module._forward_hooks for module in single.modules())


def test_maps_of_different_sizes_meet_at_the_smallest_and_the_narrowest() -> None:
    model = ResNet([1, 1, 1], [4, 8, 16], classes=2)
    ensemble = FeatureFusion(peers=[MobileNetV2(2, width=0.25)]).prepare(model, Large())
    assert ensemble.watched == ["layer.layer3", "peers.0.last"]  # 16×8×8 and 1280×4×4
    assert (ensemble.joint.channels, ensemble.joint.width) == ([16, 1280], 16)
    images, seen = torch.randn(3, 3, 32, 32), []
    ensemble.joint.fuse.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        ensemble.eval().heads(images)
        first = model.layer3(model.layer2(model.layer1(model.relu(model.bn1(model.conv1(images))))))
    ((taken, given),) = seen
    assert given.shape == (3, 16, 4, 4)
    torch.testing.assert_close(taken[:, :16], first.view(3, 16, 4, 2, 4, 2).mean((3, 5)))


# The step.


def test_a_step_has_the_losses_of_every_head_by_name() -> None:
    method = FeatureFusion(branch_at="down", teaching_weight=0.5)
    model, given = prepared(method), batch(TinyImages())
    step = method.step(given, Forward(model, classify()))
    assert list(step.losses) == [
        "cross_entropy",
        "cross_entropy_branch_2",
        "cross_entropy_fused",
        "fused_from_ensemble",
        "branch_1_from_fused",
        "branch_2_from_fused",
    ]
    assert step.output.shape == (8, 3)
    heads = copy.deepcopy(model).heads(given.input)
    expected = sum(nn.functional.cross_entropy(one, given.target) for one in (*heads.branches, heads.joint))
    expected = expected + 0.5 * sum(mutual_divergences(heads.branches, heads.joint, 3.0).values())
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.output, heads.branches[0])


def test_the_weight_of_teaching_follows_the_ramp() -> None:
    method = FeatureFusion(branch_at="down", teaching_weight=RampUp(0.5))
    model, given, found = prepared(method).eval(), batch(TinyImages()), []
    for progress in (0.0, 0.25, 1.0):
        model.training = model.layer.down.training = model.layer.head.training = True  # statistics stay
        found.append(method.step(given, Forward(model, classify(), progress=progress)).losses["fused_from_ensemble"])
    assert found[0].item() == pytest.approx(found[2].item() * 0.0067379, rel=1e-4)
    assert found[1].item() == pytest.approx(found[2].item() * 0.2865048, rel=1e-4)


def test_the_fused_losses_teach_the_branches_and_the_trunk() -> None:
    method = FeatureFusion(branch_at="down")
    model = prepared(method)
    step = method.step(batch(TinyImages()), Forward(model, classify()))
    step.losses["cross_entropy_fused"].backward()
    for layer in (model.layer.stem[0], model.layer.down.layer[0], model.layer.down.others[0][0]):
        assert layer.weight.grad.abs().sum() > 0
    assert model.layer.head.layer.weight.grad is None


def test_after_some_steps_branches_differ_and_the_fused_classifier_keeps_up() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [FeatureFusion(branch_at="down")])
    for number in range(24):
        trial.step(number % 6)
    images, target = batch(trial.data).input, trial.batches[0].target.argmax(1)
    with torch.no_grad():
        heads = trial.learner.model.eval().heads(images)
    right = [(one.argmax(1) == target).float().mean().item() for one in (*heads.branches, heads.joint)]
    assert right[2] >= (right[0] + right[1]) / 2 - 0.15
    assert (heads.branches[0] - heads.branches[1]).abs().max() > 1e-3


# With others.


@pytest.mark.parametrize("first", [True, False])
def test_mixing_smoothing_and_a_teacher_see_an_ordinary_network(first: bool) -> None:
    def methods() -> list[Method]:
        lessons = [Similarity(), Attention(1.0, layers=[-2, -1]), Hints(1.0, layers=["pool", -1])]
        others: list[Method] = [CutMix(probability=1.0), LabelSmoothing(), Distill(tiny_network(), lessons)]
        return [FeatureFusion(branch_at="down"), *others] if first else [*others, FeatureFusion(branch_at="down")]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    step = trial.step(0)
    assert step.loss.isfinite()
    assert {"similarity", "cross_entropy_fused", "branch_2_from_fused"} <= step.losses.keys()
    assert step.output.shape == step.batch.target.shape
    expected = nn.functional.cross_entropy(step.output, step.batch.target)
    torch.testing.assert_close(step.losses["cross_entropy"], expected)


def quantize() -> Quantize:
    sides = {"edge_weight": MinMaxWeight(), "edge_input": MinMax(), "stream": MinMax()}
    return Quantize(LSQWeight(4), LSQ(4), **sides)


def test_quantized_branches_resume_bit_for_bit() -> None:
    def start(saved: dict[str, object] | None = None) -> Trial:
        return Trial(
            tiny_network, classify(), TinyImages(), lambda: [quantize(), FeatureFusion(branch_at="down")], saved
        )

    straight = start()
    straight.step(0)
    resumed = start(straight.save())
    for number in (1, 2):
        straight.step(number)
        resumed.step(number)
    state = resumed.learner.state_dict()
    for name, tensor in straight.learner.state_dict().items():
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "method",
    [
        FeatureFusion(branch_at="down"),
        FeatureFusion(branch_at="block", ship_fused=True),
        FeatureFusion(peers=[Tiny(3, 3, width=4)], ship_fused=True),
    ],
    ids=["one branch", "branches fused", "peers fused"],
)
def test_a_quantized_network_trains_ships_and_is_verified(method: FeatureFusion, tmp_path: Path) -> None:
    data = TinyImages()
    model = train(tiny_network(), classify(), data, tmp_path, epochs=2, methods=[quantize(), method])
    image = data.normalize(data.example())
    torch.testing.assert_close(load(tmp_path)(image), model(image), rtol=0, atol=0)
    assert isinstance(model, Ensemble) == method.ship_fused
    trained = Deployed(model, data.normalize, classify()).eval()
    files = {"onnxruntime": onnx.export(trained, data.example(), tmp_path / "model.onnx")}
    if not method.ship_fused:  # the slower of the two engines to convert for
        openvino.export(trained, data.example(), tmp_path / "model.xml")
        files["openvino"] = tmp_path / "model.xml"
    outcome = compare(trained, files, Parts(classify(), TinyImages(), ()), images=48)
    assert outcome["passed"], outcome


def test_a_float_twin_of_what_ships_fused_keeps_its_branches() -> None:
    methods = [quantize(), FeatureFusion(branch_at="down", ship_fused=True)]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    trial.step(0)
    plain = unwrapped(finish(trial.learner))
    assert isinstance(plain, Ensemble)
    assert not any(isinstance(module, QuantLayer) for module in plain.modules())
    assert plain(trial.image()).shape == (2, 3)


def test_what_ships_fused_is_what_is_measured_and_what_other_methods_see() -> None:
    method = FeatureFusion(branch_at="down", ship_fused=True)
    model, given = prepared(method), batch(TinyImages())
    step = method.step(given, Forward(model, classify()))
    assert {"cross_entropy", "cross_entropy_branch_1", "cross_entropy_branch_2"} <= step.losses.keys()
    model.eval()
    torch.testing.assert_close(model(given.input), model.heads(given.input).joint)
    assert method.finish(model) is model


def test_a_moving_average_ships_its_own_branches_and_its_own_fused_classifier(tmp_path: Path) -> None:
    method = FeatureFusion(branch_at="down", ship_fused=True)
    model = train(tiny_network(), classify(), TinyImages(), tmp_path, epochs=1, methods=[method], average=0.9)
    image = TinyImages().normalize(TinyImages().example())
    torch.testing.assert_close(load(tmp_path)(image), model(image))


def test_a_compiled_network_trains_as_it_does_otherwise() -> None:
    found = []
    for compiled in (False, True):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda: [FeatureFusion(branch_at="down")])
        if compiled:
            trial.learner.model.compile(backend="eager")
        found.append([trial.step(number).losses for number in range(2)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)


def test_it_obeys_the_laws() -> None:
    check_method(lambda: FeatureFusion(branch_at="down"))
    check_method(lambda: FeatureFusion(branch_at="block", branches=3, features=["down.1"], teaching_weight=Constant()))
    check_method(lambda: FeatureFusion(peers=[Tiny(3, 3, width=4)]))
    check_method(lambda: FeatureFusion(peers=[Tiny(3, 3, width=4)], ship_fused=True))


def test_a_map_inside_a_branch_is_taken_from_every_branch() -> None:
    outside, inside = (prepared(FeatureFusion(branch_at="down", features=[path])) for path in ("down", "down.2"))
    assert inside.watched == ["layer.down.layer.2", "layer.down.others.0.2"]
    inside.load_state_dict(outside.state_dict())
    images = batch(TinyImages()).input
    torch.testing.assert_close(inside.eval().heads(images).joint, outside.eval().heads(images).joint)


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either branch_at"),
        ({"branch_at": "down", "peers": [nn.Identity()]}, "either branch_at"),
        ({"branch_at": "down", "branches": 1}, "branches is 1; give 2 or more"),
        ({"branch_at": "down", "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureFusion(**arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FeatureFusion(branch_at="dwon"), "no layer 'dwon'; did you mean down"),
        (FeatureFusion(branch_at="block.conv"), "cannot be branched at 'block.conv'"),
        (FeatureFusion(branch_at="down", features=["head"]), "'head' gives no feature map"),
        (FeatureFusion(branch_at="down", features=["stem"]), "comes from before 'down'"),
        (FeatureFusion(branch_at="down", features=["a", "b"]), "features names 2 layers for 1 networks"),
        (FeatureFusion(peers=[Tiny(4, 3, width=4)]), "same classes, but they give 2×3, 2×4"),
        (FeatureFusion(peers=[nn.Sequential(nn.Flatten(), nn.Linear(192, 3))]), "gives a feature map"),
        (FeatureFusion(peers=[timm.create_model("resnet10t", num_classes=3)], ship_fused=True), "cannot write down"),
    ],
)
def test_what_cannot_work_is_refused_before_training(method: FeatureFusion, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(method)


def test_one_method_that_branches_is_enough() -> None:
    with pytest.raises(UserError, match="branched already"):
        FeatureFusion(branch_at="down").prepare(prepared(FeatureFusion(branch_at="down")), TinyImages())


def test_what_ships_fused_is_quantized_before_it_is_branched() -> None:
    with pytest.raises(UserError, match="list Quantize in front of FeatureFusion"):
        Trial(
            tiny_network,
            classify(),
            TinyImages(),
            lambda: [FeatureFusion(branch_at="down", ship_fused=True), quantize()],
        )


def test_in_front_of_quantize_the_branch_that_ships_is_quantized() -> None:
    methods = [FeatureFusion(branch_at="down"), quantize()]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    trial.step(0)
    single = finish(trial.learner)
    assert ensemble_in(single) is None
    assert isinstance(single.head, QuantLayer)


def test_the_summary_tells_what_is_branched() -> None:
    method = FeatureFusion(branch_at="down")
    prepared(method)
    told = str(method.summary())
    assert "2 branches of down, head, which meet in down" in told
