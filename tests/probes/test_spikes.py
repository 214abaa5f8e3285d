"""Counted spikes and earlier answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.data import Data
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.layers import tap
from galago.models.spiking import SpikingNet
from galago.probe import Deployed, TaskMetrics
from galago.probes.spikes import Spikes
from galago.testing import check_probe

LAYERS = ("blocks.0.neurons", "blocks.1.neurons", "output")


def spiking(steps: int = 8) -> SpikingNet:
    torch.manual_seed(3)
    network = SpikingNet(3, 3, 8, (4, 5), steps).eval()
    with torch.no_grad():
        network.bn.weight.mul_(8)  # so that output neurons fire before anything is learned
    return network


def measured(network: nn.Module, probe: Spikes, data: Data | None = None) -> dict[str, float]:
    data = data or TinyImages()
    return probe(Deployed(network, data.normalize, classify()), classify(), data)


def test_every_neurons_spikes_are_counted() -> None:
    network, data, total, images = spiking(), TinyImages(), 0.0, 0
    for batch in data.test():
        for layer in LAYERS:
            with torch.no_grad(), tap(network, layer) as spikes:
                network(data.normalize(batch.input))
            total += sum(float(image.sum()) for image in spikes.value)
        images += len(batch.input)
    found = measured(network, Spikes(), data)
    assert found["spikes_per_image"] == pytest.approx(total / images)
    assert found["firing_rate"] == pytest.approx(total / images / (8 * (4 * 64 + 5 * 16 + 3)))
    assert 0 < found["firing_rate"] < 1


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_an_earlier_answer_is_that_of_the_network_with_fewer_steps(steps: int) -> None:
    network, short, data = spiking(), spiking(steps), TinyImages()
    expected = TaskMetrics()(Deployed(short, data.normalize, classify()), classify(), data)
    found = measured(network, Spikes(steps=[steps]))
    assert found[f"accuracy_after_{steps}_steps"] == pytest.approx(expected["accuracy"])


def test_half_and_a_quarter_of_the_steps_are_measured_unless_others_are_named() -> None:
    names = {"spikes_per_image", "firing_rate"}
    assert measured(spiking(), Spikes()).keys() == names | {"accuracy_after_2_steps", "accuracy_after_4_steps"}
    assert measured(spiking(), Spikes(steps=[])).keys() == names
    assert measured(spiking(1), Spikes()).keys() == names


def test_no_more_images_are_measured_than_asked_for() -> None:
    network, data = spiking(), TinyImages()
    image = torch.cat([batch.input for batch in data.test()])[:11]
    with torch.no_grad(), tap(network, "output") as spikes:
        scores = network(data.normalize(image))
    assert spikes.value.sum() > 0
    found = measured(network, Spikes(steps=[8], images=11), data)
    target = torch.cat([batch.target for batch in data.test()])[:11]
    assert found["accuracy_after_8_steps"] == pytest.approx(
        float((scores.argmax(1) == target.argmax(1)).float().mean())
    )
    with pytest.raises(UserError, match="images is 0"):
        Spikes(images=0)


def test_a_network_that_does_not_spike_has_no_such_numbers() -> None:
    assert measured(tiny_network(), Spikes()) == {}


def test_steps_that_the_network_does_not_run_are_refused() -> None:
    with pytest.raises(UserError, match="steps names 9, but the network runs for 8"):
        measured(spiking(), Spikes(steps=[4, 9]))
    with pytest.raises(UserError, match="steps names 0"):
        Spikes(steps=[0])


def test_no_hook_stays_behind() -> None:
    network = spiking()
    with pytest.raises(UserError):
        measured(network, Spikes(steps=[9]))
    measured(network, Spikes())
    assert not any(module._forward_hooks for module in network.modules())


def test_it_obeys_the_laws_on_networks_that_spike_and_that_do_not() -> None:
    check_probe(Spikes)
    check_probe(Spikes, make_model=spiking, same_on_artifact=False)
