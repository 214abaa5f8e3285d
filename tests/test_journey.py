"""The whole way: real digits, train, kill, resume, export, verify, measure, report, as a user does it by command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT
from galago import cli
from galago.datasets.digits import Digits
from galago.models.tiny import Tiny
from galago.run import Run, load

RECIPE = {
    "model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 16}},
    "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
    "data": {"class_path": "galago.datasets.digits.Digits", "init_args": {"batch_size": 64}},
    "epochs": 12,
    "checkpoint_every": 7,
    "methods": [
        {
            "class_path": "galago.quantize.quantize.Quantize",
            "init_args": {
                "weight": {"class_path": "galago.quantize.lsq.LSQWeight"},
                "input": {"class_path": "galago.quantize.lsq.LSQ"},
                "edge_weight": {"class_path": "galago.quantize.min_max.MinMaxWeight"},
                "edge_input": {"class_path": "galago.quantize.min_max.MinMax"},
                "stream": {"class_path": "galago.quantize.min_max.MinMax"},
            },
        },
        {"class_path": "galago.augment.cutmix.CutMix", "init_args": {"probability": 0.3}},
    ],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "galago.cli", *arguments]


def started(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command("train", "--config", str(recipe), "--run", str(run))
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def killed_in_the_middle(recipe: Path, run: Path) -> None:
    """Starts training and kills it, without a warning, once an epoch is done and another begun."""
    process = started(recipe, run)
    for _ in range(1200):
        if len(Run(run).history()) >= 4 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same recipe: one left alone, one killed and resumed."""
    folder = tmp_path_factory.mktemp("journey")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    whole = started(recipe, folder / "whole")
    killed_in_the_middle(recipe, folder / "parts")
    assert not Run(folder / "parts").finished, "it was to be killed before it ended"
    assert started(recipe, folder / "parts").wait() == 0
    assert whole.wait() == 0
    return folder


def test_a_killed_process_continues_to_the_same_bits(journey: Path):
    whole, parts = (load(journey / name).state_dict() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in Run(journey / name).history()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_from_the_trained_run_to_proved_files_and_a_report(journey: Path, capsys: pytest.CaptureFixture[str]):
    run = journey / "parts"
    assert cli.main(["export", "--run", str(run)]) == 0
    assert cli.main(["verify", "--run", str(run)]) == 0
    measured = {}
    for artifact in (None, "model.onnx", "model.xml"):
        capsys.readouterr()
        extra = [] if artifact is None else ["--artifact", str(run / artifact)]
        assert cli.main(["measure", "--run", str(run), *extra]) == 0
        measured[artifact] = json.loads(capsys.readouterr().out)
    assert len({numbers["accuracy"] for numbers in measured.values()}) == 1
    assert measured[None]["accuracy"] > 0.9
    assert abs(measured["model.onnx"]["ece"] - measured[None]["ece"]) < 0.005
    assert cli.main(["report", "--run", str(run), "--against", str(journey / "whole")]) == 0
    assert "proved" in (run / "report.html").read_text()
    assert cli.main(["inspect", str(run / "model.onnx")]) == 0
    assert "QLinearConv" in capsys.readouterr().out


def test_trust_is_measured_before_after_and_in_the_files_and_goes_on_where_it_was(
    journey: Path, capsys: pytest.CaptureFixture[str]
):
    run = journey / "parts"
    assert cli.main(["export", "--run", str(run)]) == 0
    asked = ["trust", "--run", str(run), "--against", str(journey / "whole"), "--rounds", "5", "--severities", "[5]"]
    assert cli.main([*asked, "--images", "60"]) == 0
    written = json.loads((run / "trust.json").read_text())
    assert [written[key] for key in ("images", "severities", "rounds")] == [56, [5], 5], "at most as many as asked for"
    found = {(row["form"], row["metric"]): row for row in written["rows"]}
    for metric in ("accuracy", "ece", "aurc_confidence", "corruption_error"):
        values = [found[form, metric] for form in ("before", "model", "onnx", "openvino")]
        assert all(row["low"] <= row["value"] <= row["high"] for row in values if metric == "accuracy")
        assert values[0]["value"] == values[1]["value"], "two runs of the same bits"
    assert found["model", "linf_0.0314_pgd_accuracy"]["low"] is None, "no matter of stored outputs"
    assert ("onnx", "linf_0.0314_pgd_accuracy") not in found, "a file has no gradients"
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in (run / "trust").glob("*/*")}
    assert cli.main([*asked, "--images", "60"]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (run / "trust").glob("*/*")}, "nothing is asked twice"
    assert json.loads((run / "trust.json").read_text()) == written
    assert cli.main([*asked, "--images", "40"]) == 0, "other images are asked about"
    assert json.loads((run / "trust.json").read_text())["images"] < 41


def test_a_damaged_file_fails_verification_with_exit_code_1(journey: Path):
    """One weight scale of the finished model doubled: the file no longer is what was trained."""
    run = journey / "whole"
    assert cli.main(["export", "--run", str(run)]) == 0
    from safetensors.torch import load_file, save_file

    weights = load_file(run / "model.safetensors")
    name = next(n for n in weights if n.endswith("block.conv.weight_quantizer.step"))
    save_file(weights | {name: weights[name] * 2}, run / "model.safetensors")
    assert cli.main(["verify", "--run", str(run)]) == 1
    outcome = json.loads((run / "verify.json").read_text())
    assert not outcome["passed"]
    assert outcome["onnxruntime"]["first_diverging"].startswith("block")
    assert not outcome["openvino"]["passed"]


def test_a_run_of_another_task_is_not_compared_with(journey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = Run(tmp_path / "other")
    other.begin({**RECIPE, "epochs": 0, "methods": []}, seed=0)
    other.save_model(Tiny(classes=3), Digits().normalize)
    assert cli.main(["trust", "--run", str(journey / "whole"), "--against", str(other.folder)]) == 2
    assert "cannot be compared on these images: it tells 3 classes apart, data has 10" in capsys.readouterr().err
