"""What every op promises on a GPU beyond the contract: no wait for the device, and CUDA graphs."""

import pytest
import torch
from contract import SAMPLES, Call, name_of, tensors, unexpanded

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NOT_EMPTY = [(c, s) for c, s in SAMPLES if not s.name.startswith("no_")]


def prepared(cases, sample):
    """A function that computes results and gradients from what is on the device, and its inputs."""
    call = Call(cases, sample, torch.float32, DEVICE)
    if not cases.differentiable:
        return lambda: tensors(call()), [a for a in tensors(call.args) if a.is_floating_point()]
    leaves = call.leaves()
    upstream = [torch.randn_like(result) for result in tensors(call.with_leaves(leaves))]

    def run():
        results = tensors(call.with_leaves(leaves))
        return [*results, *torch.autograd.grad(results, leaves, upstream)]

    return run, leaves


@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_no_wait_for_the_device(cases, sample):
    run, _ = prepared(cases, sample)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cases, sample", NOT_EMPTY, ids=name_of)
def test_cuda_graph(cases, sample):
    """A captured step computes with the values that are in its inputs at replay."""
    run, inputs = prepared(cases, sample)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in inputs:
            unexpanded(tensor).mul_(0.5)
    expected = run()
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
