"""Muon, an optimizer for convolutions (Jordan 2024, https://kellerjordan.github.io/posts/muon/), with three
steps of its iteration and weights of a fixed norm, as in https://github.com/KellerJordan/cifar10-airbench."""

import torch

from common.device import DTYPES


def orthogonalize(matrix, precision="fp32", steps=3):
    """The matrix [M, N] with its singular vectors kept and its singular values near 1 (0.3 to 1.2, say, after
    3 steps, unless they were tiny). Newton–Schulz iteration: each step applies an odd polynomial to the
    singular values, with Jordan's coefficients, which raise small ones fastest. `precision` is that of the
    matrix products."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)  # no singular value exceeds 1
    if precision != "fp32":
        x = x.to(DTYPES[precision])
    for _ in range(steps):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)  # 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with Nesterov momentum, whose step for a weight is orthogonalised, so that
    it moves all directions of the weight alike. `params` are weights [out, in, height, width] of
    convolutions, each followed by a batch norm. So their scale does not matter, and before each step they are
    given the norm of a matrix [out, in · height · width] whose singular values are 1 (√2 times that where it
    has more rows than columns), which makes `lr` the relative size of a step."""

    def __init__(self, params, lr, momentum, precision):
        super().__init__(params, dict(lr=lr, momentum=momentum, precision=precision))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"]
                momentum.mul_(group["momentum"]).add_(weight.grad)
                gradient = weight.grad.add(momentum, alpha=group["momentum"]).flatten(1)
                direction = orthogonalize(gradient, group["precision"]).view_as(weight)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.sub_(direction, alpha=group["lr"])
