"""weft: fused kernels for representation learning. ``python -m weft`` shows what runs here."""

from weft import native  # noqa: F401  loads the native libraries
from weft.dispatch import use
from weft.ops.checks import check_values
from weft.ops.pairwise.grassmann_step import grassmann_step, grassmann_step_
from weft.ops.pairwise.subspace_logits import subspace_logits
from weft.ops.pairwise.subspace_project import subspace_project

__all__ = [
    "check_values",
    "grassmann_step",
    "grassmann_step_",
    "subspace_logits",
    "subspace_project",
    "use",
]
