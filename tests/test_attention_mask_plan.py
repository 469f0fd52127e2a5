"""Mask plans: any mask as packed bits and states of tiles, by every implementation."""

import pytest
import torch
from attention_masks import (
    SIZES,
    B,
    H,
    band,
    blocks,
    dense,
    dense_row,
    generator,
    leaves,
    pack,
    programs,
    segments,
)
from conftest import IMPLEMENTATIONS, ON_GPU, name_and_device, running
from hypothesis import given, settings
from hypothesis import strategies as st


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


EVERYWHERE = [x for x in [*IMPLEMENTATIONS, *ON_GPU] if x.startswith(("reference", "cpu"))]


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
