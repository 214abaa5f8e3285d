"""Every quantizer on one network, one schedule, one optimizer and one seed: what each is worth at 4, 3, 2 and 1 bits.

    python benchmarks/quantizers.py                          # all that is not done yet, then the table
    python benchmarks/quantizers.py --only EWGS STE --bits 2 --seeds 0 1 2
    python benchmarks/quantizers.py --table                  # only the table of what is done

ResNet-20 starts from published float weights; first and last layers and the residual streams have 8 bits (min-max) in
all. Each combination becomes a recipe, which is trained, exported, verified in both engines on 250 images, and measured
as a file in ONNX Runtime. Finished runs are skipped and interrupted ones continued, so the command can be given again.

STE is EWGS with its gradient scaling at zero: the same learned interval, the plain straight-through estimator. LSQ,
LSQ+, PACT with SAWB and N2UQ have no 1-bit weights. N2UQ learns from labels here, as all do, not from a teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from runs import Recipe, galago, make, read, spread

WEIGHTS = "../shared/data/pretrained-cifar10-resnet/resnet20-12fca82f.th"
Pair = tuple[str, dict[str, Any], str, dict[str, Any]]
PAIRS: dict[str, Pair] = {
    "STE": ("ewgs.EWGSWeight", {"fixed_delta": 0.0}, "ewgs.EWGS", {"fixed_delta": 0.0}),
    "EWGS": ("ewgs.EWGSWeight", {"fixed_delta": 0.001}, "ewgs.EWGS", {"fixed_delta": 0.001}),
    "DAQ": ("daq.DAQWeight", {}, "daq.DAQ", {}),
    "LSQ": ("lsq.LSQWeight", {}, "lsq.LSQ", {}),
    "LSQ+": ("lsq_plus.LSQPlusWeight", {}, "lsq_plus.LSQPlus", {}),
    "PACT": ("pact.SAWBWeight", {}, "pact.PACT", {"initial": None}),
    "DoReFa": ("dorefa.DoReFaWeight", {}, "dorefa.DoReFa", {}),
    "N2UQ": ("n2uq.N2UQWeight", {}, "n2uq.N2UQ", {}),
}
ONE_BIT = ("STE", "EWGS", "DAQ", "DoReFa")


def recipe(name: str, bits: int, seed: int, chosen: argparse.Namespace) -> Recipe:
    """The recipe of one run."""
    weight, weight_arguments, inputs, input_arguments = PAIRS[name]

    def quantizer(path: str, arguments: dict[str, Any]) -> Recipe:
        return {"class_path": f"galago.quantize.{path}", "init_args": arguments}

    parts = {
        "weight": quantizer(weight, {"bits": bits, **weight_arguments}),
        "input": quantizer(inputs, {"bits": bits, **input_arguments}),
        "edge_weight": quantizer("min_max.MinMaxWeight", {}),
        "edge_input": quantizer("min_max.MinMax", {}),
        "stream": quantizer("min_max.MinMax", {}),
    }
    return {
        "seed": seed,
        "model": {"class_path": "galago.models.resnet.resnet20", "init_args": {"weights": WEIGHTS}},
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {
            "class_path": "galago.datasets.cifar.CIFAR10",
            "init_args": {
                "root": chosen.data,
                "batch_size": 128,
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
        },
        "epochs": chosen.epochs,
        "methods": [{"class_path": "galago.quantize.quantize.Quantize", "init_args": parts}],
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001, "weight_decay": 0.0001}},
        "schedule": {"class_path": "galago.schedule.Cosine", "init_args": {"warmup": 0.05}},
        "precision": "bf16-mixed",
        "channels_last": True,
        "compile": True,
    }


def folder(name: str, bits: int, seed: int, chosen: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(chosen.runs) / f"{chosen.epochs}_epochs" / f"w{bits}a{bits}" / f"{name.lower()}_seed{seed}"


def done(run: Path) -> bool:
    """Whether everything of a run was measured; its file's metrics come last."""
    return (run / "verify.json").exists() and "openvino" in read(run / "metrics.json")


def prove(run: Path) -> None:
    """The file of a trained run, checked and measured."""
    of_run = ["--run", str(run)]
    galago("export", *of_run)
    galago("verify", *of_run, "--images", "250")
    galago("measure", *of_run)
    galago("measure", *of_run, "--artifact", str(run / "model.onnx"), "--latency", "true")
    galago("measure", *of_run, "--artifact", str(run / "model.xml"))


def table(chosen: argparse.Namespace) -> Table:
    """Accuracy of the file in ONNX Runtime (mean and spread over seeds), its calibration, size, speed and parity."""
    made = Table("bits", "method", "seeds", "accuracy %", "ECE %", "file", "ms (× float)", "same codes %")
    for bits in chosen.bits:
        for name in chosen.only:
            runs = [run for seed in chosen.seeds if done(run := folder(name, bits, seed, chosen))]
            if runs:
                made.add_row(f"W{bits}A{bits}", name, str(len(runs)), *cells(runs))
    return made


def cells(runs: list[Path]) -> list[str]:
    """What a row of the table says about the runs of one method."""
    files = [read(run / "metrics.json").get("onnx", {}) for run in runs]
    first, times, proof = files[0], read(runs[0] / "latency.json"), read(runs[0] / "verify.json")
    return [
        spread([100 * file["accuracy"] for file in files]),
        spread([100 * file["ece"] for file in files]),
        f"{first.get('file_mb', 0):.3f} MB",
        speed(times),
        f"{100 * worst(proof):.3f}",
    ]


def speed(times: dict[str, Any]) -> str:
    """One image in ONNX Runtime, and how many times as fast as its float file."""
    rows = [row for row in times.get("rows", []) if row["name"] == "integer, ONNX Runtime" and row["batch"] == 1]
    return "".join(f"{row['median_ms']:.2f} ({row['ratio']:.2f})" for row in rows[:1])


def worst(proof: dict[str, Any]) -> float:
    """The least share of equal codes in any layer and engine."""
    checks = [check for check in proof.values() if isinstance(check, dict)]
    return min(float(layer["equal"]) for check in checks for layer in check.get("layers", []))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS), help="these methods")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 1], help="of weights and inputs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3, help="of 40,000 images")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    parser.add_argument("--runs", default="runs/quantizers", help="where runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what is done")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if not chosen.table:
        for bits in chosen.bits:
            for seed in chosen.seeds:
                for name in chosen.only:
                    if bits > 1 or name in ONE_BIT:
                        run = folder(name, bits, seed, chosen)
                        make(run, recipe(name, bits, seed, chosen), done, prove)
    Console(width=140).print(table(chosen))


if __name__ == "__main__":
    main()
