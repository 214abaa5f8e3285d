"""The same training step by torchdistill, for benchmarks/distill_step.py to set beside ours.

torchdistill (pip install torchdistill) is the widest-used toolkit for distillation of vision networks. Its box runs
teacher and student with forward hooks, sums the losses of a configuration and steps the optimizer, as its own examples
do. Only losses that both have are here, with the layers that Galago's lessons choose by themselves.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

INSTALLED = importlib.util.find_spec("torchdistill") is not None
STAGES = ("layer1", "layer2", "layer3")
ANSWERS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


def both(path: str) -> dict[str, str]:
    """A layer of the same name in both networks."""
    return {"student_output_path": path, "teacher_output_path": path}


def output_of(path: str) -> dict[str, str]:
    """A layer's output, as a configuration names it."""
    return {"io": "output", "path": path}


def attention() -> dict[str, Any]:
    """Pairs of equal stages."""
    return {path: {"teacher": output_of(path), "student": output_of(path), "weight": 1} for path in STAGES}


def flow() -> dict[str, Any]:
    """Each stage and the next."""
    pairs = {}
    for first, second in pairwise(STAGES):
        ends = {"first": output_of(first), "second": output_of(second)}
        pairs[first] = {f"{who}_{end}": place for who in ("teacher", "student") for end, place in ends.items()}
    return pairs


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SoftTargets": ("KDLoss", {**ANSWERS, "temperature": 4.0, "alpha": 0.0}),
    "Correlation": ("DISTLoss", ANSWERS),
    "Attention": ("ATLoss", {"at_pairs": attention(), "mode": "code"}),
    "SolutionFlow": ("FSPLoss", {"fsp_pairs": flow()}),
    "Relations": ("RKDLoss", {**both("flatten"), "dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"}),
    "Similarity": ("SPKDLoss", {**both("layer3"), "reduction": "batchmean"}),
}


def peer_step(
    name: str, teacher: nn.Module, student: nn.Module, images: Tensor, labels: Tensor, bf16: bool
) -> Callable[[], None]:
    """A step with cross-entropy and one loss more.

    Args:
        name: of `PEERS`.
        teacher: answers each batch.
        student: learns.
        images: N×C×H×W, normalized.
        labels: N classes.
        bf16: under autocast.
    """
    from torchdistill.core.distillation import get_distillation_box

    logging.disable(logging.INFO)
    key, arguments = PEERS[name]
    label = {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}}
    terms = {
        "labels": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": label},
            "weight": 1.0,
        },
        name: {"criterion": {"key": key, "kwargs": arguments}, "weight": 1.0},
    }
    seen = {"forward_hook": {"output": [*STAGES, "flatten"]}} if "student_module_path" not in arguments else {}
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only", **seen},
        "student": {"forward_proc": "forward_batch_only", **seen},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-4, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = get_distillation_box(teacher.eval(), student.train(), {}, config, images.device, None, False, 1)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = box.forward_process(images, labels)
        box.post_forward_process(loss)
        if images.is_cuda:
            torch.cuda.synchronize()

    return step
