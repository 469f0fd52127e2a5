"""Masks of attention as programs, with what they mean written down densely, for tests."""

import torch
from hypothesis import strategies as st

PLACES = torch.arange(64)
B, H = 4, 2
SIZES = [(1, 1), (63, 64), (64, 65), (65, 130), (130, 63), (200, 1)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pack(allowed):
    """Words and states of a bool matrix (..., Nq, Nk), tile by tile."""
    *planes, Nq, Nk = allowed.shape
    words = torch.zeros(*planes, Nq, -(-Nk // 64), dtype=torch.int64)
    for w in range(words.shape[-1]):
        some = allowed[..., 64 * w : 64 * w + 64].long()
        words[..., w] = (some << PLACES[: some.shape[-1]]).sum(-1)
    states = torch.zeros(*planes, -(-Nq // 64), -(-Nk // 64), dtype=torch.uint8)
    for i in range(states.shape[-2]):
        for j in range(states.shape[-1]):
            tile = allowed[..., 64 * i : 64 * i + 64, 64 * j : 64 * j + 64].flatten(-2)
            states[..., i, j] = tile.any(-1).to(torch.uint8) + tile.all(-1).to(torch.uint8)
    return words, states


def repeated(t):
    """(B', H', ...) to (B, H, ...)."""
    return t[torch.arange(B) % t.shape[0]][:, torch.arange(H) % t.shape[1]]


def window(p, other, length, kernel, dilation):
    """Whether position p sees another: by listing the members of its residue."""
    members = [x for x in range(length) if x % dilation == p % dilation]
    centre = members.index(p)
    start = min(max(centre - kernel // 2, 0), len(members) - kernel)
    return other in members[start : start + kernel]


# Each leaf gives its token, integers, tensors and what it means, (B, H, Nq, Nk) bool.


def band(Nq, Nk, lo, hi):
    distance = torch.arange(Nk) - torch.arange(Nq)[:, None]
    return "band", [lo, hi], [], ((distance >= lo) & (distance <= hi)).expand(B, H, Nq, Nk)


def band_rows(Nq, Nk, lo, hi, batches=1, seed=0):
    shift = torch.randint(-40, 40, (batches, Nq), generator=generator(seed))
    distance = torch.arange(Nk) - torch.arange(Nq)[:, None] - repeated(shift[:, None])[..., None]
    return "band_rows", [lo, hi], [shift], (distance >= lo) & (distance <= hi)


def lengths(Nq, Nk, of_keys, batches, seed=0):
    n = Nk if of_keys else Nq
    values = torch.randint(-1, n + 3, (batches,), generator=generator(seed))
    index = torch.arange(Nk) if of_keys else torch.arange(Nq)[:, None]
    meaning = index < repeated(values[:, None])[..., None, None]
    name = "key_lengths" if of_keys else "query_lengths"
    return name, [], [values], meaning.expand(B, H, Nq, Nk)


def segments(Nq, Nk, batches, heads, sort, seed=0):
    ids = [
        torch.randint(-3, 3, (batches, heads, n), generator=generator(seed + n)) * 2**40
        for n in (Nq, Nk)
    ]
    if sort:
        ids = [one.sort(-1).values for one in ids]
    return "segments", [], ids, repeated(ids[0])[..., None] == repeated(ids[1])[..., None, :]


def neighborhood(shape, kernel, dilation):
    n = torch.Size(shape).numel()
    allowed = torch.ones(n, n, dtype=torch.bool)
    step = n
    for length, k, d in zip(shape, kernel, dilation, strict=True):
        step //= length
        sees = torch.tensor(
            [[window(p, x, length, k, d) for x in range(length)] for p in range(length)]
        ).reshape(length, length)
        position = torch.arange(n) // step % length
        allowed &= sees[position[:, None], position]
    return "neighborhood", [len(shape), *shape, *kernel, *dilation], [], allowed.expand(B, H, n, n)


def blocks(Nq, Nk, block_q, block_k, batches, heads, seed=0):
    shape = (batches, heads, -(-Nq // block_q), -(-Nk // block_k))
    seen = torch.rand(shape, generator=generator(seed)) < 0.4
    i, j = torch.arange(Nq)[:, None] // block_q, torch.arange(Nk) // block_k
    return "blocks", [block_q, block_k], [seen], repeated(seen[:, :, i, j])


def dense_tensor(Nq, Nk, batches, heads, layout, seed):
    """Some rows, columns and tiles of it are all or nothing."""
    x = torch.rand(batches, heads, Nq, Nk, generator=generator(seed)) < 0.5
    x[..., : Nq // 2, : Nk // 3] = True
    x[..., Nq // 2 :, : Nk // 2] = False
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        wide = torch.ones(batches, heads, Nq + 1, 3 * Nk + 2, dtype=torch.bool)
        wide[:, :, 1:, 1 : 3 * Nk + 1 : 3] = x
        return wide[:, :, 1:, 1 : 3 * Nk + 1 : 3]
    if layout == "expanded":
        return x[:, :, :1].expand(x.shape)
    if layout == "expanded keys":
        return x[..., :1].expand(x.shape)
    return x


def dense(Nq, Nk, batches, heads, layout="rows", seed=0):
    x = dense_tensor(Nq, Nk, batches, heads, layout, seed)
    return "dense", [], [x], repeated(x).expand(B, H, Nq, Nk)


def dense_row(Nq, Nk, batches, heads, seed=0):
    x = torch.rand(batches, heads, 1, Nk, generator=generator(seed)) < 0.5
    return "dense", [], [x], repeated(x).expand(B, H, Nq, Nk)


def dense_column(Nq, Nk, batches, heads, seed=0):
    x = torch.rand(batches, heads, Nq, 1, generator=generator(seed)) < 0.5
    return "dense", [], [x], repeated(x).expand(B, H, Nq, Nk)


def bits(Nq, Nk, batches, heads, one_row, seed=0):
    x = dense_tensor(1 if one_row else Nq, Nk, batches, heads, "rows", seed)
    return "bits", [], [*pack(x)], repeated(x).expand(B, H, Nq, Nk)


def leaves(Nq, Nk):
    yield band(Nq, Nk, -(2**63), 0)
    yield band(Nq, Nk, -17, 5)
    yield band(Nq, Nk, 60, 2**63 - 1)
    yield band(Nq, Nk, 3, 2)
    yield band_rows(Nq, Nk, -20, 3, 1)
    yield band_rows(Nq, Nk, -(1 << 40), 0, B)
    yield lengths(Nq, Nk, True, B)
    yield lengths(Nq, Nk, False, 2)
    yield segments(Nq, Nk, B, 1, True)
    yield segments(Nq, Nk, 2, H, False)
    yield neighborhood([Nq], [min(Nq, 5)], [1])
    yield blocks(Nq, Nk, 16, 32, 1, H)
    yield blocks(Nq, Nk, 7, 100, B, 1)
    for layout in ("rows", "transposed", "strided", "expanded", "expanded keys"):
        yield dense(Nq, Nk, 2, 1, layout)
    yield dense_row(Nq, Nk, B, H)
    yield dense_column(Nq, Nk, 1, H)
    yield bits(Nq, Nk, 2, H, False)
    yield bits(Nq, Nk, B, 1, True)


@st.composite
def programs(draw):
    """A random program over random leaves, with its meaning."""
    Nq, Nk = draw(st.sampled_from([(65, 130), (100, 64), (33, 190)]))
    seed = st.integers(0, 2**31)
    planes = st.sampled_from([(1, 1), (B, 1), (2, H), (1, H)])

    def leaf():
        kind = draw(
            st.sampled_from(["band", "rows", "keys", "segments", "blocks", "dense", "bits"])
        )
        if kind == "band":
            lo = draw(st.integers(-150, 150))
            return band(Nq, Nk, lo, lo + draw(st.integers(0, 150)))
        if kind == "rows":
            return band_rows(Nq, Nk, -30, draw(st.integers(-30, 60)), 2, draw(seed))
        if kind == "keys":
            return lengths(Nq, Nk, draw(st.booleans()), B, draw(seed))
        batches, heads = draw(planes)
        if kind == "segments":
            return segments(Nq, Nk, batches, heads, draw(st.booleans()), draw(seed))
        if kind == "blocks":
            sizes = draw(st.sampled_from([(16, 16), (64, 128), (30, 11)]))
            return blocks(Nq, Nk, *sizes, batches, heads, draw(seed))
        if kind == "dense":
            layout = draw(st.sampled_from(["rows", "transposed", "strided"]))
            return dense(Nq, Nk, batches, heads, layout, draw(seed))
        return bits(Nq, Nk, batches, heads, draw(st.booleans()), draw(seed))

    def tree(depth):
        kind = draw(st.sampled_from(["leaf", "&", "|", "~"])) if depth else "leaf"
        if kind == "leaf":
            return leaf()
        program, ints, tensors, meaning = tree(depth - 1)
        if kind == "~":
            return f"{program} ~", ints, tensors, ~meaning
        other, more_ints, more_tensors, its = tree(depth - 1)
        meaning = meaning & its if kind == "&" else meaning | its
        return f"{program} {other} {kind}", ints + more_ints, tensors + more_tensors, meaning

    return tree(3), Nq, Nk
