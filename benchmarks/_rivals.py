"""Optimizers that a user could pick instead: KFAC in plain torch, and several optimizers as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KFAC(torch.optim.Optimizer):
    """Kronecker-factored natural gradient of ``Linear`` and ``Conv2d`` layers, AdamW for the rest.

    Factors A = E[a aᵀ] of the inputs (1 appended) and G = E[g gᵀ] of the output gradients, averaged over the
    steps with weight ``ema``; (A + π√λ)⁻¹ and (G + √λ/π)⁻¹ by Cholesky every ``refresh`` steps, with π² the
    ratio of the mean eigenvalues; the whole step scaled so that lr² ⟨∇, F⁻¹∇⟩ ≤ ``clip``, then momentum. The
    factors are those of the gradients of the loss itself (empirical Fisher), so there is no second backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 0.3,
        ema: float = 0.95,
        refresh: int = 10,
        clip: float = 1e-2,
        rest_lr: float = 3e-3,
    ) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        own = {id(p) for layer in self.layers for p in layer.parameters(recurse=False)}
        rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        self.rest = torch.optim.AdamW(rest, lr=rest_lr, fused=True) if rest else None
        settings = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "ema": ema,
            "refresh": refresh,
            "clip": clip,
        }
        super().__init__([p for p in model.parameters() if id(p) in own], settings)
        self.count = 0
        self.seen: dict[nn.Module, list[Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._record)

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            self.seen[layer] = [inputs[0].detach()]
            output.register_hook(lambda gradient: self.seen[layer].append(gradient))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update from the gradients of the last backward pass."""
        group = self.param_groups[0]
        moves = {layer: self._direction(layer, group) for layer in self.layers if layer in self.seen}
        size = sum(float((move * _matrix(layer, "grad")).sum()) for layer, move in moves.items())
        scale = min(1.0, (group["clip"] / max(group["lr"] ** 2 * size, 1e-30)) ** 0.5)
        for layer, move in moves.items():
            buffer = self.state[layer.weight].setdefault("momentum", torch.zeros_like(move))
            buffer.mul_(group["momentum"]).add_(move, alpha=scale)
            width = buffer.shape[1] - (layer.bias is not None)
            layer.weight.sub_(buffer[:, :width].view_as(layer.weight), alpha=group["lr"])
            if layer.bias is not None:
                layer.bias.sub_(buffer[:, -1], alpha=group["lr"])
        self.seen.clear()
        self.count += 1
        if self.rest is not None:
            self.rest.step()

    def _direction(self, layer: nn.Module, group: dict[str, Any]) -> Tensor:
        """(G + √λ/π)⁻¹ ∇ (A + π√λ)⁻¹, the factors brought up to date."""
        state, (a, g) = self.state[layer.weight], _rows(layer, *self.seen[layer])
        keep = group["ema"] if state else 0.0
        for name, rows, n in (("A", a[0], a[1]), ("G", g[0], g[1])):
            new = rows.T @ rows / n
            state[name] = state[name].lerp_(new, 1 - keep) if keep else new
        if self.count % group["refresh"] == 0:
            a_mean, g_mean = (state[k].diagonal().mean().clamp(min=1e-12) for k in "AG")
            ratio, root = (a_mean / g_mean).sqrt(), group["damping"] ** 0.5
            for name, shift in (("A", root * ratio), ("G", root / ratio)):
                eye = torch.eye(len(state[name]), dtype=state[name].dtype, device=state[name].device)
                state[f"inverse {name}"] = torch.cholesky_inverse(
                    torch.linalg.cholesky(state[name] + shift * eye)
                )
        return state["inverse G"] @ _matrix(layer, "grad") @ state["inverse A"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        super().zero_grad(set_to_none)
        if self.rest is not None:
            self.rest.zero_grad(set_to_none)


def _matrix(layer: nn.Module, which: str) -> Tensor:
    """Gradient of weight and bias as one matrix, the bias as last column."""
    weight = layer.weight.grad.flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.grad[:, None]], 1)


def _rows(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
    """Inputs and output gradients as rows, each with what turns its Gram matrix into a factor.

    The gradients are those of a mean loss, so a sample's own are ``samples`` times as large.
    """
    if isinstance(layer, nn.Conv2d):
        samples, places = len(x), g.shape[2] * g.shape[3]
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        x, g = x.transpose(1, 2).flatten(0, 1), g.flatten(2).transpose(1, 2).flatten(0, 1)
        # sum over places for A, mean for G: places are taken as independent of each other
        weights = (float(samples), places / samples)
    else:
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        weights = (float(len(x)), 1 / len(x))
    if layer.bias is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return (x, weights[0]), (g, weights[1])


class Together(torch.optim.Optimizer):
    """Several optimizers, each for its own parameters, stepped as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = [part for part in parts if part.param_groups]
        super().__init__([p for p in _parameters(self.parts)], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Step every part."""
        for part in self.parts:
            part.step()


def _parameters(parts: list[torch.optim.Optimizer]) -> Iterator[Tensor]:
    for part in parts:
        for group in part.param_groups:
            yield from group["params"]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton–Schulz iterations, in float32.

    What ``torch.optim.Muon`` computes with ``adjust_lr_fn="match_rms_adamw"`` and no weight decay, which iterates in
    bfloat16; without units for that, as here, one product takes a hundred times as long as in float32.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(velocity, group["momentum"])  # Nesterov's
                tall = x.shape[0] > x.shape[1]
                x = x.mT if tall else x
                x = x / x.norm().clamp_min(1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + torch.addmm(-4.775 * gram, gram, gram, alpha=2.0315) @ x
                p.add_(x.mT if tall else x, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Muon on the hidden matrices, AdamW on all else, at one rate.

    Muon's update is rescaled to the size of AdamW's (``adjust_lr_fn``), as its authors advise for a shared rate. It
    takes matrices only: kernels of convolutions go to AdamW with vectors, embeddings and the read-out.
    """
    hidden = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad][:-1]
    taken = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True)]
    if hidden:
        parts.append(Muon(hidden, lr=lr))
    return Together(*parts)


def soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SOAP of pytorch-optimizer, as it comes but for the weight decay, which no contender here has."""
    from pytorch_optimizer import SOAP

    return SOAP([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
