"""Two processes train one network: the same weights in both, on half of each batch's images each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT
from galago.run import Run, load

RECIPE = {
    "model": {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 8}},
    "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
    "data": {"class_path": "galago.datasets.digits.Digits", "init_args": {"batch_size": 32}},
    "epochs": 2,
    "accelerator": "cpu",
    "devices": 2,
    "methods": [
        {
            "class_path": "galago.quantize.quantize.Quantize",
            "init_args": {
                "weight": {"class_path": "galago.quantize.lsq.LSQWeight"},
                "input": {"class_path": "galago.quantize.lsq.LSQ"},
            },
        },
        {"class_path": "galago.augment.cutmix.CutMix"},
    ],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
}


def train(recipe: Path, run: Path, epochs: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    options = ["--config", str(recipe), "--run", str(run), "--epochs", str(epochs)]
    return subprocess.run(
        [sys.executable, "-m", "galago.cli", "train", *options],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_finish_a_quantized_run_that_loads(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    done = train(recipe, tmp_path / "run", epochs=2)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = Run(tmp_path / "run").history()
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [0, 1]  # written once, not by each
    assert lines[-1]["step"] == 2 * (1078 // 64)
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "run").state_dict().values())
