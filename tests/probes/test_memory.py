"""Peak memory against networks that need a known amount."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.models.tiny import tiny
from galago.probe import Deployed
from galago.probes import memory
from galago.probes.memory import PeakMemory
from galago.tasks.classify import Classify
from galago.testing import check_probe

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process reset its peak"
)


class Hungry(nn.Module):
    """Needs so many megabytes of activations for each image, for a moment, and some of weights."""

    def __init__(self, activations: int, weights: int = 0) -> None:
        super().__init__()
        self.activations = activations
        self.register_buffer("weights", torch.ones(weights * 250_000))

    def forward(self, x: Tensor) -> Tensor:
        held = torch.ones(len(x), self.activations * 250_000)
        return held.sum(1, keepdim=True)


class Images:
    """Data of which only the example is asked."""

    def example(self) -> Tensor:
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


def measured(network: nn.Module, batch_size: int = 1) -> float:
    found = PeakMemory(batch_size)(Deployed(network, nn.Identity(), Classify(10)), Classify(10), Images())  # type: ignore[arg-type]
    return found["peak_memory_mb"]


@linux
@pytest.mark.parametrize("megabytes", [50, 200])
def test_activations_are_counted_although_they_are_gone_afterwards(megabytes: int) -> None:
    assert measured(Hungry(megabytes)) == pytest.approx(megabytes, abs=8)


@linux
def test_weights_are_counted_once_more() -> None:
    assert measured(Hungry(20, weights=100)) == pytest.approx(120, abs=8)


@linux
def test_a_larger_batch_needs_more() -> None:
    assert measured(Hungry(25), batch_size=4) == pytest.approx(100, abs=8)


@linux
def test_a_second_measurement_finds_the_same() -> None:
    network = Hungry(60)
    assert measured(network) == pytest.approx(measured(network), abs=8)


def test_a_system_without_a_peak_to_reset_gives_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nowhere")
    deployed = Deployed(tiny(width=4), Normalize([0.5], [0.5]), Classify(10))
    assert PeakMemory()(deployed, Classify(10), Images()) == {}  # type: ignore[arg-type]


def test_no_images_are_refused_with_advice() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        PeakMemory(0)


def test_the_laws_of_probes_hold() -> None:
    check_probe(PeakMemory, repeatable=False, same_on_artifact=False)


@linux
def test_a_file_is_opened_once_more(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 100_000, bias=False), nn.Linear(100_000, 10, bias=False))
    deployed = Deployed(network.eval(), Normalize([0.5], [0.5]), Classify(10)).eval()
    export(deployed, Images().example(), tmp_path / "model.onnx")
    found = PeakMemory()(OnnxRuntime(tmp_path / "model.onnx", threads=1), Classify(10), Images())  # type: ignore[arg-type]
    assert found["peak_memory_mb"] > 29.6  # the weights alone
