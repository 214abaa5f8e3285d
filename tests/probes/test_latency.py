"""Timing: what is counted, turns, ratios, threads."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.models.tiny import tiny
from galago.probe import Deployed
from galago.probes.latency import Latency, Timing, compare, with_threads
from galago.tasks.classify import Classify
from galago.testing import check_probe

IMAGE = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)


class Sleeper(nn.Module):
    """Takes a known time; notes each call in a diary that may be shared."""

    def __init__(self, milliseconds: float, diary: list[float]) -> None:
        super().__init__()
        self.milliseconds, self.diary = milliseconds, diary

    def forward(self, x: Tensor) -> Tensor:
        self.diary.append(self.milliseconds)
        end = time.perf_counter() + self.milliseconds / 1000
        while time.perf_counter() < end:
            pass
        return x


def test_a_known_time_is_found() -> None:
    timing = compare({"it": Sleeper(1.0, [])}, IMAGE, repeats=20, seconds=0)["it"]
    assert 1.0 <= timing.p10_ms <= timing.median_ms <= timing.p90_ms
    assert timing.p10_ms < 1.5
    assert timing.images_per_second == pytest.approx(2000 / timing.median_ms)


def test_percentiles_are_those_of_numpy() -> None:
    timing = Timing(np.arange(1.0, 102.0), images=1)
    assert (timing.p10_ms, timing.median_ms, timing.p90_ms) == (11, 51, 91)


def test_networks_take_turns_and_warm_up_uncounted() -> None:
    diary: list[float] = []
    found = compare({"a": Sleeper(0.1, diary), "b": Sleeper(0.2, diary)}, IMAGE, repeats=8, seconds=0)
    assert [len(timing.runs) for timing in found.values()] == [8, 8]
    assert diary == [0.1] * 10 + [0.2] * 10 + 2 * ([0.1] * 5 + [0.2] * 5)


def test_at_least_the_given_time_is_spent() -> None:
    start = time.perf_counter()
    assert len(compare({"it": Sleeper(0.05, [])}, IMAGE, repeats=1, seconds=0.1)["it"].runs) > 50
    assert time.perf_counter() - start > 0.1


def test_a_ratio_says_how_many_times_faster() -> None:
    found = compare({"slow": Sleeper(1.0, []), "fast": Sleeper(0.25, [])}, IMAGE, repeats=40, seconds=0)
    ratio, low, high = found["fast"].ratio_to(found["slow"])
    assert low <= ratio <= high
    assert ratio > 2
    assert found["slow"].ratio_to(found["slow"]) == (1, 1, 1)


def test_the_interval_of_equal_networks_holds_one_and_that_of_others_does_not() -> None:
    draws = np.random.default_rng(0)
    first, second = Timing(10 + draws.exponential(size=100), 1), Timing(10 + draws.exponential(size=100), 1)
    _, low, high = first.ratio_to(second)
    assert low < 1 < high
    _, low, high = first.ratio_to(Timing(1.2 * second.runs, 1))
    assert 1.1 < low < high < 1.3


def test_timings_of_two_comparisons_give_no_ratio() -> None:
    with pytest.raises(ValueError, match="one comparison"):
        Timing(np.ones(3), 1).ratio_to(Timing(np.ones(4), 1))


def test_plain_functions_can_be_timed() -> None:
    assert compare({"it": lambda image: image.float().sum()}, IMAGE, repeats=5, seconds=0)["it"].median_ms > 0


def test_threads_are_set_for_the_while_only() -> None:
    before = torch.get_num_threads()
    with with_threads(tiny(width=4), before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_each_batch_size_and_thread_count_has_its_numbers() -> None:
    deployed = Deployed(tiny(width=4), Normalize([0.5], [0.5]), Classify(10))
    numbers = Latency([1, 4], [1, 2], repeats=4, seconds=0)(deployed, Classify(10), Images())  # type: ignore[arg-type]
    assert len(numbers) == 16
    assert {"latency_ms_b1_t1", "latency_p10_ms_b4_t2", "latency_p90_ms_b1_t2", "images_per_second_b4_t1"} < set(
        numbers
    )
    assert numbers["images_per_second_b4_t1"] == pytest.approx(4000 / numbers["latency_ms_b4_t1"])


class Images:
    """Data of which only the example is asked."""

    def example(self) -> Tensor:
        return IMAGE[:1]


@pytest.mark.parametrize("options", [{"batch_sizes": [0]}, {"threads": [0]}, {"repeats": 0}])
def test_counts_below_one_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="1 or more"):
        Latency(**options)  # type: ignore[arg-type]


def test_the_laws_of_probes_hold() -> None:
    check_probe(lambda: Latency([1], repeats=2, seconds=0), repeatable=False, same_on_artifact=False)


def test_a_file_is_opened_again_with_as_many_threads(tmp_path: Path) -> None:
    deployed = Deployed(tiny(width=4).eval(), Normalize([0.5], [0.5]), Classify(10)).eval()
    export(deployed, IMAGE[:1], tmp_path / "model.onnx")
    with with_threads(OnnxRuntime(tmp_path / "model.onnx", threads=1), 2) as again:
        assert isinstance(again, OnnxRuntime)
        assert again.threads == 2
        assert again(IMAGE).shape == (2, 10)
