"""What a transport op returns."""

import warnings
from dataclasses import dataclass, fields

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F


class NotConverged(UserWarning):
    """The marginals are further off than the tolerance when the last iteration was done."""


def register_result(cls):
    """A frozen dataclass as a pytree: of its fields those in ``cls.constants`` are no leaves."""
    names = [field.name for field in fields(cls)]
    leaves = [name for name in names if name not in cls.constants]

    def flatten(result):
        return [getattr(result, n) for n in leaves], [getattr(result, n) for n in cls.constants]

    def unflatten(values, constants):
        return cls(
            **dict(zip(leaves, values, strict=True)),
            **dict(zip(cls.constants, constants, strict=True)),
        )

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=cls.__name__)
    return cls


@dataclass(frozen=True)
class Transport:
    """A solved transport problem; the base of what the ops return.

    Attributes:
        value: the dual objective, which at the optimum is ⟨P, C⟩ + ε KL(P | a bᵀ) + the penalties
            of the marginals: ``(B,)``. Its gradient is the envelope's, exact at the optimum.
        potentials: f ``(B, N)`` and g ``(B, M)``, −∞ for what no mass can reach or leave.
        marginal_error: ``(B,)``: a bound of the L1 distances of both marginals of the plan from
            what they should be (unbalanced: of the last update's change, as mass).
        iterations: ``(B,)`` int64, those that each problem needed.
        tolerance: what ``marginal_error`` was to reach; negative if nothing.
    """

    value: Tensor
    potentials: tuple[Tensor, Tensor]
    marginal_error: Tensor
    iterations: Tensor
    tolerance: float

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool; reading it warns if a problem has not converged."""
        self.warn_of_errors()
        return self.marginal_error <= self.tolerance

    def warn_of_errors(self) -> None:
        """Says by how much marginals are off; waits for the device."""
        if self.tolerance < 0 or torch.compiler.is_compiling() or not self.marginal_error.numel():
            return
        missed = self.marginal_error > self.tolerance
        if bool(missed.any()):
            worst, iterations = float(self.marginal_error.max()), int(self.iterations.max())
            warnings.warn(
                f"Sinkhorn: {int(missed.sum())} of {missed.numel()} problems have not reached "
                f"tolerance {self.tolerance:g}: marginal error {worst:.3g} after {iterations} "
                "iterations",
                NotConverged,
                stacklevel=3,
            )

    def apply(self, values: Tensor) -> Tensor:
        """P @ values, ``(B, N, E)`` from ``(B, M, E)``."""
        raise NotImplementedError

    def plan_label_joint(
        self, row_labels: Tensor, column_labels: Tensor, num_row_labels: int, num_column_labels: int
    ) -> Tensor:
        """The mass between classes, J_kl = Σ P_ij over rows of class k and columns of class l.

        Args:
            row_labels: ``(N,)`` or ``(B, N)`` int64 in [0, num_row_labels).
            column_labels: ``(M,)`` or ``(B, M)`` int64 in [0, num_column_labels).

        Returns:
            ``(B, num_row_labels, num_column_labels)``, differentiable in the plan.
        """
        f, g = self.potentials
        one_hot = F.one_hot(column_labels.expand(g.shape), num_column_labels).to(f.dtype)
        to_classes = self.apply(one_hot)
        rows = F.one_hot(row_labels.expand(f.shape), num_row_labels).to(f.dtype)
        return rows.mT @ to_classes
