"""What each layer's rounding costs, alone and as the only one left out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.layers import swap
from galago.measure import measure_run
from galago.models.tiny import Tiny
from galago.probe import Deployed, Probe, spread
from galago.probes.sensitivity import Sensitivity, are_probabilities, decibels, divergence
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.plan import initialize
from galago.quantize.rest import rest, wake
from galago.run import Run
from galago.task import Task
from galago.tasks.abstain import ClassifyOrAbstain
from galago.tasks.classify import Classify
from galago.testing import check_probe
from galago.train import train


def quantized_network(bits: tuple[int, ...] = (8, 2, 8), streams: bool = True) -> nn.Module:
    """The laws' network with layers of these widths, and a stream behind its first ReLU."""
    model, data = tiny_network(), TinyImages()
    kinds = (nn.Conv2d, nn.Linear)
    layers = [(path, one) for path, one in model.named_modules() if isinstance(one, kinds)]
    for (path, layer), width in zip(layers, bits, strict=False):
        model = swap(model, path, QuantLayer(layer, MinMaxWeight(width), MinMax(width)))
    if streams:
        path, layer = next((path, one) for path, one in model.named_modules() if isinstance(one, nn.ReLU))
        model = swap(model, path, QuantOutput(layer, MinMax(8)))
    initialize(model, data.normalize(data.train()[0].input))
    return model.eval()


def table(model: nn.Module, images: int = 48) -> dict[str, Any]:
    data = TinyImages()
    return Sensitivity(images).table(Deployed(model, data.normalize, classify()), classify(), data)


def seen() -> Tensor:
    data = TinyImages()
    return data.normalize(torch.cat([batch.input for batch in data.validation()]))


@torch.no_grad()
def output(model: nn.Module, awake: list[nn.Module]) -> Tensor:
    """The same by hand: everything at rest but these."""
    rest(model)
    for part in awake:
        part.resting = None
    found = model(seen()).double()
    wake(model)
    return found


def test_alone_and_all_but_it_are_what_they_say() -> None:
    torch.manual_seed(0)
    model = quantized_network()
    found = table(model)
    layers = {path: one for path, one in model.named_modules() if isinstance(one, QuantLayer)}
    streams = [one for one in model.modules() if isinstance(one, QuantOutput)]
    assert [row["path"] for row in found["layers"]] == [*layers, "streams"]
    everything = [*layers.values(), *streams]
    plain = output(model, [])
    for row in found["layers"]:
        own = streams if row["path"] == "streams" else [layers[row["path"]]]
        others = [part for part in everything if part not in own]
        for name, awake in (("alone", own), ("all_but", others)):
            noise = (output(model, awake) - plain).square()
            assert row[name]["mse"] == pytest.approx(noise.mean().item(), rel=1e-6)
            assert row[name]["db"] == pytest.approx(10 * math.log10(plain.square().sum() / noise.sum()), rel=1e-6)
    assert found["all"]["mse"] == pytest.approx((output(model, everything) - plain).square().mean().item(), rel=1e-6)
    assert found["float"]["mse"] == 0
    assert found["float"]["kl"] == 0


def test_the_layer_with_the_fewest_bits_costs_most_alone_and_its_absence_saves_most() -> None:
    torch.manual_seed(0)
    rows = table(quantized_network((8, 2, 8)))["layers"]
    alone, all_but = ([row[name]["kl"] for row in rows] for name in ("alone", "all_but"))
    assert max(range(len(rows)), key=alone.__getitem__) == 1
    assert min(range(len(rows)), key=all_but.__getitem__) == 1
    assert rows[1]["snr_db"] < rows[0]["snr_db"] - 10
    assert rows[-1]["snr_db"] is None
    assert (rows[1]["type"], rows[1]["weight_bits"], rows[1]["input_bits"]) == ("Conv2d", 2, 2)


def test_signal_to_noise_of_a_layer_is_that_of_its_own_output_on_float_inputs() -> None:
    torch.manual_seed(0)
    model = quantized_network(streams=False)
    rows = {row["path"]: row["snr_db"] for row in table(model)["layers"]}
    path, layer = next((p, one) for p, one in model.named_modules() if isinstance(one, QuantLayer))
    with torch.no_grad():
        y, y_hat = layer.layer(seen()).double(), layer(seen()).double()
    assert rows[path] == pytest.approx(10 * math.log10(y.square().sum() / (y_hat - y).square().sum()), rel=1e-6)


def test_divergence_is_none_for_equals_and_grows() -> None:
    p = torch.randn(50, 7).softmax(1)
    assert divergence(p, p) == 0
    reference = (p * (p / p.roll(1, 1)).log()).sum(1).mean()
    assert divergence(p, p.roll(1, 1)) == pytest.approx(reference.item(), rel=1e-5)
    assert math.isfinite(divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])))


def test_decibels_stay_finite() -> None:
    assert decibels(0.0, 0.0) == 300
    assert decibels(1.0, 100.0) == pytest.approx(-20)


def test_what_is_no_distribution_has_no_divergence() -> None:
    assert are_probabilities(torch.randn(3, 5, 4, 4).softmax(1))
    assert not are_probabilities(torch.randn(3, 5).sigmoid())
    assert not are_probabilities(torch.zeros(3))
    assert not are_probabilities({"boxes": torch.zeros(3, 4)})


class Depth(Classify):
    """Three numbers an image, which are no probabilities."""

    def decode(self, output: Any) -> Tensor:
        return output


def test_without_probabilities_there_is_the_squared_error() -> None:
    data, model = TinyImages(), quantized_network()
    task = Depth(3)
    numbers = Sensitivity(8)(Deployed(model, data.normalize, task), task, data)
    assert numbers.keys() == {"quantization_db"}
    rows = Sensitivity(8).table(Deployed(model, data.normalize, task), task, data)["layers"]
    assert all("kl" not in row["alone"] and row["alone"]["mse"] > 0 for row in rows)


@pytest.mark.parametrize("images", [1, 7, 20, 25, 44, 50, 1000])
@pytest.mark.parametrize("last", [10, 4])
def test_images_are_spread_over_the_whole_set(images: int, last: int) -> None:
    numbers = torch.arange(40.0 + last).split([10, 10, 10, 10, last])
    chosen = torch.cat([batch.input for batch in spread([Batch(part, part) for part in numbers], images)])
    whole = min(images, 40 + last)
    assert len(chosen) == whole if last == 10 else 0.85 * whole <= len(chosen) <= whole
    assert chosen[0] == 0
    assert len(chosen) == 1 or chosen.diff().max() <= math.ceil(50 / images)
    assert len(chosen) == 1 or chosen[-1] >= 39 + last - math.ceil(50 / images)


def test_numbers_of_the_whole_are_those_of_the_table() -> None:
    data, model = TinyImages(), quantized_network()
    deployed = Deployed(model, data.normalize, classify())
    numbers = Sensitivity(48)(deployed, classify(), data)
    everything = Sensitivity(48).table(deployed, classify(), data)["all"]
    assert numbers == {"quantization_kl": everything["kl"], "quantization_db": everything["db"]}


def test_a_float_network_has_nothing_to_tell() -> None:
    assert table(tiny_network()) == {}


class Everything(Probe):
    """The whole table as numbers, to hold it to the laws."""

    def __call__(self, deployed: nn.Module, task: Task, data: TinyImages) -> dict[str, float]:
        found = Sensitivity(20).table(deployed, task, data)
        rows = {row["path"]: row for row in found.get("layers", [])}
        return {
            f"{path} {side} {name}": value
            for path, row in rows.items()
            for side in ("alone", "all_but")
            for name, value in row[side].items()
        }


def partly_resting() -> nn.Module:
    model = quantized_network()
    next(one for one in model.modules() if isinstance(one, QuantLayer)).resting = torch.ones(())
    return model


@pytest.mark.parametrize("make", [tiny_network, quantized_network, partly_resting])
def test_the_laws_of_probes_hold_for_numbers_and_table(make) -> None:
    plain = make is tiny_network
    for probe in (Sensitivity, Everything):
        check_probe(probe, make_model=make, same_on_artifact=plain)


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="images is 0"):
        Sensitivity(0)


def test_measuring_a_run_that_lists_it_writes_its_table(tmp_path) -> None:
    from galago.quantize.quantize import Quantize

    data, task = Digits(batch_size=64), Classify(10)
    quantize = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))
    probes = [Sensitivity(64)]
    train(Tiny(width=4), task, data, tmp_path, epochs=0, methods=[quantize], probes=probes)
    assert not (tmp_path / "sensitivity.json").exists()
    numbers = measure_run(tmp_path)
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    assert abs(found["images"] - 64) <= 4
    assert numbers["quantization_kl"] == found["all"]["kl"]
    layers = [row["path"] for row in json.loads((tmp_path / "layers.json").read_text())]
    assert [row["path"] for row in found["layers"]] == [*layers, "streams"]
    assert Run(tmp_path).finished


def test_the_divergence_of_a_network_that_may_abstain_counts_what_it_holds_back() -> None:
    torch.manual_seed(0)
    model, data = quantized_network(), TinyImages()
    tasks: list[Task] = [classify(), ClassifyOrAbstain(2)]
    first, second = (Sensitivity(48)(Deployed(model, data.normalize, task), task, data) for task in tasks)
    assert second["quantization_kl"] == pytest.approx(first["quantization_kl"])
