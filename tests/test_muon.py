"""Muon's step, against the singular value decomposition and against PyTorch's own implementation."""

import pytest
import torch

from common.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(64, 147), (64, 576), (128, 64), (10, 10)])
def test_singular_values_go_near_one_and_singular_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix *= 1e-6  # as small as gradients are
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    for steps, least in (3, 0.2), (5, 0.6):
        diagonal = u.T @ orthogonalize(matrix, steps=steps) @ vh.T
        values = diagonal.diagonal()
        assert (diagonal - values.diag()).abs().max() < 1e-6
        assert values[:-1].min() > least * (shape != (10, 10)) and values.max() < 1.25
    assert orthogonalize(torch.zeros(shape)).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_is_the_iteration_of_pytorch(precision):
    reference = pytest.importorskip("torch.optim._muon")._zeropower_via_newtonschulz  # computes in bf16
    matrix = torch.randn(32, 288, generator=torch.Generator().manual_seed(0))
    expected = reference(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    difference = orthogonalize(matrix, precision, steps=5).float() - expected
    assert difference.norm() < 0.05 * expected.norm()


def test_a_step_has_the_momentum_of_sgd_and_the_scale_of_the_weight_does_not_matter():
    """SGD's own first step of lr 1 from 0 is the Nesterov gradient; Muon's is orthogonal and relative."""
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 3, 3, 3), torch.randn(2, 8, 3, 3, 3)
    reference = torch.zeros(8, 3, 3, 3, requires_grad=True)
    sgd = torch.optim.SGD([reference], lr=1, momentum=0.9, nesterov=True)
    weights = [start.clone().requires_grad_(), (100 * start).requires_grad_()]
    muons = [Muon([weight], lr=0.1, momentum=0.9, precision="fp32") for weight in weights]
    expected = start
    for gradient in gradients:
        before, reference.grad = reference.detach().clone(), gradient
        sgd.step()
        direction = orthogonalize((before - reference.detach()).flatten(1)).view_as(start)
        expected = expected * 8**0.5 / expected.norm() - 0.1 * direction
        for weight, muon in zip(weights, muons):
            weight.grad = gradient
            muon.step()
            torch.testing.assert_close(weight.detach(), expected)
