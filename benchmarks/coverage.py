"""Which networks of timm and torchvision become proved integer files, and what of them stays float.

    python recipes/bccd/crop_cells.py ../shared/data/bccd data/cells     # real photographs
    python benchmarks/coverage.py                                        # all that is not done yet, then the table
    python benchmarks/coverage.py --only timm:resnet18 --restart
    python benchmarks/coverage.py --table

Each network goes twice through everything a user does: `train`, `export`, `verify`. Once W8A8 after training
(`Calibrated` ranges), once W4A4 with LSQ and one training step. Weights are random, as the networks' own weights are
not at hand; BatchNorm statistics are those of a few real batches. So parity is what is tested here, not accuracy. Each
network runs in a process of its own with a time limit; results are kept in a JSON file each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Side of the image, then the networks that are tried at it. Where a network is made for one size, it is that one.
NETWORKS = {
    64: """
        timm:resnet18 timm:resnet18d timm:resnet14t timm:resnet26 timm:seresnet18 timm:skresnet18 timm:resnetblur18
        timm:resnetv2_18 timm:resnext26ts
        timm:mobilenetv2_050 timm:mobilenetv3_small_050 timm:mobilenetv3_large_075
        timm:mobilenetv4_conv_small_050 timm:efficientnet_lite0 timm:tf_efficientnet_lite0 timm:efficientnet_b0
        timm:tf_efficientnetv2_b0 timm:mnasnet_050 timm:semnasnet_050 timm:tinynet_e timm:lcnet_050 timm:ghostnet_050
        timm:repghostnet_050 timm:mobileone_s0 timm:repvgg_b0 timm:regnetx_002 timm:regnety_002 timm:hardcorenas_a
        timm:fbnetc_100 timm:spnasnet_100 timm:mixnet_s timm:rexnet_100 timm:dla46_c timm:darknet17
        timm:ese_vovnet19b_dw timm:hgnetv2_b0 timm:convnext_atto timm:convnextv2_atto
        timm:inception_next_atto timm:starnet_s050 timm:selecsls42 timm:hrnet_w18_small timm:nf_regnet_b0
        torchvision:resnet18 torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x0_5
        torchvision:squeezenet1_1 torchvision:mnasnet0_5 torchvision:regnet_x_400mf torchvision:regnet_y_400mf
        torchvision:efficientnet_b0 torchvision:densenet121
    """,
    96: "torchvision:googlenet timm:mobilevit_xxs timm:mobilevitv2_050 timm:xception41",
    224: """
        timm:deit_tiny_patch16_224 timm:vit_tiny_patch16_224 timm:mixer_s32_224 timm:pit_ti_224 timm:visformer_tiny
        timm:levit_128s timm:swin_tiny_patch4_window7_224 timm:gmlp_ti16_224
    """,
    65: "torchvision:alexnet torchvision:vgg11_bn",  # large ones last
}
SIZES = {name: size for size, names in NETWORKS.items() for name in names.split()}
MODES = ("W8A8, post-training", "W4A4, one step")
LIMIT = 600  # seconds a network


def tried(name: str, mode: str, images: str, folder: Path) -> dict[str, Any]:
    """What came of one network in one mode, as plain data."""
    import torch
    from torch.optim import SGD

    from galago.datasets.image_folder import ImageFolder
    from galago.deploy.inspect import engines_of_layers
    from galago.deploy.verify import verify_run
    from galago.models.by_name import timm_model, torchvision_model
    from galago.quantize.quantize import Quantize
    from galago.run import Run
    from galago.ship import export_run
    from galago.tasks.classify import Classify
    from galago.train import train

    torch.manual_seed(0)
    library, _, model_name = name.partition(":")
    data = ImageFolder(
        str(few(Path(images), folder / "images")), size=SIZES[name], batch_size=12, check=False, augment=[]
    )
    classes = len(data.classes)
    model = {"timm": timm_model, "torchvision": torchvision_model}[library](model_name, classes)
    with torch.no_grad():
        for batch in islice((b for epoch in range(8) for b in data.train(epoch)), 8):
            model.train()(data.normalize(batch.input))
    quantize = Quantize(**prototypes(mode))
    train(
        model.eval(),
        Classify(classes),
        data,
        folder / "run",
        epochs=0 if mode == MODES[0] else 1,
        methods=[quantize],
        optimizer=lambda parameters: SGD(parameters, lr=0.001),
        seed=0,
    )
    export_run(folder / "run")
    proof = verify_run(folder / "run", images=24)
    engines = engines_of_layers(Run(folder / "run"))
    layers = [row for row in quantize.rows() if row.weight or row.input]
    diverging = [part["first_diverging"] for part in parts(proof) if part["first_diverging"]]
    return {
        "passed": not diverging,  # untrained networks hardly tell images apart: decisions hang on the last digit
        "first_diverging": diverging[0] if diverging else None,
        "agreement": min(part["agreement"] for part in parts(proof)),
        "worst": min((row["equal"] for part in parts(proof) for row in part["layers"]), default=1.0),
        "quantized": sum("float" not in (row.weight, row.input) for row in layers),
        "layers": len(layers),
        "engines": {
            engine: sum(is_integer(found[engine]) for found in engines.values())
            for engine in ("onnxruntime", "openvino")
        },
        "multiplying": len(engines),
        "float": dict(
            Counter(f"{row.kind}: {row.note.removeprefix('float: ')}" for row in quantize.rows() if row.note)
        ),
    }


def few(images: Path, folder: Path) -> Path:
    """A folder with some of the images: 4 of each class to train on, 8 to test on."""
    for part, count in (("train", 4), ("val", 1), ("test", 8)):
        for home in sorted(path for path in (images / part).iterdir() if path.is_dir()):
            (folder / part / home.name).mkdir(parents=True)
            for image in sorted(home.iterdir())[:count]:
                (folder / part / home.name / image.name).symlink_to(image.resolve())
    return folder


def prototypes(mode: str) -> dict[str, Any]:
    """The quantizers of a mode, as `Quantize` takes them."""
    from galago.quantize.calibrated import Calibrated, CalibratedWeight
    from galago.quantize.lsq import LSQ, LSQWeight
    from galago.quantize.min_max import MinMax, MinMaxWeight

    if mode == MODES[0]:
        return {"weight": CalibratedWeight(), "input": Calibrated(), "stream": Calibrated()}
    edges = {"edge_weight": MinMaxWeight(), "edge_input": MinMax()}
    return {"weight": LSQWeight(4), "input": LSQ(4), "stream": MinMax(), **edges}


def parts(proof: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts on the integer module and on each engine."""
    return [part for part in proof.values() if isinstance(part, dict)]


def is_integer(operation: str | None) -> bool:
    """Whether an engine's name of an operation is that of an integer kernel."""
    return operation is not None and (operation.startswith(("QLinear", "QGemm", "MatMulInteger")) or "_I8" in operation)


def one(name: str, images: str) -> dict[str, Any]:
    """What came of one network in all modes; an error is a result too."""
    from galago.errors import UserError

    results: dict[str, Any] = {}
    for mode in MODES:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[mode] = tried(name, mode, images, Path(folder))
            except UserError as error:
                results[mode] = {"passed": False, "message": str(error)}
            except Exception as error:  # that is what this run is to find
                traceback.print_exc()
                results[mode] = {"passed": False, "crash": f"{type(error).__name__}: {str(error)[:300]}"}
        results[mode]["seconds"] = round(time.perf_counter() - start, 1)
    return results


def in_own_process(name: str, chosen: argparse.Namespace) -> None:
    """Tries one network, unless that was done."""
    kept = path(name, chosen)
    if kept.exists() and not chosen.restart:
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--single", name, "--images", chosen.images]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        lines = made.stdout.splitlines()
        results = json.loads(lines[-1]) if made.returncode == 0 else dict.fromkeys(MODES, died(made))
    except subprocess.TimeoutExpired:
        results = {mode: {"passed": False, "crash": f"not done after {LIMIT} s"} for mode in MODES}
    kept.write_text(json.dumps(results, indent=1))
    print(name, *(told(results[mode]) for mode in MODES), sep="  ", flush=True)


def died(made: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The result of a process that ended on its own."""
    return {"passed": False, "crash": f"exit {made.returncode}: {made.stderr[-300:]}"}


def path(name: str, chosen: argparse.Namespace) -> Path:
    return Path(chosen.results) / f"{name.replace(':', '_')}.json"


def told(result: dict[str, Any]) -> str:
    """A result in a table's cell."""
    if problem := result.get("message") or result.get("crash"):
        return f"{'refused' if 'message' in result else 'CRASH'}: {problem}"
    engines = result["engines"]
    counts = f"{result['quantized']}/{result['layers']}; {engines['onnxruntime']}, {engines['openvino']}"
    return f"{'equal' if result['passed'] else 'DIFFERS at ' + str(result['first_diverging'])} ({counts})"


def table(chosen: argparse.Namespace) -> Table:
    """A row a network."""
    made = Table("network", "size", *MODES, "stays float (W4A4)")
    proved = 0
    for name in chosen.only:
        if path(name, chosen).exists():
            results = json.loads(path(name, chosen).read_text())
            proved += all(results[mode]["passed"] for mode in MODES)
            rest = "; ".join(f"{why} ×{n}" for why, n in results[MODES[1]].get("float", {}).items())
            made.add_row(name, str(SIZES[name]), *(told(results[mode]) for mode in MODES), rest)
    made.title = f"{proved} of {made.row_count} networks proved equal in both engines, both ways"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), metavar="NETWORK")
    parser.add_argument("--images", default="data/cells", help="folder of images, a folder a class")
    parser.add_argument("--results", default="runs/coverage", help="folder for a JSON file a network")
    parser.add_argument("--restart", action="store_true", help="try again what is done")
    parser.add_argument("--table", action="store_true", help="only show what is done")
    parser.add_argument("--single", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.single:
        print(json.dumps(one(chosen.single, chosen.images)))
        return
    for name in () if chosen.table else chosen.only:
        in_own_process(name, chosen)
    Console(width=200).print(table(chosen))


if __name__ == "__main__":
    main()
