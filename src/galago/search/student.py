"""The student of a finished search, with fresh weights: what a second recipe trains from scratch.

The embeddings of a teacher of texts may be its first ones, factorized so that they fit the
student's width (a choice of NAS-KD).

    E = U S Vᵀ        E_student ∝ U_k S_k        k the student's width; scaled to mean square 1; V is left out
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.run import Run, load, read_json
from galago.search.cell_network import CellNetwork
from galago.spec import describe, rebuild


def student(run: str, teacher: str | None = None) -> nn.Module:
    """The network that a search ended with, with fresh weights, to be trained from scratch.

    Args:
        run: folder of a finished search.
        teacher: folder of a finished run of `galago.models.bert.Bert`, whose embeddings of bytes, brought to the
            student's width, the student begins with; none: it draws its own.

    Raises:
        UserError: the run is unfinished or no search, or the teacher has no embeddings of bytes.
    """
    files = Run(run)
    if not files.finished:
        raise UserError(
            f"{run} holds no finished search; train it first (`galago ship` trains all that a recipe needs)"
        )
    found = rebuild(read_json(files.architecture))
    if not isinstance(found, CellNetwork):
        raise UserError(f"{run} ended with a {type(found).__name__}; name a run of galago.search.nas_kd.NasKd")
    made = CellNetwork(found.space, found.genotype, found.classes, found.depth, found.width)
    if teacher is not None:
        begin_with(made, load(Path(teacher)))
    made.__dict__["built_from"] = describe(made)  # not this function: the search's folder is not needed any more
    return made


@torch.no_grad()
def begin_with(network: CellNetwork, teacher: nn.Module) -> None:
    """Puts a teacher's embeddings of bytes, factorized, in the place of a network's."""
    own, its = (next((m for m in part.modules() if isinstance(m, nn.Embedding)), None) for part in (network, teacher))
    if own is None or its is None or own.num_embeddings != its.num_embeddings or own.embedding_dim > its.embedding_dim:
        raise UserError("student: teacher has no embeddings of bytes that are at least as wide as the student's")
    own.weight.copy_(factorized(its.weight, own.embedding_dim))
    own.weight[0] = 0.0  # padding


def factorized(embeddings: Tensor, width: int) -> Tensor:
    """`U S` of the `width` largest singular values, rows × width, scaled to mean square 1; `V` is left out."""
    u, s, _ = torch.linalg.svd(embeddings, full_matrices=False)
    left = u[:, :width] * s[:width]
    scaled: Tensor = left / left.square().mean().sqrt()
    return scaled
