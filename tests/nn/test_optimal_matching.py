"""SuperGlue's head, against loops over pairs."""

import pytest
import torch

import weft
from weft.nn import OptimalMatching


def head_and_points(dtype=torch.float64):
    torch.manual_seed(0)
    head = OptimalMatching(8, iterations=30, threshold=0.3, dtype=dtype)
    with torch.no_grad():
        head.projection.weight.copy_(3 * torch.eye(8))
    y = torch.randn(2, 6, 8, dtype=dtype)
    x = torch.stack([y[0, [3, 1, 5, 0, 2]], y[1, [2, 4, 1, 1, 5]]])
    return head, x + 0.3 * torch.randn_like(x), y


def test_matches_are_mutual():
    head, x, y = head_and_points()
    found = head(x, y)
    W, bias = head.projection.weight, head.projection.bias
    S = torch.einsum("bnd,bmd->bnm", x @ W.T + bias, y @ W.T + bias) / 8**0.5
    Z = weft.log_optimal_transport(S, head.dustbin_score, 30)
    torch.testing.assert_close(found.log_assignment, Z)
    P = Z.exp()
    for n in range(2):
        x_matches, y_matches, x_scores, y_scores = [-1] * 5, [-1] * 6, [0.0] * 5, [0.0] * 6
        for i in range(5):
            for j in range(6):
                p = float(P[n, i, j])
                if p == float(P[n, i, :6].max()) and p == float(P[n, :5, j].max()):
                    x_scores[i] = y_scores[j] = p
                    if p > 0.3:
                        x_matches[i], y_matches[j] = j, i
        assert found.x_matches[n].tolist() == x_matches
        assert found.y_matches[n].tolist() == y_matches
        torch.testing.assert_close(found.x_scores[n], torch.tensor(x_scores, dtype=P.dtype))
        torch.testing.assert_close(found.y_scores[n], torch.tensor(y_scores, dtype=P.dtype))
    assert found.x_matches[0].tolist() == [3, 1, 5, 0, 2]


def test_loss_and_padding():
    head, x, y = head_and_points()
    x_targets = torch.tensor([[3, 1, 5, 0, 2], [2, 4, 1, -1, -2]])
    y_targets = torch.tensor([[3, 1, 4, 0, -1, 2], [-1, 2, 0, -2, 1, -1]])
    Z = head(x, y).log_assignment
    expected = 0.0
    for n in range(2):
        for i, j in enumerate(x_targets[n].tolist()):
            expected -= float(Z[n, i, j if j >= 0 else 6]) if j >= -1 else 0.0
        for j, i in enumerate(y_targets[n].tolist()):
            expected -= float(Z[n, 5, j]) if i == -1 else 0.0
    loss = head.loss(Z, x_targets, y_targets)
    torch.testing.assert_close(loss, torch.tensor(expected / 2, dtype=Z.dtype))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
    cut = head(x[:, :3], y[:, :4])
    padded = head(x, y, (torch.tensor([3, 3]), torch.tensor([4, 4])))
    assert torch.equal(padded.x_matches[:, :3], cut.x_matches)
    assert (padded.x_matches[:, 3:] == -1).all() and (padded.y_scores[:, 4:] == 0).all()


def test_errors_and_nothing_to_match():
    head, x, y = head_and_points()
    assert head(x[:, :0], y).y_matches.eq(-1).all()
    with pytest.raises(ValueError, match="threshold"):
        OptimalMatching(8, threshold=2.0)
    with pytest.raises(ValueError, match="y must be"):
        head(x, y[:1])
