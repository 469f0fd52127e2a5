"""What every layer promises: its state travels, and it runs compiled, in mixed precision, empty."""

import copy
import io

import pytest
import torch

from weft.nn import (
    BasisTransformation,
    ConceptProjection,
    CosineClassifier,
    ETFClassifier,
    GrassmannClassifier,
    MahalanobisHead,
    NearestMeanClassifier,
    OrthogonalCompatibleLayer,
    PartialFC,
    RBFClassifier,
    SimplexClassifier,
    TEENClassifier,
)
from weft.ops.cases import randn

D, C = 16, 10


def mean_head(make):
    def build(seed):
        head = make()
        head.update(randn(40, D, seed=seed), torch.arange(40) % C)
        return head

    return build


def mahalanobis(shared):
    def build(seed):
        a = randn(D, 2 * D, seed=seed) if shared else randn(C, D, 2 * D, seed=seed)
        return MahalanobisHead(randn(C, D, seed=seed + 1), a @ a.mT / D)

    return build


def seeded(make):
    def build(seed):
        torch.manual_seed(seed)
        return make()

    return build


LAYERS = {
    "simplex": seeded(lambda: SimplexClassifier(D + 1)),
    "etf": seeded(lambda: ETFClassifier(D, C, scale=4.0, normalize=True)),
    "etf without rotation": seeded(lambda: ETFClassifier(D, C, rotation=None)),
    "partial fc": seeded(lambda: PartialFC(D, C)),
    "cosine": seeded(lambda: CosineClassifier(D, C, learn_scale=True)),
    "nearest mean": mean_head(lambda: NearestMeanClassifier(D, C)),
    "simplecil": mean_head(lambda: NearestMeanClassifier(D, C, metric="cosine", scale=8.0)),
    "teen": mean_head(lambda: TEENClassifier(D, 6, C)),
    "mahalanobis shared": mahalanobis(True),
    "mahalanobis class": mahalanobis(False),
    "rbf": seeded(lambda: RBFClassifier(D, C, 12, width=8.0)),
    "guide": lambda seed: ConceptProjection(randn(4, D, seed=seed), 3),
    "ignore": lambda seed: ConceptProjection(randn(4, D, seed=seed), 3, mode="ignore"),
    "oca": seeded(lambda: OrthogonalCompatibleLayer(12, 4)),
    "grassmann": seeded(lambda: GrassmannClassifier(D, C, 3)),
}
LAYERS["basis transformation"] = seeded(lambda: Pair(BasisTransformation(D, 12, 4)))
every = pytest.mark.parametrize("name", LAYERS)


class Pair(torch.nn.Module):
    """Feeds a layer of two inputs from one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.flip(-1))


def flat(output):
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.cat([o.flatten() for o in outputs])


@every
def test_state_travels(name):
    """Through state_dict into a layer of another state, deepcopy, pickle, and both dtypes."""
    layer, other, x = LAYERS[name](0), LAYERS[name](5), randn(6, D, seed=9)
    expected = flat(layer(x))
    if layer.state_dict():
        assert not torch.equal(flat(other(x)), expected)
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = LAYERS[name](5)
    saved.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(layer), other, saved):
        assert torch.equal(flat(twin(x)), expected)
    double = copy.deepcopy(layer).to(torch.float64)(x.double())
    assert flat(double).dtype == torch.float64
    torch.testing.assert_close(flat(double).float(), expected, rtol=1e-4, atol=1e-4)


@every
def test_autocast(name):
    layer, x = LAYERS[name](0), randn(6, D, seed=9).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = flat(layer(x))
    expected = flat(layer(x))
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02 * scale)
    output.float().square().sum().backward()
    assert x.grad.isfinite().all()


@every
def test_half_precision_of_the_whole_layer(name):
    layer, x = LAYERS[name](0), randn(6, D, seed=9)
    expected = flat(layer(x))
    if any(hasattr(m, "parametrizations") for m in layer.modules()):
        pytest.skip("PyTorch's orthogonal parametrizations need float32")
    output = flat(layer.to(torch.bfloat16)(x.bfloat16()))
    assert output.dtype == torch.bfloat16
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.03 * scale)


@every
def test_empty_batch_and_leading_dimensions(name):
    layer, x = LAYERS[name](0), randn(2, 3, D, seed=9)
    assert flat(layer(x[:0])).numel() == 0
    rows = flat(layer(x.reshape(6, D)))
    torch.testing.assert_close(flat(layer(x)), rows, rtol=1e-5, atol=1e-5)


@every
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    layer, x = LAYERS[name](0), randn(6, D, seed=9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(x)), flat(layer(x)), rtol=1e-5, atol=1e-5)


@every
def test_says_what_it_is(name):
    assert "in_features" in repr(LAYERS[name](0)) or "(rotation)" in repr(LAYERS[name](0))
