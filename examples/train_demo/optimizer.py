"""Muon for the matrices, Adam for the rest (embedding, router, norms, scalars)."""

import torch
from torch import Tensor


def is_matrix(name: str, value: Tensor) -> bool:
    return value.ndim >= 2 and not any(part in name for part in ("embed_tokens", "router", "table"))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, nearly; [n, rows, columns].

    Newton-Schulz iteration with the coefficients of Jordan et al., Muon (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, then an orthogonal update; equal shapes are handled in one batch."""

    def __init__(self, values: list[Tensor], momentum: float = 0.95):
        self.values, self.momentum = values, momentum
        self.buffers = [torch.zeros_like(value) for value in values]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for value, buffer in zip(self.values, self.buffers, strict=True):
            if value.grad is None:  # self-conditioning in a step without it
                continue
            buffer.lerp_(value.grad, 1 - self.momentum)
            update = value.grad.lerp(buffer, self.momentum)
            for matrix, change in zip(
                value.flatten(0, -3) if value.ndim > 2 else [value],
                update.flatten(0, -3) if value.ndim > 2 else [update],
                strict=True,
            ):
                groups.setdefault(matrix.shape, []).append((matrix, change))
        for shape, pairs in groups.items():
            changes = orthogonal(torch.stack([change for _, change in pairs]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (matrix, _), change in zip(pairs, changes, strict=True):
                matrix.add_(change, alpha=-rate * scale)


class Optimizer:
    def __init__(self, weights: dict[str, Tensor], muon_rate: float, adam_rate: float):
        self.muon_rate = muon_rate
        self.muon = Muon([value for name, value in weights.items() if is_matrix(name, value)])
        rest = [value for name, value in weights.items() if not is_matrix(name, value)]
        self.adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.rest, self.adam_rate = rest, adam_rate

    def step(self, factor: float) -> None:
        """factor scales both rates: the schedule."""
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        self.muon.step(self.muon_rate * factor)
        for value in [*self.rest, *self.muon.values]:
            value.grad = None

    def state(self) -> dict:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers}

    def load(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]
