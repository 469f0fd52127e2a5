"""Attention with any mask and any bias."""

from collections.abc import Callable

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.masks import Mask
from weft.ops.attention.biases import Bias, with_bias
from weft.ops.attention.inputs import (
    COUNT,
    SCHEMA,
    arguments_of,
    check_heads,
    check_not_negative,
    check_numbers,
    check_seed,
    check_sink,
    check_weight,
    inputs_of,
    mask_of,
    wide_dtype,
)
from weft.ops.attention.mask_plan import kernel_program
from weft.ops.checks import autocast
from weft.ops.registration import Op, cpu, reference, register_gradient, triton
from weft.reference.attention import attention as formula
from weft.reference.attention.attention import Inputs, Upstream


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    key_weight: Tensor | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_key_sums: bool = False,
    query_weight: Tensor | None = None,
    softcap: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Softmax attention with any mask and any bias, in memory that grows with the tokens alone.

    .. math::
        S = \mathrm{softcap}(\text{scale} \cdot Q K^\top) + \text{bias}, \qquad
        P_{ij} = \frac{u_j e^{S_{ij}}}{\sum_l u_l e^{S_{il}} + e^{\text{sink}}}, \qquad
        O = P V, \qquad c_j = \sum_i w_i P_{ij}

    over the keys that the mask lets query i see. Tiles without a visible pair are skipped. What a
    mask hides from all queries of a head is never read into a result, whatever it holds; a NaN in
    a key that some query sees may reach other queries near it.

    Args:
        query: ``(B, Hq, Nq, D)``, any strides; ``(B, N, D)`` tensors are one head.
        key: ``(B, Hkv, Nk, D)``; Hkv = Hq, or with ``enable_gqa`` a divisor of Hq.
        value: ``(B, Hkv, Nk, Dv)``.
        mask: True where a query sees a key: bool, broadcastable to ``(B, Hq, Nq, Nk)``, or a
            ``weft.masks.Mask``. None: everywhere.
        bias: added to the scores, broadcastable to ``(B, Hq, Nq, Nk)``, with gradient; or a
            ``weft.RelativeBias``, ``weft.DistanceBias`` or ``weft.LowRankBias``. A value at or
            below half of the smallest finite number of its dtype masks the pair.
        scale: of the products; 1 / √D if None.
        sink: ``(Hq,)``, one more logit in the denominator of each head.
        key_weight: u, ``(B, 1 or Hq, Nk)``, ≥ 0, multiplies the weights before they are
            normalized; 1 if None.
        enable_gqa: several query heads share a key head.
        dropout_p: the probability that a weight is left out of O (the others grow by 1/(1 − p)).
            ``return_key_sums`` sums the weights before that.
        return_lse: also :math:`\log \sum_j u_j e^{S_{ij}}`, ``(B, Hq, Nq)``, without the sink.
        return_key_sums: also c, ``(B, Hq, Nk)``: the attention that each key receives.
        query_weight: w of c, ``(B, 1 or Hq, Nq)``; 1 if None. A one-hot row picks one query.
        softcap: t in ``t tanh(x / t)`` of the scaled products; 0 for none.
        seed: () int64, of the dropout; drawn from PyTorch's generator if None.

    Returns:
        O ``(B, Hq, Nq, Dv)`` in the dtype of query, laid out as (B, Nq, Hq, Dv): transposing and
        joining the heads copies nothing. With ``return_lse`` or ``return_key_sums`` a tuple (O,
        lse, key sums) of what is asked for, these in float32 (float64 for float64). Where a query
        sees no key, O is 0, lse −∞, and all its gradients are 0. Differentiable twice in all float
        tensors. float64, float32, bfloat16 or float16; half precision accumulates in float32.
        ``bias``, ``sink`` and the weights are in the dtype of query or in float32.

    Raises:
        ValueError: shapes, devices or heads that do not match, numbers out of range, negative
            weights (on the CPU; on a GPU with ``weft.check_values(True)``).
        TypeError: dtypes that differ or are not supported.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1; computed in
    tiles as Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
    """
    query, key, value = autocast(query, key, value)
    check_heads(query, key, value, enable_gqa)
    if one_head := query.dim() == 3:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
    B, H, Nq, D = query.shape
    Nk = key.shape[2]
    scale = D**-0.5 if scale is None and D else 1.0 if scale is None else scale
    check_numbers(scale, softcap, dropout_p)
    mask = mask_of(mask)
    query, key, bias = with_bias(bias, query, key, scale, softcap)
    if sink is not None:
        sink = check_sink(sink, query)
    if key_weight is not None:
        key_weight = check_weight("key_weight", key_weight, query, Nk)
        check_not_negative("key_weight", key_weight)
    if query_weight is not None:
        if not return_key_sums:
            raise ValueError("query_weight goes with return_key_sums=True")
        query_weight = check_weight("query_weight", query_weight, query, Nq)
    seed = check_seed(seed, dropout_p, query)
    program = kernel_program(mask, (B, H, Nq, Nk), query, packed=not transformed())
    numbers = (float(scale), float(softcap), float(dropout_p))
    x = Inputs(query, key, value, bias, sink, key_weight, query_weight, seed, program, *numbers)
    run = formula.attention if transformed() else _run
    out, lse, sums, _ = run(x, return_key_sums)
    results = [out.transpose(1, 2)]
    results += [lse] * return_lse + [sums] * return_key_sums
    if one_head:
        results = [t.squeeze(1) for t in results]
    return results[0] if len(results) == 1 else tuple(results)


def _run(x: Inputs, key_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(*arguments_of(x), key_sums)


def _fake(query, key, value, *rest):
    B, Hq, Nq, _ = query.shape
    wide, Nk = wide_dtype(query), key.shape[2]
    sums = (B, Hq, Nk) if rest[-1] else (0,)
    return (
        query.new_empty(B, Nq, Hq, value.shape[3]),
        query.new_empty(B, Hq, Nq, dtype=wide),
        query.new_empty(sums, dtype=wide),
        query.new_empty(B, Hq, 2, Nq, dtype=wide),
    )


def _reference(*args):
    x = inputs_of(args)
    return tuple(t.contiguous() for t in formula.attention(x, args[COUNT]))


def _upstream(args: tuple) -> Upstream:
    grad_out, grad_lse, grad_sums, out, lse, _, _ = args[COUNT:]
    return Upstream(out, lse, grad_out, grad_lse, grad_sums)


def _gradient_shapes(args: tuple) -> list[tuple[torch.Size | tuple, torch.dtype]]:
    """Shape and dtype of the seven gradients; those of tokens are (B, N, H, D)."""
    tensors = (*args[:7],)
    rows = lambda t: (t.shape[0], t.shape[2], t.shape[1], t.shape[3])  # noqa: E731
    return [
        ((0,), args[0].dtype)
        if t is None or not args[-1] >> n & 1
        else (rows(t) if n < 3 else t.shape, t.dtype)
        for n, t in enumerate(tensors)
    ]


def _fake_backward(*args):
    return tuple(args[0].new_empty(s, dtype=d) for s, d in _gradient_shapes(args))


def _reference_backward(*args):
    grads = formula.attention_backward(inputs_of(args), _upstream(args))
    kinds = _gradient_shapes(args)
    return tuple(
        g.contiguous() if shape != (0,) else args[0].new_empty(shape)
        for g, (shape, _) in zip(grads, kinds, strict=True)
    )


def _heads_up_to(largest: int) -> Callable:
    def refuses(*args) -> str | None:
        """Reasons against the Triton kernels."""
        sizes = args[0].shape[3], args[2].shape[3]
        return None if max(sizes) <= largest else f"takes heads of up to {largest}, got {sizes}"

    return refuses


forward = Op(
    "attention",
    f"({SCHEMA}, bool key_sums) -> (Tensor, Tensor, Tensor, Tensor normalizer)",
    family="attention",
    fake=_fake,
    implementations=[
        cpu("attention"),
        triton("attention.attention", "attention", _heads_up_to(256)),
        reference(_reference),
    ],
)
backward = Op(
    "attention_backward",
    f"({SCHEMA}, Tensor? grad_out, Tensor? grad_lse, Tensor? grad_sums, Tensor out, Tensor lse, "
    "Tensor normalizer, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="attention",
    fake=_fake_backward,
    implementations=[
        cpu("attention_backward"),
        triton("attention.gradients", "attention_backward", _heads_up_to(128)),
        reference(_reference_backward),
    ],
)


def _save(ctx, args: tuple, *more: Tensor | None) -> None:
    ctx.save_for_backward(*args[:8], *args[10], *more)
    ctx.numbers = (args[8], args[9], args[11:COUNT])


def _saved(ctx) -> tuple[tuple, tuple]:
    """(the arguments of the schema, what was saved after them)."""
    program, ints, numbers = ctx.numbers
    saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
    rest, matrices = saved[8:], ctx.matrices
    tensors = list(rest[:matrices])
    return (*saved[:8], program, ints, tensors, *numbers), rest[matrices:]


def _no_gradients(args: tuple, more: int) -> list:
    """None for each argument, in the structure that PyTorch wants of lists."""
    lists = {9: None if args[9] else [], 10: [None] * len(args[10])}
    return [lists.get(n) for n in range(COUNT + more)]


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    out, lse, _, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    ctx.matrices = len(inputs[10])
    _save(ctx, inputs, out, lse, normalizer)
    ctx.key_sums = inputs[COUNT]


def _gradient(ctx, grad_out, grad_lse, grad_sums, _):
    args, results = _saved(ctx)
    result = _no_gradients(args, 1)
    if grad_out is None and grad_lse is None and grad_sums is None:
        return tuple(result)
    wanted = sum(1 << n for n in range(7) if args[n] is not None and ctx.needs_input_grad[n])
    if not wanted:
        return tuple(result)
    grad_sums = grad_sums if ctx.key_sums else None
    grads = backward(*args, grad_out, grad_lse, grad_sums, *results, wanted)
    for n, grad in enumerate(grads):
        if wanted >> n & 1:
            result[n] = grad.transpose(1, 2) if n < 3 else grad
    return tuple(result)


_DIFFERENTIABLE = ("query", "key", "value", "bias", "sink", "key_weight", "query_weight")
_OF_UPSTREAM = ("grad_out", "grad_lse", "grad_sums", "out", "lse")


def _setup_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.matrices = len(inputs[10])
    _save(ctx, inputs, *inputs[COUNT:-1])
    ctx.wanted = inputs[-1]


def _gradient_backward(ctx, *grads):
    args, upstream = _saved(ctx)
    result = _no_gradients(args, 7)
    if all(g is None or not ctx.wanted >> n & 1 for n, g in enumerate(grads)):
        return tuple(result)
    positions = {name: n for n, name in enumerate(_DIFFERENTIABLE)}
    positions |= {name: COUNT + n for n, name in enumerate(_OF_UPSTREAM)}
    asked = frozenset(name for name, n in positions.items() if ctx.needs_input_grad[n])
    given = tuple(g if ctx.wanted >> n & 1 else None for n, g in enumerate(grads))
    grad_out, grad_lse, grad_sums, out, lse, _ = upstream
    up = Upstream(out, lse, grad_out, grad_lse, grad_sums)
    second = formula.attention_double_backward(inputs_of(args), up, given, asked)
    for name, grad in second.items():
        result[positions[name]] = grad
    return tuple(result)


register_gradient(forward, _setup, _gradient)
register_gradient(backward, _setup_backward, _gradient_backward)
