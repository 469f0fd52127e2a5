"""The C++ backward of attention against the reference in float64: options, shapes, edges."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from weft import native
from weft.masks import Causal, Lengths, Window
from weft.ops.attention.attention import backward, forward
from weft.ops.attention.inputs import arguments_of, mask_of
from weft.ops.attention.mask_plan import kernel_program
from weft.reference.attention.attention import Inputs

LEVELS = native.supported_levels()
NAMES = ("query", "key", "value", "bias", "sink", "key_weight", "query_weight")
# Of the largest element of a gradient: the rounding of weights and of their gradients to the dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 2.5e-2,
    torch.float16: 4e-3,
}


@pytest.fixture(params=LEVELS)
def level(request):
    with native.use_level(request.param):
        yield request.param


class Problem:
    """Random arguments of the op in float64, and all gradients of its results."""

    def __init__(
        self,
        B=2,
        Hq=2,
        Hkv=None,
        Nq=70,
        Nk=90,
        D=16,
        Dv=24,
        mask=None,
        bias=None,
        sink=False,
        key_weight=0,
        query_weight=0,
        sums=False,
        lse=True,
        out=True,
        softcap=0.0,
        dropout_p=0.0,
        upstream="plain",
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        random = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
        Hkv = Hq if Hkv is None else Hkv
        weight = random(B, key_weight, Nk)
        self.tensors = {
            "query": random(B, Nq, Hq, D).transpose(1, 2),
            "key": random(B, Nk, Hkv, D).transpose(1, 2),
            "value": random(B, Hkv, Nk, Dv),
            "bias": random(*bias) if bias is not None else None,
            "sink": random(Hq) if sink else None,
            "key_weight": weight.abs() * (weight > -0.8) if key_weight else None,
            "query_weight": random(B, query_weight, Nq) if query_weight else None,
        }
        self.numbers = {"scale": D**-0.5, "softcap": softcap, "dropout_p": dropout_p}
        self.seed = torch.tensor(0x1234567890ABCDEF) if dropout_p else None
        self.shape, self.mask = (B, Hq, Nq, Nk), mask_of(mask)
        grad_out = random(B, Nq, Hq, Dv)
        if upstream == "expanded":
            grad_out = grad_out[:, :1, :, :1].expand(B, Nq, Hq, Dv)
        elif upstream == "transposed":
            grad_out = random(Dv, Hq, Nq, B).permute(3, 2, 1, 0)
        self.upstream = (
            grad_out if out else None,
            random(B, Hq, Nq) if lse else None,
            random(B, Hq, Nk) if sums else None,
        )

    def cast(self, name, t, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = name in ("query", "key", "value", "bias", "out", "grad_out")
        return None if t is None else t.to(dtype if narrow else wide)

    def arguments(self, dtype, precision=None):
        """Of the op, cast to dtype and then to another precision."""
        of = lambda t: t if t is None or precision is None else t.to(precision)  # noqa: E731
        tensors = [of(self.cast(n, t, dtype)) for n, t in self.tensors.items()]
        program = kernel_program(self.mask, self.shape, tensors[0], packed=True)
        x = Inputs(*tensors, self.seed, program, **self.numbers)
        names = ("grad_out", "grad_lse", "grad_sums")
        pairs = zip(names, self.upstream, strict=True)
        return arguments_of(x), [of(self.cast(n, t, dtype)) for n, t in pairs]

    def gradients(self, dtype, wanted=127):
        """Of the kernel, from truth's results rounded to dtype; and truth."""
        exact, upstream = self.arguments(dtype, torch.float64)
        with weft.use("reference"):
            out, lse, _, normalizer = forward(*exact, False)
            truth = backward(*exact, *upstream, out, lse, normalizer, wanted)
        args, upstream = self.arguments(dtype)
        results = [self.cast("out", out, dtype)]
        results += [self.cast("lse", t, dtype) for t in (lse, normalizer)]
        with weft.use("cpu"):
            grads = backward(*args, *upstream, *results, wanted)
        return grads, truth


def check(problem, dtype, wanted=127, tolerance=1.0):
    grads, truth = problem.gradients(dtype, wanted)
    for name, grad, expected in zip(NAMES, grads, truth, strict=True):
        assert grad.shape == expected.shape and grad.is_contiguous(), name
        if not grad.numel():
            continue
        assert grad.isfinite().all(), name
        error = (grad.double() - expected).abs().max()
        # Sums over all that a small gradient comes from cancel: their size counts.
        size = max(t.abs().max() for t in (expected, truth[0]) if t.numel())
        assert error <= tolerance * TOLERANCE[dtype] * size, (name, float(error), float(size))
    return grads


DENSE = torch.rand(2, 2, 70, 90, generator=torch.Generator().manual_seed(1)) > 0.6
DENSE[:, :, 5] = False  # queries that see nothing
DENSE[..., 7] = False  # and keys that nobody sees
BIASES = [
    (batch, head, query, key)
    for batch in (1, 2)
    for head in (1, 4)
    for query in (1, 70)
    for key in (1, 90)
]
CASES = {
    "plain": {},
    "no lse": {"lse": False},
    "grouped": {"Hq": 6, "Hkv": 2},
    "causal": {"mask": Causal(3)},
    "dense": {"mask": DENSE},
    "lengths": {"mask": Lengths(query=torch.tensor([70, 0]), key=torch.tensor([33, 90]))},
    "sink": {"sink": True},
    "key weight": {"key_weight": 1},
    "key weights, sink": {"key_weight": 2, "sink": True, "Hkv": 1},
    "sums": {"sums": True},
    "sums alone": {"sums": True, "out": False, "lse": False},
    "weighted sums": {"sums": True, "query_weight": 1, "mask": DENSE, "Hkv": 1},
    "lse alone": {"out": False},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "expanded": {"upstream": "expanded"},
    "transposed": {"upstream": "transposed"},
    "chunks": {"B": 1, "Hq": 2, "Nq": 300, "Nk": 200, "bias": (1, 2, 300, 200)},
    "chunks of keys": {
        "B": 1,
        "Hq": 2,
        "Nq": 300,
        "Nk": 70,
        "bias": (1, 1, 1, 70),
        "key_weight": 1,
    },
    "windows": {"B": 20, "Hq": 3, "Nq": 49, "Nk": 49, "D": 32, "Dv": 32, "bias": (1, 3, 49, 49)},
    "narrow window": {"Nq": 300, "Nk": 280, "mask": Window(20, 20), "bias": (1, 2, 300, 280)},
    "window, whole bias": {"Nq": 150, "Nk": 280, "mask": Window(20, 20), "bias": (2, 2, 150, 280)},
    "everything": {
        "Hkv": 1,
        "mask": DENSE,
        "bias": (1, 2, 70, 90),
        "sink": True,
        "key_weight": 2,
        "sums": True,
        "query_weight": 2,
        "softcap": 2.0,
        "dropout_p": 0.3,
    },
}


# Between the first and the last level, float64 and float16 run what float32 does.
OUTER = {*LEVELS[:1], *LEVELS[-1:]}
PAIRS = [
    (level, dtype)
    for level in LEVELS
    for dtype in TOLERANCE
    if level in OUTER or dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("level, dtype", PAIRS, indirect=["level"])
@pytest.mark.parametrize("case", CASES)
def test_options(level, case, dtype):
    check(Problem(**CASES[case]), dtype)


@pytest.mark.parametrize("mask", [None, DENSE[:, :1]], ids=["all", "masked"])
@pytest.mark.parametrize("bias", BIASES)
def test_biases(level, bias, mask):
    check(Problem(Hq=4, Hkv=2, bias=bias, mask=mask), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None)
@given(
    Nq=st.integers(1, 130),
    Nk=st.integers(1, 130),
    D=st.integers(1, 70),
    Dv=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    causal=st.booleans(),
    biased=st.booleans(),
)
def test_sizes(dtype, Nq, Nk, D, Dv, heads, causal, biased):
    Hq, Hkv = heads
    bias = (1, Hq, Nq, Nk) if biased else None
    mask = Causal(Nk - Nq // 2) if causal else None
    problem = Problem(2, Hq, Hkv, Nq, Nk, D, Dv, mask=mask, bias=bias)
    for level in LEVELS:
        with native.use_level(level):
            check(problem, dtype)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 5, 4, 0), (5, 5, 0, 4)])
def test_nothing(level, sizes):
    Nq, Nk, D, Dv = sizes
    problem = Problem(Nq=Nq, Nk=Nk, D=D or 1, Dv=Dv, bias=(1, 2, Nq, Nk), sink=True)
    if not D:
        for name in ("query", "key"):
            problem.tensors[name] = problem.tensors[name][..., :0]
    check(problem, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gradient_alone(level, dtype):
    problem = Problem(**CASES["everything"])
    together = check(problem, dtype)
    for n, name in enumerate(NAMES):
        alone, _ = problem.gradients(dtype, 1 << n)
        for m, grad in enumerate(alone):
            assert torch.equal(grad, together[m]) if m == n else grad.shape == (0,), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_mask_hides_does_not_leak(level, dtype):
    clean = Problem(mask=DENSE, bias=(1, 2, 70, 90), sums=True)
    spoilt = Problem(mask=DENSE, bias=(1, 2, 70, 90), sums=True)
    for name, rows in (("key", 7), ("value", 7), ("query", 5)):
        spoilt.tensors[name][:, :, rows] = torch.nan
    spoilt.upstream[0][:, 5] = torch.inf
    spoilt.upstream[1][:, :, 5] = torch.nan
    args, upstream = clean.arguments(dtype)
    with weft.use("reference"):
        out, lse, _, normalizer = forward(*args, False)
    results = out, lse, normalizer
    with weft.use("cpu"):
        expected = backward(*args, *upstream, *results, 127)
        args, upstream = spoilt.arguments(dtype)
        for a, b in zip(backward(*args, *upstream, *results, 127), expected, strict=True):
            assert torch.equal(a, b)


def test_a_hidden_row_of_a_bias(level):
    problem = Problem(bias=(1, 1, 70, 90), lse=False)
    problem.tensors["bias"][..., 11] = torch.finfo(torch.float32).min
    problem.tensors["bias"][..., 4, :] = -torch.inf
    grads = check(problem, torch.float32)
    assert (grads[0][:, 4] == 0).all() and (grads[1][:, 11] == 0).all()


@pytest.mark.parametrize("case", ["plain", "everything", "chunks", "windows", "chunks of keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(level, dtype, case):
    problem, threads = Problem(**CASES[case]), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4, 2):
            torch.set_num_threads(count)
            results.append(problem.gradients(dtype)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_sums_in_float32(level):
    """Long sums: the error is at most 1.3 times that of rounding the result."""
    N = 2048
    problem = Problem(B=1, Hq=1, Nq=N, Nk=128, D=32, Dv=32, lse=False)
    (_, key, value, *_), (_, key_truth, value_truth, *_) = problem.gradients(torch.bfloat16)
    for grad, truth in ((key, key_truth), (value, value_truth)):
        floor = (truth.to(torch.bfloat16).double() - truth).norm()
        assert (grad.double() - truth).norm() <= 1.3 * floor


MEMORY = """
import sys
import torch, weft
from weft.benchmarks.memory import _resident, _return_free_pages
from weft.masks import Window

def call(N, shared):
    q, k, v = (torch.randn(1, 2, N, 64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 1, N, requires_grad=True) if shared else None
    x = [q, k, v] + [bias] * shared
    mask = None if shared else Window(1000, 0)
    out = weft.attention(q, k, v, mask=mask, bias=bias)
    return lambda: torch.autograd.grad(out, x, torch.ones_like(out))

N, shared = int(sys.argv[1]), sys.argv[2] == "bias"
torch.set_num_threads(2)
call(64, shared)()
prepared = call(N, shared)
_return_free_pages()
before = _resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
prepared()
print(_resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["window", "bias"])
def test_memory_does_not_grow_with_the_pairs(kind):
    N = 8192  # one head's scores are 256 MB
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(N), kind], capture_output=True, text=True, check=True
    )
    gradients = 3 * 2 * N * 64 * 4
    assert int(done.stdout) <= 7 * gradients + (16 << 20)  # the sums of 8 chunks of queries
