"""The arguments of a divergence, which every path of `linear_kl` shares."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """An output layer and the rows it is applied to; D may differ between two layers."""

    hidden: Tensor
    """[R, D] hidden states."""
    weight: Tensor
    """[V, D] output matrix, hidden's dtype."""
    bias: Tensor | None
    """[V] added to the logits, or None."""

    def contiguous(self) -> "Layer":
        """The layer with contiguous matrices; rows gathered from them are contiguous, too."""
        return self._replace(hidden=self.hidden.contiguous(), weight=self.weight.contiguous())


@dataclass(frozen=True)
class Problem:
    """R student rows, N teacher rows over one vocabulary, and the teacher of each student."""

    student: Layer
    teacher: Layer
    index: Tensor
    """[R] int64 teacher row of each student row, negative where there is none."""
    reverse: bool
    """False: KL(teacher || student); True: KL(student || teacher)."""
    temperature: float
    softcap: float | None

    @property
    def scaling(self) -> tuple[float, float | None]:
        """(temperature, softcap)."""
        return self.temperature, self.softcap

    def contiguous(self) -> "Problem":
        """The problem with contiguous matrices, which kernels read chunk by chunk."""
        student, teacher = self.student.contiguous(), self.teacher.contiguous()
        return replace(self, student=student, teacher=teacher)
