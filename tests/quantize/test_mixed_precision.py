"""A width for each layer: measured as it should be, the best choice, and what becomes of a network that has it."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.method import Method
from galago.probe import Deployed
from galago.probes.cost import Cost
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.mixed_precision import MixedPrecision, of_width
from galago.quantize.quantize import Quantize
from galago.quantize.rest import rest, rests
from galago.quantize.sensitivity import divergence, known, original, rounded
from galago.quantize.stat_assist import StatAssist
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from samples import SmallNet, Stripes


class Deeper(SmallNet):
    """Four convolutions and a linear layer."""

    def __init__(self, classes: int = 2, width: int = 7) -> None:
        super().__init__(classes, width)
        self.middle = nn.Sequential(
            nn.Conv2d(width, 9, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(9, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.middle(x) + self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))


def prepared(method: MixedPrecision, model: nn.Module | None = None, first: Quantize | None = None) -> nn.Module:
    data = Stripes()
    if model is None:
        torch.manual_seed(0)
        model = Deeper()
    return method.prepare((first or quantize()).prepare(model, data), data)


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (layer.weight_quantizer.bits, layer.input_quantizer.bits)
        for path, _, layer in original(model)
        if layer is not None
    }


def cost(model: nn.Module) -> dict[str, float]:
    data = Stripes()
    return Cost()(Deployed(model, data.normalize, Classify(2)), Classify(2), data)


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("mean", [4.5, 6.5])
def test_the_choice_is_the_best_of_all_that_the_budget_of_size_allows(mean: float, edges: bool) -> None:
    method = MixedPrecision(mean_weight_bits=mean, widths=(2, 4, 8), edges=edges)
    model = prepared(method)
    found = cost(model)
    assert found["mean_weight_bits"] <= mean + 1e-9
    sizes = {path: layer.layer.weight.numel() for path, _, layer in original(model) if layer is not None}
    fixed = sum(8 * size for path, size in sizes.items() if path not in method.chosen)
    losses = {row[0]: dict(zip((2, 4, 8), row[4:], strict=True)) for row in method.rows}
    best = min(
        sum(losses[path][bits] for path, bits in zip(losses, choice, strict=True))
        for choice in product((2, 4, 8), repeat=len(losses))
        if fixed + sum(sizes[path] * bits for path, bits in zip(losses, choice, strict=True))
        <= mean * sum(sizes.values())
    )
    assert sum(losses[path][bits] for path, bits in method.chosen.items()) == pytest.approx(best, rel=1e-12)
    assert {path: (bits, bits) for path, bits in method.chosen.items()}.items() <= widths(model).items()


def test_a_budget_of_bit_operations_is_kept_as_the_cost_probe_counts_them() -> None:
    for mean in (10.0, 20.0):
        model = prepared(MixedPrecision(mean_bit_operations=mean, edges=True, widths=(2, 3, 8)))
        found = cost(model)
        assert found["bops"] / found["macs"] <= mean
        assert found["bops"] / found["macs"] > 0.5 * mean


def test_the_more_may_be_spent_the_less_is_lost() -> None:
    lost = []
    for mean in (2.0, 3.0, 5.0, 8.0):
        method = MixedPrecision(mean_weight_bits=mean, edges=True, widths=(2, 4, 8))
        prepared(method)
        lost.append(sum(row[4 + method.widths.index(row[3])] for row in method.rows))
    assert lost == sorted(lost, reverse=True)
    assert set(method.chosen.values()) <= {4, 8}


def test_losses_are_those_of_the_layer_alone_rounded_to_the_nearest() -> None:
    data = Stripes()
    torch.manual_seed(0)
    model = quantize().prepare(Deeper(), data).eval()
    rest(model)
    images = data.normalize(data.train()[0].input)
    layers = {path: layer for path, _, layer in original(model) if layer is not None}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        y = model(images)
        fact = known(model, layers, images)["conv2"]
        given = model.relu1(model.bn1(model.conv1(images)))
        for bits in (2, 4, 8):
            with rounded(fact, bits, inputs=False):
                weight = model.conv2.weight.detach().clone()
                moved = divergence(y, model(images))
            assert all(len(channel.unique()) <= 2**bits for channel in weight)
            with rounded(fact, bits, inputs=True):
                both = divergence(y, model(images))
                seen = []
                handle = layers["conv2"].layer.register_forward_hook(
                    lambda m, args, out, seen=seen: seen.append(args[0])
                )
                model(images)
                handle.remove()
            assert len(seen[0].unique()) <= 2**bits
            assert (seen[0] - given).abs().mean() < given.abs().mean() / 2**bits
            assert both >= 0
            assert moved >= 0
        assert divergence(y, model(images)) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_and_multiplications_are_those_of_the_cost_probe() -> None:
    method = MixedPrecision(mean_weight_bits=8, edges=True, widths=[4])
    model = prepared(method)
    found = cost(model)
    assert sum(row[2] for row in method.rows) == found["macs"]
    assert sum(row[1] for row in method.rows) == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_divergence_is_of_distributions_and_of_values_where_there_is_one_column() -> None:
    y = torch.randn(20, 5, 3)
    assert divergence(y, y + 3) == pytest.approx(0, abs=1e-12)  # scores that differ by a constant say the same
    p, q = y.double().softmax(1), (2 * y).double().softmax(1)
    assert divergence(y, 2 * y) == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-6)
    assert divergence(torch.ones(4, 1), torch.full((4, 1), 1.5)) == pytest.approx(0.25)


def test_edges_and_what_is_kept_keep_their_width_by_the_networks_own_names() -> None:
    model = prepared(MixedPrecision(mean_weight_bits=8, keep=["middle.*"], widths=[3]))
    found = widths(model)
    assert found == {"conv1": (8, 8), "conv2": (3, 3), "middle.0": (4, 4), "middle.2": (4, 4), "fc": (8, 8)}
    model = prepared(MixedPrecision(mean_weight_bits=8, keep=["Linear"], widths=[3], edges=True))
    assert widths(model) == dict.fromkeys(("conv1", "conv2", "middle.0", "middle.2"), (3, 3)) | {"fc": (8, 8)}


def test_inputs_may_keep_the_width_they_have() -> None:
    model = prepared(MixedPrecision(mean_weight_bits=4, inputs=False, widths=[2], edges=True))
    assert {weight for weight, _ in widths(model).values()} == {2}
    own = {path: own for path, (_, own) in widths(model).items()}
    assert own == {"conv1": 8, "conv2": 4, "middle.0": 4, "middle.2": 4, "fc": 8}


def test_layers_without_input_quantizers_are_chosen_for_too() -> None:
    method = MixedPrecision(mean_weight_bits=3, edges=True)
    model = prepared(method, first=Quantize(LSQWeight(4)))
    assert all(layer.input_quantizer is None for layer in model.modules() if isinstance(layer, QuantLayer))
    assert cost(model)["mean_weight_bits"] <= 3


def test_the_network_and_the_random_state_are_left_alone_but_for_quantizers() -> None:
    data = Stripes()
    torch.manual_seed(0)
    model = quantize().prepare(Deeper(), data).train()
    model.middle.eval()
    plain = {n: t.clone() for n, t in model.state_dict().items() if "quantizer" not in n}
    modes = {n: m.training for n, m in model.named_modules() if "quantizer" not in n}
    state = torch.get_rng_state()
    model = MixedPrecision(mean_weight_bits=5).prepare(model, data)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == {n: m.training for n, m in model.named_modules() if "quantizer" not in n}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.items())
    assert not rests(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("post_training", [False, True])
def test_choosing_the_width_that_layers_have_leaves_what_quantize_made(post_training: bool) -> None:
    torch.manual_seed(0)
    network, data = Deeper(), Stripes()
    first = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8), post_training=post_training)
    plain = first.prepare(copy.deepcopy(network), data)
    method = MixedPrecision(mean_weight_bits=8, widths=[4], post_training=post_training)
    model = method.prepare(first.prepare(copy.deepcopy(network), data), data)
    assert method.chosen == dict.fromkeys(("conv2", "middle.0", "middle.2"), 4)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_ranges_are_set_for_the_new_widths() -> None:
    model = prepared(MixedPrecision(mean_weight_bits=8, widths=[2]))
    first = {path: layer for path, _, layer in original(model) if layer is not None}["conv2"]
    torch.testing.assert_close(first.weight_quantizer.step, 2 * first.layer.weight.detach().abs().mean((1, 2, 3)))
    assert first.input_quantizer.step != 1
    assert first.input_quantizer.signed is False


def test_the_choice_is_the_same_every_time_and_told_in_a_table() -> None:
    methods = [MixedPrecision(mean_weight_bits=5, widths=(2, 4)) for _ in range(2)]
    models = [prepared(method) for method in methods]
    assert methods[0].chosen == methods[1].chosen
    assert widths(models[0]) == widths(models[1])
    shown = methods[0].summary()
    assert shown.row_count == 3
    assert "mean_weight_bits" in shown.caption
    assert MixedPrecision(mean_weight_bits=5).summary() is None


def test_on_resume_the_widths_of_before_are_rebuilt_without_measuring(monkeypatch) -> None:
    def methods() -> list[Method]:
        return [quantize(), MixedPrecision(mean_weight_bits=5, widths=(2, 3, 8))]

    first = Trial(Deeper, Classify(2), Stripes(), methods)
    first.step(0)
    saved = first.save()
    monkeypatch.setattr("galago.quantize.mixed_precision.rounded", None)
    again = Trial(Deeper, Classify(2), Stripes(), methods, saved)
    assert widths(again.learner.model) == widths(first.learner.model)
    assert again.learner.ideas[1].outcome == first.learner.ideas[1].outcome
    assert torch.equal(first.step(1).loss, again.step(1).loss)


def test_it_waits_while_layers_rest() -> None:
    data = Stripes()
    torch.manual_seed(0)
    model = StatAssist().prepare(quantize().prepare(Deeper(), data), data)
    method = MixedPrecision(mean_weight_bits=5, widths=(2, 4))
    method.prepare(model, data)
    assert all(part.resting is not None for part in model.modules() if isinstance(part, QuantLayer))
    awake = MixedPrecision(mean_weight_bits=5, widths=(2, 4))
    prepared(awake)
    assert method.chosen == awake.chosen


def test_a_network_with_different_widths_trains_exports_and_is_verified(tmp_path) -> None:
    data, task = Stripes(batch_size=8), Classify(2)
    method = MixedPrecision(mean_weight_bits=4.5, widths=(2, 3, 5, 8))
    model = train(Deeper(), task, data, tmp_path, epochs=3, methods=[quantize(), method])
    assert len(set(widths(model).values())) >= 3
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


def test_a_fresh_quantizer_has_the_arguments_of_the_old_one() -> None:
    made = of_width(LSQ(4, signed=True, count_batch=True), 6)
    assert (made.bits, made.signed, made.count_batch) == (6, True, True)
    assert of_width(LSQWeight(4, per_channel=False).eval(), 3).training is False


def quantized_tiny_network() -> nn.Module:
    return quantize().prepare(tiny_network(), TinyImages())


def test_it_obeys_the_laws_of_a_method() -> None:
    check_method(
        lambda: MixedPrecision(mean_weight_bits=4, widths=(3, 5), edges=True), make_model=quantized_tiny_network
    )


@pytest.mark.parametrize("weight", [EWGSWeight(4), LSQWeight(4, per_channel=False)])
def test_other_quantizers_get_widths_and_train(weight) -> None:
    def methods() -> list[Method]:
        first = Quantize(weight, EWGS(4), stream=MinMax(8))
        return [first, MixedPrecision(mean_weight_bits=4, widths=(3, 4), edges=True)]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    assert trial.step(0).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "one budget"),
        ({"mean_weight_bits": 4, "mean_bit_operations": 16}, "one budget"),
        ({"mean_weight_bits": 4, "widths": []}, r"widths is \[\]"),
        ({"mean_weight_bits": 4, "widths": [1, 4]}, r"widths is \[1, 4\]"),
        ({"mean_weight_bits": 4, "widths": [4, 9]}, r"widths is \[4, 9\]"),
        ({"mean_weight_bits": 4, "batches": 0}, "batches is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(options, text) -> None:
    with pytest.raises(UserError, match=text):
        MixedPrecision(**options)


@pytest.mark.parametrize("name", ["mean_weight_bits", "mean_bit_operations"])
def test_a_budget_that_cannot_be_met_names_the_least_that_can(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 1, but .* the least is") as raised:
        prepared(MixedPrecision(widths=(2, 4), **{name: 1}))
    least = float(str(raised.value).rpartition(" ")[2])
    assert set(prepared_widths(name, least)) == {2}
    with pytest.raises(UserError, match="the least is"):
        prepared(MixedPrecision(widths=(2, 4), **{name: least - 0.002}))


def prepared_widths(name: str, mean: float) -> list[int]:
    method = MixedPrecision(widths=(2, 4), **{name: mean})
    prepared(method)
    return list(method.chosen.values())


def test_a_network_that_is_not_quantized_or_has_nothing_to_choose_is_refused() -> None:
    with pytest.raises(UserError, match="behind Quantize"):
        MixedPrecision(mean_weight_bits=4).prepare(Deeper(), Stripes())
    with pytest.raises(UserError, match="no layer whose width it may choose"):
        prepared(MixedPrecision(mean_weight_bits=4, keep=["Conv2d"]))
    with pytest.raises(UserError, match="matches no layer"):
        prepared(MixedPrecision(mean_weight_bits=4, keep=["convolution"]))
