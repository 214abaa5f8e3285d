"""How far one network's softened class probabilities are from another's: what all that learn from scores minimize."""

from __future__ import annotations

from torch import Tensor, nn

SHIFT = 1e-7  # what the public code of online methods adds to the target's probabilities, for the logarithm


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float, shift: float = 0.0) -> Tensor:
    """`T² KL(p_T(teacher) + shift ‖ p_T(student))`, averaged over the batch; T² keeps the gradient's size. A scalar.

    With a shift the target no longer sums to one, and the value at agreement is `T² K shift` to first order, not 0.

    Args:
        student: scores N×K.
        teacher: scores N×K, taken as constant.
        temperature: T, positive.
        shift: added to each of the teacher's probabilities.

    >>> import torch
    >>> softened_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 5.0]]), 4.0).abs() < 1e-6
    tensor(True)
    """
    log_student = nn.functional.log_softmax(student / temperature, 1)
    log_teacher = nn.functional.log_softmax(teacher.detach() / temperature, 1)
    if shift:
        log_teacher = (log_teacher.exp() + shift).log()
    return nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
