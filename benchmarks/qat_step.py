"""What a training step costs with 4-bit weights and inputs, against the same network in float, in one run.

    python benchmarks/qat_step.py --model resnet20 --batch 128
    python benchmarks/qat_step.py --model resnet20 --batch 128 --compile --bf16

A step is forward, cross-entropy, backward and SGD with momentum, channels last, on random images. The variants take
turns, a step each, so that whatever else the machine does meets all alike; what counts is the ratio to float in the
same round, of which the median and the quartiles are shown. All convolutions but the first are quantized. Memory is the
most that a step holds at once beside weights and the optimizer's state.

Peers: PyTorch's learnable fake-quantize kernel and, where they are installed (`pip install galago[bench]`), Brevitas,
which quantizes the ReLU's output once instead of each convolution's input, and torchao, which exports the network
(PT2E, x86) and quantizes all layers, with moving averages for ranges. None is compiled by `--compile` unless
`--compile-peers` says so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from galago.layers import swap
from galago.models.resnet import resnet18_cifar, resnet20
from galago.quantize.daq import DAQ, DAQWeight
from galago.quantize.dorefa import DoReFa, DoReFaWeight
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lbt import LBT, LBTWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.lsq_plus import LSQPlus, LSQPlusWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.n2uq import N2UQ, N2UQWeight
from galago.quantize.pact import PACT, SAWBWeight
from galago.quantize.quantizer import Grid, Quantizer

MODELS = {"resnet20": resnet20, "resnet18": resnet18_cifar}
PEERS = ("torch learnable", "Brevitas", "torchao")
Step = Callable[[], None]


class TorchLearnable(Quantizer):
    """PyTorch's own fake-quantize with a learned scale, one step a tensor."""

    low: int
    high: int
    zero: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits = bits
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero", torch.zeros(1))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        self.scale.fill_(2 * x.abs().mean() / self.high**0.5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch._fake_quantize_learnable_per_tensor_affine
        return kernel(x.float(), self.scale, self.zero, self.low, self.high, (x[0].numel() * self.high) ** -0.5)

    def grid(self) -> Grid:
        return Grid(self.scale.detach()[0], torch.zeros(()), self.low, self.high)


def quantized(model: nn.Module, weight: Callable[[], Quantizer], inputs: Callable[[], Quantizer]) -> nn.Module:
    """The model with every convolution but the first wrapped."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for path in paths[1:]:
        model = swap(model, path, QuantLayer(model.get_submodule(path), weight(), inputs()))
    return model


def brevitas(model: nn.Module, bits: int) -> nn.Module:
    """The model with Brevitas's convolutions and ReLUs."""
    from brevitas.nn import QuantConv2d, QuantReLU

    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ReLU)]
    for path, layer in layers[1:]:
        if isinstance(layer, nn.ReLU):
            model = swap(model, path, QuantReLU(bit_width=bits))
            continue
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        model = swap(model, path, QuantConv2d(*sizes, bias=False, weight_bit_width=bits))
    return model


def torchao(model: nn.Module, bits: int, images: Tensor) -> nn.Module:
    """The network as torchao exports and prepares it for quantization-aware training on x86."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    usual = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    inputs = dataclasses.replace(usual.input_activation, quant_max=2**bits - 1)
    weight = dataclasses.replace(usual.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)
    chosen = dataclasses.replace(usual, input_activation=inputs, output_activation=inputs, weight=weight)
    exported = torch.export.export(model.to(memory_format=torch.channels_last).train(), (images,)).module()
    prepared = prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(chosen))
    trainable: nn.Module = allow_exported_model_train_eval(prepared)
    return trainable


def variants(model: nn.Module, bits: int, images: Tensor, only: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Name to network, all with the same initial weights; of the quantized ones `only` these where given."""
    pairs: dict[str, tuple[Callable[[], Quantizer], Callable[[], Quantizer]]] = {
        "EWGS": (lambda: EWGSWeight(bits, fixed_delta=0.001), lambda: EWGS(bits, fixed_delta=0.001)),
        "LSQ": (lambda: LSQWeight(bits), lambda: LSQ(bits)),
        "MinMax": (lambda: MinMaxWeight(bits), lambda: MinMax(bits)),
        "DAQ": (lambda: DAQWeight(bits), lambda: DAQ(bits)),
        "LSQ+": (lambda: LSQPlusWeight(bits), lambda: LSQPlus(bits)),
        "PACT": (lambda: SAWBWeight(bits), lambda: PACT(bits)),
        "DoReFa": (lambda: DoReFaWeight(bits), lambda: DoReFa(bits)),
        "LBT": (lambda: LBTWeight(bits), lambda: LBT(bits)),
        "N2UQ": (lambda: N2UQWeight(bits), lambda: N2UQ(bits)),
        "torch learnable": (lambda: TorchLearnable(bits, signed=True), lambda: TorchLearnable(bits, signed=False)),
    }
    made = {"float": copy.deepcopy(model)}
    wanted = {name: pair for name, pair in pairs.items() if not only or name in only}
    made |= {name: quantized(copy.deepcopy(model), *pair) for name, pair in wanted.items()}
    if importlib.util.find_spec("brevitas") and (not only or "Brevitas" in only):
        made["Brevitas"] = brevitas(copy.deepcopy(model), bits)
    if importlib.util.find_spec("torchao") and (not only or "torchao" in only):
        made["torchao"] = torchao(copy.deepcopy(model).to(images.device), bits, images)
    return made


def step_of(model: nn.Module, images: Tensor, labels: Tensor, bf16: bool, compiled: bool) -> Step:
    """One training step as a function; ranges are set from the images first."""
    model = model.to(images.device).to(memory_format=torch.channels_last)
    model.train()  # torchao's gives nothing back
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.observing = True
    with torch.no_grad():
        model(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if compiled:
        model.compile()

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def measured(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(-3, rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def most_memory(step: Step, device: str) -> float:
    """MB that a step holds at once, at most, more than before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(float(e.nbytes()) for e in sorted(events, key=lambda event: event.start_ns()))) / 1e6


def table(times: dict[str, list[float]], memory: dict[str, float], title: str) -> Table:
    """Medians and ratios to float of the same round; memory."""
    made = Table("variant", "ms a step", "over float", "quartiles", "MB", "over float", title=title)
    for name, taken in times.items():
        ratios = [one / base for one, base in zip(taken, times["float"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        made.add_row(
            name,
            f"{statistics.median(taken):.1f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{memory[name]:.0f}",
            f"{memory[name] / memory['float']:.2f}",
        )
    return made


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--bits", type=int, default=4, help="of weights and inputs")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each variant, after three more")
    parser.add_argument("--compile", action="store_true", help="compile float and Galago's variants with torch.compile")
    parser.add_argument("--compile-peers", action="store_true", help="compile the peers too")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="these variants (and float)")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 100  # as many networks of one class as there are variants
    images = torch.randn(chosen.batch, 3, 32, 32, device=chosen.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (chosen.batch,), device=chosen.device)
    steps = {}
    for name, model in variants(MODELS[chosen.model](), chosen.bits, images, chosen.only).items():
        compiled = chosen.compile_peers if name in PEERS else chosen.compile
        steps[name] = step_of(model, images, labels, chosen.bf16, compiled)
    how = f"{'bf16' if chosen.bf16 else 'fp32'}, {'compiled' if chosen.compile else 'eager'}"
    title = f"{chosen.model}, batch {chosen.batch}, W{chosen.bits}A{chosen.bits}, {how}, {chosen.device}"
    times = measured(steps, chosen.steps)
    memory = {name: most_memory(step, chosen.device) for name, step in steps.items()}
    Console().print(table(times, memory, f"{title}, {torch.get_num_threads()} threads"))


if __name__ == "__main__":
    main()
