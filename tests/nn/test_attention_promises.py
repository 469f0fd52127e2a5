"""What attention layers promise: dtypes, mixed precision, compilation, state, empty batches."""

import copy

import pytest
import torch

from weft.nn import (
    AggregatedAttention,
    ChannelPatchEmbedding,
    ChannelSpatialAttention,
    ClassCrossAttention,
    CompositionBridge,
    ConvProjectionAttention,
    CRATEBlock,
    CRATEDecoderBlock,
    CrossScaleFusion,
    FeatureSpaceAttention,
    FITBlock,
    GaussianMaskAttention,
    GaussianMixtureMask,
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    InteractingLayer,
    InvertedBlock,
    InvertedForecaster,
    LayerAttention,
    LengthScaledCosineAttention,
    LocalFrameAttention,
    MaskedCrossAttention,
    MultiwayBlock,
    NeighborhoodAttention,
    PolarizedSelfAttention,
    PrototypeCrossAttention,
    ReversedAttention,
    SparsifinerAttention,
    SubspaceAttention,
    TNTBlock,
    WindowAttention,
)
from weft.ops.cases import randn

# name: the layer, and the shapes of its inputs after the batch (numbers are passed as they are)
LAYERS = {
    "window": (lambda: WindowAttention(8, 2, 4), [(6, 7, 8)]),
    "shifted window": (lambda: WindowAttention(8, 2, 4, 2), [(6, 7, 8)]),
    "conv projection": (lambda: ConvProjectionAttention(8, 2), [(12, 8), 3, 4]),
    "class cross": (lambda: ClassCrossAttention(8, 2), [(5, 8)]),
    "cross scale": (lambda: fusion(), [(4, 6), (5, 8)]),
    "tnt": (lambda: tnt(), [(3, 5, 4), (4, 6)]),
    "polarized": (lambda: PolarizedSelfAttention(6), [(6, 3, 4)]),
    "polarized in turn": (lambda: PolarizedSelfAttention(6, "sequential"), [(6, 3, 4)]),
    "aggregated": (lambda: AggregatedAttention(8, (4, 5), 2, pool=2), [(20, 8)]),
    "length scaled": (lambda: LengthScaledCosineAttention(8, (3, 4), 2), [(12, 8)]),
    "feature space": (lambda: FeatureSpaceAttention(8, 2, 4, 2), [(4, 4, 8)]),
    "neighborhood": (lambda: NeighborhoodAttention(8, 2, 3), [(4, 5, 8)]),
    "local frames": (lambda: LocalFrameAttention(8, 6, 2, 1), [(8, 3, 4), (8, 3, 4), (6, 3, 4)]),
    "gaussian mask": (lambda: gaussian_mask(), [(12, 8)]),
    "hopfield": (lambda: Hopfield(8, 4, 2, steps=2), [(3, 8), (5, 8)]),
    "hopfield pooling": (lambda: HopfieldPooling(8, 2), [(5, 8)]),
    "hopfield lookup": (lambda: HopfieldLayer(8, 3), [(5, 8)]),
    "reversed": (lambda: ReversedAttention(8, 2), [(5, 8)]),
    "masked cross": (lambda: inside(MaskedCrossAttention(8, 2), 5), [(3, 8), (20, 8)]),
    "prototype cross": (lambda: inside(PrototypeCrossAttention(8, 2), 1), [(3, 8), (8, 4, 5)]),
    "sparsifiner": (lambda: Sparsifiner(), [(7, 8)]),
    "subspace": (lambda: SubspaceAttention(8, 2), [(5, 8)]),
    "crate": (lambda: CRATEBlock(8, 2), [(5, 8)]),
    "crate decoder": (lambda: CRATEDecoderBlock(8, 2), [(5, 8)]),
    "interacting": (lambda: InteractingLayer(6, 8, 2), [(5, 6)]),
    "inverted": (lambda: InvertedBlock(8, 2), [(5, 8)]),
    "forecaster": (lambda: InvertedForecaster(7, 3, 8, 1, 2), [(7, 5)]),
    "channel tokens": (lambda: ChannelPatchEmbedding(4, 2, 3, 6), [(3, 4, 4)]),
    "layers": (lambda: layer_attention(), [(3, 2, 3, 4)]),
    "channels and places": (lambda: channels_and_places(), [(3, 4, 5)]),
    "multiway": (lambda: MultiwayBlock(8, 2), [(3, 8), (4, 8)]),
    "bridge": (lambda: CompositionBridge(8, 6, 2), [(3, 8), (4, 6)]),
    "fit": (lambda: FITBlock(8, 6, num_heads=2, latent_heads=2), [(3, 5, 8), (3, 2, 6)]),
}
every = pytest.mark.parametrize("name", LAYERS)


class Together(torch.nn.Module):
    """Gives a layer its inputs in the form that it takes."""

    def __init__(self, layer, arrange):
        super().__init__()
        self.layer, self.arrange = layer, arrange

    def forward(self, *inputs):
        return self.layer(*self.arrange(*inputs))


class Sparsifiner(torch.nn.Module):
    """With what its predictor is trained by; all pairs, where rounding must not choose others."""

    def __init__(self):
        super().__init__()
        self.layer = SparsifinerAttention(8, 7, 2, keep=1.0)

    def forward(self, x):
        return self.layer(x), self.layer.approximate(x)


def fusion():
    return Together(CrossScaleFusion((6, 8), (3, 2)), lambda *branches: (branches,))


def tnt():
    """The pixels of a patch are a batch of their own."""
    layer = TNTBlock(4, 6, 5, 2, 3)
    return Together(layer, lambda pixels, patches: (pixels.flatten(0, 1), patches))


def inside(layer, count):
    """Behind a mask of the first pixels; of one, where rounding must not change what is chosen."""

    def masked(query, memory):
        seen = torch.arange(20) < count
        return query, memory, seen.expand(query.shape[0], 3, 20)

    return Together(layer, masked)


def layer_attention():
    layer = LayerAttention()
    torch.nn.init.normal_(layer.gamma)
    return layer


def channels_and_places():
    layer = ChannelSpatialAttention(3)
    torch.nn.init.normal_(layer.gamma)
    return layer


def gaussian_mask():
    layer = GaussianMaskAttention(8, (3, 4), 2, 4)
    torch.nn.init.constant_(layer.mask.sigma, 2.0)
    return layer


def build(name, seed=0):
    """In evaluation: what is random in training is left out, and batches are not statistics."""
    torch.manual_seed(seed)
    return LAYERS[name][0]().eval()


def inputs(name, batch=2, dtype=torch.float32):
    return [
        randn(batch, *given, dtype=dtype, seed=9 + i) if isinstance(given, tuple) else given
        for i, given in enumerate(LAYERS[name][1])
    ]


def flat(output):
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return torch.cat([o.flatten() for o in outputs])


def assert_rounded(output, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.03 * scale)


@every
def test_float64_and_state(name):
    layer, other = build(name), build(name, seed=5)
    expected = flat(layer(*inputs(name)))
    assert not torch.equal(flat(other(*inputs(name))), expected)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(flat(twin(*inputs(name))), expected)
    double = flat(other.double()(*inputs(name, dtype=torch.float64)))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)


@every
def test_autocast(name):
    layer, given = build(name), inputs(name)
    tensors = [x.requires_grad_() for x in given if isinstance(x, torch.Tensor)]
    with torch.autocast("cpu", torch.bfloat16):
        output = flat(layer(*given))
    assert_rounded(output, flat(layer(*given)))
    output.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in [*tensors, *layer.parameters()])


@every
def test_half_precision_of_the_whole_layer(name):
    expected = flat(build(name)(*inputs(name)))
    output = flat(build(name).bfloat16()(*inputs(name, dtype=torch.bfloat16)))
    assert output.dtype == torch.bfloat16
    assert_rounded(output, expected)


@every
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    layer = build(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        given = inputs(name)
        tensors = [x.requires_grad_() for x in given if isinstance(x, torch.Tensor)]
        output = flat(function(*given))
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@every
def test_empty_batch(name):
    assert flat(build(name)(*inputs(name, batch=0))).numel() == 0


def test_mask_compiles():
    torch._dynamo.reset()
    mask = GaussianMixtureMask((3, 4), 2)
    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), mask())
