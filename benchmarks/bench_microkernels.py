"""The CPU micro-kernels beside ``torch.mm``, on one thread: rates and fractions of the peak.

``python -m weft.benchmarks.bench_microkernels``. Values are compared before anything is timed; the
candidates then take turns, and the shortest time of each counts. The peak is measured in the same
turns, and the time is the thread's own, so that clock and neighbours are the same for all.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from weft import native

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Product:
    """C (rows, cols) = A B over ``depth``; "T": the operand's transpose is what is contiguous."""

    rows: int
    cols: int
    depth: int
    layout: str  # of A, of B
    repeats: int = 1

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def make(m, n, layout):
            return torch.randn(m, n).to(dtype) if layout == "N" else torch.randn(n, m).to(dtype).T

        left, right = self.layout
        return make(self.rows, self.depth, left), make(self.depth, self.cols, right)


PRODUCTS = {
    "weights, batch of 256": Product(256, 8000, 2048, "NT"),
    "the same, row-major": Product(256, 8000, 2048, "NN"),
    "square": Product(2048, 2048, 2048, "NN"),
    "square, transposed": Product(2048, 2048, 2048, "NT"),
    "gradient of weights": Product(8000, 2048, 256, "TN"),
    "attention scores, D 64": Product(32, 256, 64, "NT", 200),
    "attention scores, D 128": Product(64, 256, 128, "NT", 50),
    "attention values": Product(64, 128, 256, "NN", 50),
    "batch of 4": Product(4, 4096, 4096, "NT"),
    "batch of 16": Product(16, 4096, 4096, "NT"),
    "batch of 64": Product(64, 4096, 4096, "NT"),
}


def measure(product: Product, dtype: torch.dtype, rounds: int = 15) -> dict[str, float]:
    """FLOP/s of the peak, of gemm, of gemm with both operands packed before, and of torch.mm."""
    gemm = native.cpu_op("microkernel_gemm")
    limit = native.cpu_op("microkernel_fma_rate")
    if dtype == BF16 and native.cpu_level in ("avx512_bf16", "amx"):
        limit = native.cpu_op("microkernel_bfloat16_rate")
    a, b = product.operands(dtype)
    c = torch.empty(product.rows, product.cols)
    out = c.to(dtype)
    truth = a.double() @ b.double()
    flops = 2 * product.rows * product.cols * product.depth * product.repeats

    def ours(packed: bool) -> float:
        return gemm(a, b, c, False, packed, packed, product.repeats)

    for packed in (False, True):
        c.fill_(torch.nan)
        ours(packed)
        torch.testing.assert_close(
            c.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max())
        )

    def mm() -> float:
        start = time.thread_time()
        for _ in range(product.repeats):
            torch.mm(a, b, out=out)
        return time.thread_time() - start

    best = {"peak": 0.0, "gemm": 0.0, "packed": 0.0, "torch.mm": 0.0}
    for _ in range(rounds):
        best["peak"] = max(best["peak"], limit(c))
        for name, call in {
            "gemm": lambda: ours(False),
            "packed": lambda: ours(True),
            "torch.mm": mm,
        }.items():
            best[name] = max(best[name], flops / call())
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, instruction set {native.cpu_level}")
    print("GFLOP/s (% of the measured peak)")
    names = ("gemm", "packed", "torch.mm")
    head = "".join(f"{name:>13}" for name in names)
    print(f"{'product':24}{'M x N x K':>17} {'':3}{'type':9}{'peak':>6}{head}")
    for dtype in (F32, BF16):
        for title, product in PRODUCTS.items():
            found = measure(product, dtype, rounds)
            peak = found["peak"]
            shape = f"{product.rows} x {product.cols} x {product.depth}"
            kind = str(dtype).removeprefix("torch.")
            cells = "".join(f"{found[n] / 1e9:7.0f} ({100 * found[n] / peak:2.0f}%)" for n in names)
            print(f"{title:24}{shape:>17} {product.layout:3}{kind:9}{peak / 1e9:6.0f}{cells}")


if __name__ == "__main__":
    main()
