"""Latency and throughput: how long one answer takes, and how many images pass in a second.

Each figure is the median of many runs with its 10th and 90th percentile: at least 50 runs and at least two seconds,
after ten that are not counted, in evaluation mode, with the input ready in memory. On a GPU each run waits until the
device is done. `compare` times several networks in one go: they take turns (A B A B …, a few runs each, the first of
a turn not counted), so that a busy machine slows all of them, and their ratio comes with a bootstrap interval over the
rounds. An interval that holds 1 means "no difference".

When to use it: on the machine that will run the network, with the file that will run there. A network whose
quantization is only simulated in PyTorch is slower than float and says nothing about its file: time the file.

Chosen: five runs a turn. Changing after every run would time a processor whose caches the other network has just
emptied; changing rarely would let the machine's speed drift between the two. Threads are set anew for PyTorch, and a
file's engine is opened again with as many; engines that keep threads spinning disturb each other, so compare with one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.probe import Probe, device_of, evaluating
from galago.spec import build, describe
from galago.task import Task

_UNCOUNTED, _TURN = 10, 5


class Timing(NamedTuple):
    """How long each counted run took, in milliseconds, in order."""

    runs: NDArray[np.float64]
    images: int  # in each run

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs))

    @property
    def p10_ms(self) -> float:
        return float(np.quantile(self.runs, 0.1))

    @property
    def p90_ms(self) -> float:
        return float(np.quantile(self.runs, 0.9))

    @property
    def images_per_second(self) -> float:
        return 1000 * self.images / self.median_ms

    def ratio_to(self, reference: Timing, rounds: int = 1000, seed: int = 0) -> tuple[float, float, float]:
        """How many times faster than the reference: ratio of the medians, and its 95 % bootstrap interval.

        Args:
            reference: of the same comparison, so that run i of both was taken at nearly the same time.
            rounds: how often the runs are drawn again.
            seed: of the draws.
        """
        if len(self.runs) != len(reference.runs):
            raise ValueError("ratios are taken within one comparison, whose timings have equally many runs")
        draws, count = np.random.default_rng(seed), len(self.runs)
        ratios = np.empty(rounds)
        for i in range(rounds):
            drawn = draws.integers(0, count, count)
            ratios[i] = np.median(reference.runs[drawn]) / np.median(self.runs[drawn])
        low, high = np.quantile(ratios, [0.025, 0.975])
        return reference.median_ms / self.median_ms, float(low), float(high)


def compare(
    candidates: Mapping[str, Callable[[Tensor], Any]], image: Tensor, repeats: int = 50, seconds: float = 2.0
) -> dict[str, Timing]:
    """Times several networks on the same input, in turns.

    Args:
        candidates: by name, anything that takes the image: PyTorch modules, files in an engine, functions.
        image: as they take it, N×C×H×W; moved beforehand to the device of each.
        repeats: at least so many counted runs of each.
        seconds: at least so long, times the number of candidates.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        runs = {}
        for name, candidate in candidates.items():
            if isinstance(candidate, nn.Module):
                stack.enter_context(evaluating(candidate))
            runs[name] = _timed(candidate, image)
        times = _take_turns(runs, repeats, seconds)
    return {name: Timing(np.array(found), len(image)) for name, found in times.items()}


def _take_turns(runs: Mapping[str, Callable[[], float]], repeats: int, seconds: float) -> dict[str, list[float]]:
    for run in runs.values():
        for _ in range(_UNCOUNTED):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or any(len(found) < repeats for found in times.values()):
        for name, run in runs.items():
            times[name] += [run() for _ in range(_TURN)][1:]
    return times


def _timed(candidate: Callable[[Tensor], Any], image: Tensor) -> Callable[[], float]:
    """A function that runs the candidate once and gives the milliseconds it took."""
    device = device_of(candidate) if isinstance(candidate, nn.Module) else image.device
    placed = image.to(device).contiguous()
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing_to_wait_for

    def run() -> float:
        wait()
        start = time.perf_counter()
        candidate(placed)
        wait()
        return 1000 * (time.perf_counter() - start)

    return run


def _nothing_to_wait_for() -> None:
    """On a CPU a call that returns has finished."""


@contextmanager
def with_threads(deployed: nn.Module, threads: int) -> Iterator[nn.Module]:
    """The network computing with so many threads: PyTorch set so for a while, or a file opened again in its engine."""
    if hasattr(deployed, "threads"):
        written = describe(deployed)
        again: nn.Module = build({**written, "init_args": {**written["init_args"], "threads": threads}})
        yield again
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield deployed
    finally:
        torch.set_num_threads(before)


class Latency(Probe):
    """Median, 10th and 90th percentile in ms and images a second, of each batch size (`b`) and thread count (`t`).

    Args:
        batch_sizes: images in one run.
        threads: of the processor.
        repeats: at least so many runs of each.
        seconds: at least so long for each.
    """

    def __init__(
        self,
        batch_sizes: Sequence[int] = (1, 32),
        threads: Sequence[int] = (1,),
        repeats: int = 50,
        seconds: float = 2.0,
    ) -> None:
        if min([*batch_sizes, *threads, repeats], default=0) < 1:
            raise UserError("Latency: batch_sizes, threads and repeats are counts of 1 or more")
        self.batch_sizes, self.threads = list(batch_sizes), list(threads)
        self.repeats, self.seconds = repeats, seconds

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for threads in self.threads:
            with with_threads(deployed, threads) as network:
                for batch in self.batch_sizes:
                    image = data.example().repeat(batch, 1, 1, 1)
                    timing = compare({"it": network}, image, self.repeats, self.seconds)["it"]
                    numbers |= _named(timing, f"b{batch}_t{threads}")
        return numbers


def _named(timing: Timing, setting: str) -> dict[str, float]:
    return {
        f"latency_ms_{setting}": timing.median_ms,
        f"latency_p10_ms_{setting}": timing.p10_ms,
        f"latency_p90_ms_{setting}": timing.p90_ms,
        f"images_per_second_{setting}": timing.images_per_second,
    }
