"""How the tiles of s_ij are computed: the plans, and which one wins where.

direct   differences in vector registers, columns in the lanes: few dimensions, and ‖·‖₁
fused    products of packed blocks by our micro-kernels, reduced while the tile is in cache
chunked  a large product into a buffer of fixed size, reduced from there: on a GPU alone, where the
         vendor's product is faster than one that shares its registers with a reduction
"""

import torch
from torch import Tensor

from weft.ops.registration import Implementation, cpu

PLANS = ("auto", "direct", "fused", "chunked")

# Up to this many dimensions differences are faster than products on the CPU, as measured in
# docs/pairwise/algebra.md. A backward has more products to gain from.
FORWARD = {"dot": 16, "sqeuclidean": 16}
BACKWARD = {"dot": 3, "sqeuclidean": 3}


def check_plan(plan: str, device: torch.device, base: str) -> None:
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if plan == "chunked" and device.type == "cpu":
        raise ValueError(
            "plan: chunked is a plan of GPUs; on the CPU our products are as fast as the vendor's"
        )
    if base == "l1" and plan in ("fused", "chunked"):
        raise ValueError(f"plan: l1 is no product, so it is direct, not {plan}")


def plan_on_cpu(plan: str, base: str, depth: int, direct_up_to: dict[str, int]) -> str:
    """``plan``, or for auto the faster one of direct and fused."""
    if base == "l1":
        return "direct"
    if plan != "auto":
        return plan
    return "direct" if depth <= direct_up_to[base] else "fused"


def planned_cpu(name: str, x: int, direct_up_to: dict[str, int]) -> Implementation:
    """The C++ kernel of an op whose arguments have x, y and the rest of a pair's schema from
    position ``x`` on and the plan at the end: the kernel is told whether it is direct."""
    kernel = cpu(name)

    def run(*args: Tensor | float | str | None):
        plan = plan_on_cpu(args[-1], args[x + 5], args[x].shape[1], direct_up_to)
        return kernel.run(*args[:-1], plan == "direct")

    return Implementation(kernel.name, run, kernel.devices, kernel.dtypes, kernel.unavailable)
