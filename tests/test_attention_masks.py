"""The masks of attention, against a dense evaluation written down here: tiles in C++, plans."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, ON_GPU, name_and_device, running
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import native

LEVELS = native.supported_levels()
EMPTY, PARTIAL, FULL = 0, 1, 2
PLACES = torch.arange(64)
B, H = 4, 2
SIZES = [(1, 1), (63, 64), (64, 65), (65, 130), (130, 63), (200, 1)]


@pytest.fixture(params=LEVELS)
def level(request):
    with native.use_level(request.param):
        yield request.param


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


def check_tiles(mask, Nq, Nk, planes, heights=(64, 16, 48)):
    program, ints, tensors, meaning = mask
    for (b, h), height in [(plane, height) for plane in planes for height in heights]:
        allowed = meaning[b, h]
        results = [
            native.cpu_op("attention_mask_tiles")(
                torch.zeros(0), program, ints, tensors, B, H, Nq, Nk, b, h, height, by_query
            )
            for by_query in (False, True)
        ]
        for by_query, (states, words, keys, queries, seen) in enumerate(results):
            assert torch.equal(seen.bool(), allowed.any(0))
            for i, (begin, end) in enumerate(keys.tolist()):
                rows = allowed[i * height : (i + 1) * height]
                assert 0 <= begin <= end <= Nk and rows[:, begin:end].sum() == rows.sum()
                for j in range(states.shape[1]):
                    tile = rows[:, 64 * j : 64 * j + 64]
                    expected = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
                    assert states[i, j] == expected, (program, i, j)
                    if expected == PARTIAL:
                        found = torch.zeros(64, 64, dtype=torch.bool)
                        found[: tile.shape[0], : tile.shape[1]] = tile
                        unpacked = (words[i, j][:, None] >> PLACES & 1).bool()
                        assert torch.equal(unpacked if by_query else unpacked.T, found)
            for j, (begin, end) in enumerate(queries.tolist()):
                columns = allowed[:, 64 * j : 64 * j + 64]
                assert 0 <= begin <= end <= Nq and columns[begin:end].sum() == columns.sum()


@pytest.mark.parametrize("Nq, Nk", SIZES)
def test_tiles_of_every_leaf(level, Nq, Nk):
    for mask in leaves(Nq, Nk):
        if mask[0] != "neighborhood" or Nq == Nk:
            check_tiles(mask, Nq, Nk, [(0, 0), (3, 1)])


NEIGHBORHOODS = [
    ([130], [7], [1]),
    ([130], [6], [3]),
    ([200], [3], [66]),
    ([9, 15], [3, 5], [1, 1]),
    ([9, 15], [4, 5], [2, 3]),
    ([70, 2], [3, 2], [5, 1]),
    ([2, 70], [2, 9], [1, 7]),
    ([3, 4, 11], [3, 2, 3], [1, 2, 3]),
    ([5, 1, 30], [5, 1, 1], [1, 1, 1]),
    ([1], [1], [1]),
]


@pytest.mark.parametrize("shape, kernel, dilation", NEIGHBORHOODS)
def test_neighborhoods(level, shape, kernel, dilation):
    mask = neighborhood(shape, kernel, dilation)
    n = mask[3].shape[-1]
    check_tiles(mask, n, n, [(0, 0)])


def test_everything(level):
    meaning = torch.ones(B, H, 65, 70, dtype=torch.bool)
    check_tiles(("", [], [], meaning), 65, 70, [(1, 1)])


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


@settings(max_examples=40, deadline=None)
@given(programs(), st.sampled_from(LEVELS), st.sampled_from([(0, 0), (3, 1), (1, 1)]))
def test_tiles_of_random_programs(program, level, plane):
    mask, Nq, Nk = program
    with native.use_level(level):
        check_tiles(mask, Nq, Nk, [plane], heights=(64, 16))


def planned(implementation, mask, Nq, Nk):
    program, ints, tensors, _ = mask
    _, device = name_and_device(implementation)
    tensors = [t.to(device) for t in tensors]
    like = tensors[0] if tensors else torch.zeros(0, device=device)
    with running(implementation):
        plan = torch.ops.weft.attention_mask_plan(like, program, ints, tensors, B, H, Nq, Nk)
    assert all(t.is_contiguous() for t in plan)
    return [t.cpu() for t in plan]


def check_plan(implementation, mask, Nq, Nk, one_row=False):
    program, ints, tensors, meaning = mask
    batches = max((t.shape[0] for t in tensors), default=1)
    heads = max((t.shape[1] for t in tensors if t.dim() > 2), default=1)
    expected = pack(meaning[:batches, :heads, :1] if one_row else meaning[:batches, :heads])
    found = planned(implementation, mask, Nq, Nk)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), program
    # What was planned is a mask again.
    again = planned(implementation, ("bits", [], found, meaning), Nq, Nk)
    assert torch.equal(again[1].amax((0, 1, 2)), found[1].amax((0, 1, 2)))
    assert again[0].shape[2] == Nq


EVERYWHERE = [*IMPLEMENTATIONS[: 1 + len(LEVELS)], *(x for x in ON_GPU if "reference" in x)]


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("Nq, Nk", SIZES)
def test_plan_of_every_leaf(implementation, Nq, Nk):
    for mask in leaves(Nq, Nk):
        if mask[0] != "neighborhood" or Nq == Nk:
            one_row = mask[0] == "key_lengths" or mask[0] == "dense" and mask[2][0].shape[2] == 1
            check_plan(implementation, mask, Nq, Nk, one_row)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("Nq, Nk", [(0, 70), (70, 0), (0, 0)])
def test_plan_of_nothing(implementation, Nq, Nk):
    for mask in [
        band(Nq, Nk, -5, 5),
        dense(Nq, Nk, 2, H),
        segments(Nq, Nk, B, 1, True),
        blocks(Nq, Nk, 16, 16, 1, H),
    ]:
        words, states = planned(implementation, mask, Nq, Nk)
        assert words.shape[2:] == (Nq, -(-Nk // 64))
        assert states.shape[2:] == (-(-Nq // 64), -(-Nk // 64))
    words, states = planned(implementation, dense_row(max(Nq, 1), Nk, B, H), Nq, Nk)
    assert words.shape == states.shape == (B, H, 1, -(-Nk // 64))
    none = ("dense", [], [torch.ones(0, 1, 5, 70, dtype=torch.bool)])
    with running(implementation):
        plan = torch.ops.weft.attention_mask_plan(none[2][0], *none, 0, H, 5, 70)
    assert [t.shape[0] for t in plan] == [0, 0]


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_plan_of_tensors_that_repeat_differently(implementation):
    """Of six batches two share one mask and three another: no two are alike."""
    x, y = (torch.rand(n, 1, 5, 70, generator=generator(n)) < 0.5 for n in (2, 3))
    with running(implementation):
        words, _ = torch.ops.weft.attention_mask_plan(x, "dense dense &", [], [x, y], 6, 1, 5, 70)
    assert torch.equal(words, pack(x.repeat(3, 1, 1, 1) & y.repeat(2, 1, 1, 1))[0])


@settings(max_examples=30, deadline=None)
@given(programs(), st.sampled_from(EVERYWHERE))
def test_plan_of_random_programs(program, implementation):
    mask, Nq, Nk = program
    rules = {token for token in mask[0].split() if token not in "&|~"}
    rows = {t.shape[2] for t in mask[2] if t.dim() == 4}
    check_plan(implementation, mask, Nq, Nk, rules <= {"dense", "key_lengths"} and rows <= {1})


def test_plan_of_many_threads_and_rows():
    """Several runs of tiles for each thread, cut by the edge."""
    x = torch.rand(2, 1, 70, 9000, generator=generator(0)) < 0.5
    x[:, :, :64, 64:4096] = True
    x[:, :, 64:, 4096:] = False
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.ops.weft.attention_mask_plan(x, "dense", [], [x], 2, 1, 70, 9000))
    torch.set_num_threads(before)
    expected = pack(x)
    for plan in found:
        assert all(torch.equal(one, other) for one, other in zip(plan, expected, strict=True))


def test_plan_is_an_op():
    x = torch.rand(2, 1, 65, 70, generator=generator(0)) < 0.5
    args = (x, "dense band &", [-3, 20], [x], 2, H, 65, 70)
    torch.library.opcheck(torch.ops.weft.attention_mask_plan.default, args)


@pytest.mark.parametrize(
    "program, ints, tensors",
    [
        ("band", [1], []),
        ("band &", [0, 1], []),
        ("band band", [0, 1, 0, 1], []),
        ("circle", [], []),
        ("band", [0, 1, 2], []),
        ("key_lengths", [], []),
        ("key_lengths", [], [torch.zeros(4)]),
        ("dense", [], [torch.ones(1, 1, 5, 8, dtype=torch.bool)]),
        ("dense", [], [torch.ones(1, 1, 5, 7)]),
        ("segments", [], [torch.zeros(1, 1, 5).long(), torch.zeros(1, 1, 5).long()]),
        ("neighborhood", [1, 7, 3, 3], []),
        ("blocks", [0, 1], [torch.ones(1, 1, 5, 7, dtype=torch.bool)]),
        ("bits", [], [torch.zeros(1, 1, 3, 1).long(), torch.zeros(1, 1, 1, 1).byte()]),
    ],
)
def test_what_is_not_a_program_is_refused(program, ints, tensors):
    with pytest.raises(RuntimeError, match="attention mask"):
        native.cpu_op("attention_mask_tiles")(
            torch.zeros(0), program, ints, tensors, B, H, 5, 7, 0, 0, 64, False
        )
