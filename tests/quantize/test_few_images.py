"""FewImages: blocks that learn alone do not see one another, both stages help, and BatchNorm keeps its statistics."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.batch import Batch
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.few_images import FewImages, calibration, divergence, gathered
from galago.quantize.group_wise import GroupWiseWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.reconstruction import error, float_copy, learning, mending, walk
from galago.quantize.units import units
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.train import train
from samples import Stripes

CPU = torch.device("cpu")


def quantized(data: Stripes, weight_bits: int = 3, input_bits: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = Tiny(2, 3, width=6)
    model(images_of(data))  # statistics of BatchNorm
    method = Quantize(GroupWiseWeight(weight_bits, groups=2), LSQ(input_bits), stream=MinMax(8), batches=3)
    return method.prepare(model, data).eval()


def images_of(data: Stripes) -> Tensor:
    return data.normalize(torch.cat([batch.input for batch in data.train()]))


def short(**options) -> FewImages:
    return FewImages(**{"iterations": 30, "batches": 3, "rate": 3e-3, **options})


def test_the_loss_of_a_block_has_no_gradient_in_another(stripes: Stripes) -> None:
    model, images = quantized(stripes), images_of(stripes)
    with mending(model, 0):
        teacher, sequence = float_copy(model), units(model, images[:1])
        for unit, features in walk(teacher, teacher, sequence, images):
            with learning([*model.parameters()]):
                (unit.parts(model)(features.given) - features.target).square().mean().backward()
                reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert reached
            assert all(any(name.startswith(f"{path}.") for path in unit.paths) for name in reached)


def test_blocks_in_any_order_learn_the_same(stripes: Stripes) -> None:
    states = []
    for order in (1, -1):
        model, images, method = quantized(stripes), images_of(stripes), short(iterations=5)
        with mending(model, 0):
            sequence = units(model, images[:1])[::order]
            method.learn_alone(model, float_copy(model), sequence, images, seed=3)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("sequential", [False, True])
def test_after_the_first_stage_no_blocks_error_is_larger(stripes: Stripes, sequential: bool) -> None:
    model, images, method = quantized(stripes), images_of(stripes), short(sequential=sequential)
    with mending(model, 0):
        teacher, sequence = float_copy(model), units(model, images[:1])
        before = {u.name: error(model, u, f) for u, f in walk(teacher, teacher, sequence, images)}
        errors = method.learn_alone(model, teacher, sequence, images, 0)
        after = {u.name: error(model, u, f) for u, f in walk(teacher, teacher, sequence, images)}
    assert [*errors] == [*before]
    assert all(one.after <= one.before for one in errors.values())
    if not sequential:
        assert {name: one.after for name, one in errors.items()} == pytest.approx(after, rel=1e-4)
    assert sum(after.values()) < 0.8 * sum(before.values())


def test_after_the_second_stage_answers_are_closer_to_those_in_float(stripes: Stripes) -> None:
    model, images, method = quantized(stripes), images_of(stripes), short()
    batch = calibration(stripes, None, 3, CPU)
    assert torch.equal(batch.input, images)
    with mending(model, 0):
        teacher, sequence = float_copy(model), units(model, images[:1])
        method.learn_alone(model, teacher, sequence, images, 0)
        first = method.divergence_on(model, teacher, images)
        errors = method.learn_together(model, teacher, sequence, batch)
        assert errors.before == pytest.approx(first, rel=1e-4)
        assert method.divergence_on(model, teacher, images) == pytest.approx(errors.after, rel=1e-4)
    assert errors.after <= errors.before
    assert "before the joint stage" in str(method.summary())


def test_at_8_bits_outputs_stay_within_the_noise_of_rounding(stripes: Stripes) -> None:
    model, images = quantized(stripes, 8, 8), images_of(stripes)
    teacher = float_copy(model)
    with torch.no_grad():
        noise = (model(images) - teacher(images)).square().mean()
        FewImages(iterations=20, batches=3).prepare(model, stripes)
        assert (model(images) - teacher(images)).square().mean() < 2 * noise + 1e-8


def test_batch_normalization_keeps_its_statistics_and_weights_scales_and_shifts_learn(stripes: Stripes) -> None:
    model = quantized(stripes).train()
    before = copy.deepcopy(model.state_dict())
    short(iterations=3).prepare(model, stripes)
    statistics = [n for n in before if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) == 12
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in statistics)
    assert all(module.training for module in model.modules() if isinstance(module, _BatchNorm))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert {"weight", "bias", "step"} <= changed


def test_either_stage_can_be_left_out(stripes: Stripes) -> None:
    states = {}
    for independent, joint in ((True, True), (True, False), (False, True), (False, False)):
        model, method = quantized(stripes), short(iterations=3, independent=independent, joint=joint)
        before = copy.deepcopy(model.state_dict())
        method.prepare(model, stripes)
        states[independent, joint] = torch.cat([tensor.float().flatten() for tensor in model.state_dict().values()])
        said = method.summary() or ""
        assert ("blocks learned" in said, "joint stage" in said) == (independent, joint)
        if not independent and not joint:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(states[True, False], states[False, True])


def test_the_joint_loss_is_the_sum_of_its_parts(stripes: Stripes) -> None:
    model, method = quantized(stripes), short(temperature=3.0, answers=0.5, features=2.0, labels=0.25)
    batch = calibration(stripes, None, 1, CPU)
    with mending(model, 0), torch.no_grad():
        teacher, sequence = float_copy(model), units(model, batch.input[:1])
        found = method.joint_loss(model, teacher, sequence, batch)
        z, target = model(batch.input), teacher(batch.input)
        p, q = (target / 3).softmax(1), (z / 3).softmax(1)
        expected = 0.5 * 9 * (p * (p / q).log()).sum(1).mean()
        with gathered(model, sequence) as own, gathered(teacher, sequence) as wanted:
            model(batch.input)
            teacher(batch.input)
        assert len(own) == len(wanted) == 4
        expected += 2.0 * sum((a - b).square().mean() / b.square().mean() for a, b in zip(own, wanted, strict=True))
        expected -= 0.25 * (batch.target * z.log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_divergence_is_that_of_softened_probabilities_in_float64() -> None:
    z, target = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    p, q = (target / 4).softmax(1), (z / 4).softmax(1)
    assert divergence(z, target, 4.0).item() == pytest.approx(16 * (p * (p / q).log()).sum().item() / 7, rel=1e-12)
    assert divergence(z, z, 4.0).item() == 0


def test_a_few_images_of_each_class_or_whole_batches() -> None:
    data = Stripes(images=48, batch_size=16)
    few = calibration(data, 5, 8, CPU)
    assert few.target.sum(0).tolist() == [5, 5]
    assert calibration(data, 1000, 8, CPU).input.shape[0] == 48
    whole = calibration(data, None, 2, CPU)
    first = [batch.input for batch in data.train()][:2]
    assert torch.equal(whole.input, data.normalize(torch.cat(first)))


def test_more_batches_than_an_epoch_has_come_from_the_next_ones() -> None:
    data = Stripes(images=32, batch_size=16)
    many = calibration(data, None, 5, CPU)
    expected = [batch.input for epoch in range(3) for batch in data.train(epoch)][:5]
    assert torch.equal(many.input, data.normalize(torch.cat(expected)))


def test_no_images_at_all_are_an_error_in_plain_words() -> None:
    class Empty(Stripes):
        def train(self, epoch: int = 0, start: int = 0) -> list[Batch]:
            return []

    for images in (None, 3):
        with pytest.raises(UserError, match="no training batch"):
            calibration(Empty(), images, 2, CPU)


def test_a_resumed_run_does_not_learn_again_and_random_numbers_are_as_before(stripes: Stripes) -> None:
    model, method, state = quantized(stripes), short(iterations=2), torch.get_rng_state()
    torch.set_rng_state(state)
    method.prepare(model, stripes)
    assert torch.equal(torch.get_rng_state(), state)
    again, fresh = short(), quantized(stripes)
    again.load_state_dict(method.state_dict())
    before = copy.deepcopy(fresh.state_dict())
    again.prepare(fresh, stripes)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_a_distilled_network_exports_and_is_verified(tmp_path: Path, stripes: Stripes) -> None:
    methods = [Quantize(GroupWiseWeight(4), LSQ(4), stream=MinMax(8)), short(iterations=5)]
    model = Tiny(2, 3, width=6)
    model(images_of(stripes))  # statistics of BatchNorm
    model = train(model, Classify(2), stripes, tmp_path, epochs=0, methods=methods)
    trained = Deployed(model, stripes.normalize, Classify(2)).eval()
    path = onnx.export(trained, stripes.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(Classify(2), stripes, ()), images=32)
    assert outcome["passed"], outcome


def test_trained_on_from_there_it_obeys_the_laws_of_a_method() -> None:
    def network() -> nn.Module:
        model = tiny_network()
        model.stem[0] = QuantLayer(model.stem[0], LSQWeight(4), LSQ(8, signed=True))
        model.stem[0].observe(torch.randn(4, 3, 8, 8))
        return model

    check_method(lambda: FewImages(iterations=2, batches=1), make_model=network)


def test_a_float_network_is_refused(stripes: Stripes) -> None:
    with pytest.raises(UserError, match="behind Quantize"):
        FewImages().prepare(Tiny(2, 3), stripes)


@pytest.mark.parametrize("name", ["iterations", "images", "batches", "batch_size"])
def test_numbers_that_make_no_sense_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"FewImages: {name} is 0"):
        FewImages(**{name: 0})
