"""Muon: AdamW with orthogonalised updates for weight matrices.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), scaled to AdamW's size of update so that both
share one learning rate (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ, STEPS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
RATE, SIZE = 4.0, 0.2
"""RATE: learning rate of matrices as a multiple of the group's; heads learn fastest at 2 to 4 (benchmarks/accuracy).
SIZE: the root mean square of an AdamW update, to which Liu et al. scale Muon's."""


def orthogonal(matrices: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Matrices (M, n, m) with their singular values moved close to 1, computed in `precision`; returns float32.

    By the Newton-Schulz iteration of `torch.optim.Muon`, which computes in bfloat16.
    """
    x = matrices.to(precision)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


class MuonAdamW(torch.optim.AdamW):
    """Updates `matrices` like `torch.optim.Muon`, at `RATE` times the learning rate of the group, and the rest by
    AdamW.

    `matrices` maps each parameter of Muon to the number of matrices stacked in it: 3 for a packed attention weight. The
    kernel (out, in, h, w) of a convolution is used as a matrix (out, in x h x w). Updates are orthogonalised in
    `precision`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        matrices: Mapping[nn.Parameter, int],
        precision: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        self.matrices, self.precision = dict(matrices), precision
        super().__init__(params, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [
                {**group, "params": [one for one in group["params"] if one not in self.matrices]} for group in groups
            ]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Update a group's matrices, those of one shape together."""
        alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter in self.matrices and parameter.grad is not None:
                rows = len(parameter) // self.matrices[parameter]
                alike[rows, parameter[0].numel()].append(parameter)
        rate = RATE * group["lr"]
        for (rows, columns), parameters in alike.items():
            updates = torch.cat([update.reshape(-1, rows, columns) for update in self._updates(parameters)])
            steps = orthogonal(updates, self.precision).split([self.matrices[one] for one in parameters])
            shaped = [step.reshape(parameter.shape) for parameter, step in zip(parameters, steps, strict=True)]
            torch._foreach_mul_([*parameters], 1 - rate * group["weight_decay"])
            torch._foreach_add_([*parameters], shaped, alpha=-rate * SIZE * max(rows, columns) ** 0.5)

    def _updates(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        """The gradients with Nesterov's momentum, in the parameters' shapes."""
        gradients, momenta = [], []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:  # AdamW expects a step count when it loads a checkpoint
                state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(parameter))
            gradients.append(parameter.grad)
            momenta.append(state["momentum_buffer"])
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates: tuple[Tensor, ...] = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        return updates
