"""Memory beyond results and float32 gradients of the inputs: 64 MB, however many pairs."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import torch, weft
from weft.benchmarks.memory import _resident, _return_free_pages

def call(kind, N, dtype):
    x, y = (torch.randn(N, 64).to(dtype).requires_grad_() for _ in range(2))
    if kind == "linear":
        loss = lambda: weft.linear_cross_entropy(x, y, torch.arange(N))
    elif kind == "each":
        loss = lambda: weft.contrastive_loss(x, y, temperature=9.0, reduction="none").sum()
    else:
        loss = lambda: weft.contrastive_loss(x, y, temperature=9.0, symmetric=kind == "clip")
    return lambda: torch.autograd.grad(loss(), (x, y))

kind, N, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.set_num_threads(2)
call(kind, 64, dtype)()
prepared = call(kind, N, dtype)
_return_free_pages()
before = _resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
prepared()
print(_resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "infonce", "clip", "each"])
def test_does_not_grow_with_the_pairs(kind, dtype):
    size = {"float32": 4, "bfloat16": 2}[dtype]
    N = 8192  # all logits are 256 MB
    done = subprocess.run(
        [sys.executable, "-c", CODE, kind, str(N), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    gradients = 2 * N * 64
    assert int(done.stdout) <= gradients * (size + 4) + (64 << 20)
