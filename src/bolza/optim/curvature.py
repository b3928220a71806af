r"""The curvature M of a layer's weights: the metric in which an optimizer's step is the steepest.

    identity   M = I
    rmsprop    M = diag(√v + ε),  v an exponential average of the squared gradient
    kronecker  M = (A + π√λ I) ⊗ (G + √λ/π I),  A = E[x xᵀ] of what enters, G = E[P Pᵀ] of what comes back

Each answers two questions, G_iᵀ M⁻¹ G_i for the gradient of every sample and M⁻¹ of a weighted sum of these
gradients, from the factors of the gradients, without forming them where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bolza.core.errors import DivergenceError
from bolza.ops.persample import Block, Dense, Outer, merge
from bolza.systems.signals import LayerSignal

__all__ = ["Curvature", "Diagonal", "Identity", "Kronecker", "Layer", "add_combination"]

_ROOM = 2**24  # numbers in a temporary block of explicit gradients


@dataclass(eq=False)
class Layer:
    """A layer whose gradients of single samples are known, in one step.

    Attributes:
        path: its name in the network.
        params: its trainable parameters, by their own names.
        states: the optimizer's states of these.
        groups: their parameter groups.
        calls: the layer's calls in each pass of the step.
        samples: number of samples in the passes.
        reduce: mean of a tensor over the group of processes; ``None`` for one process.
        cache: what a curvature keeps from one question to the next.
    """

    path: str
    params: dict[str, nn.Parameter]
    states: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    calls: Sequence[Sequence[LayerSignal]]
    samples: int
    reduce: Callable[[Tensor], Tensor] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def rescale(self, factor: float) -> None:
        """Multiply what came back to the layer, and so the gradients of the samples."""
        for signal in (signal for calls in self.calls for signal in calls):
            assert signal.returned is not None
            signal.returned = signal.returned * factor
        self.__dict__.pop("blocks", None)
        self.__dict__.pop("rows", None)

    @cached_property
    def blocks(self) -> tuple[dict[str, Block], ...]:
        """Gradients of the samples of each pass, by the parameters' own names."""
        found = []
        for calls in self.calls:
            parts = [call.blocks() for call in calls]
            found.append({name: merge([part[name] for part in parts]) for name in self.params})
        return tuple(found)

    @cached_property
    def rows(self) -> tuple[Outer, ...] | None:
        """Factors of the weight's gradient in each pass, a 1 for the bias appended; ``None`` if there are none."""
        if "weight" not in self.params:
            return None
        found = []
        for calls in self.calls:
            parts = [call.rows() for call in calls]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            x = _wide(torch.cat([part.inputs for part in known], 1))
            if "bias" in self.params:
                x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            found.append(Outer(x, _wide(torch.cat([part.signals for part in known], 1))))
        return tuple(found)


class Curvature(Protocol):
    """What a curvature does for one layer, and for one parameter alone."""

    def observe(self, layer: Layer) -> None:
        """Take the gradients of this step into account."""
        ...

    def norms(self, layer: Layer, k: int) -> Tensor:
        """Lr · g_iᵀ M⁻¹ g_i for the samples of pass ``k``, g_i their parts of the recorded gradient."""
        ...

    def apply(self, layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> None:
        """Step along M⁻¹(∇J + scale Σ_i (w_i − 1) g_i); plain for ``weights=None``."""
        ...

    def apply_alone(self, param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step along M⁻¹∇J for a parameter without a layer."""
        ...


def add_combination(out: Tensor, block: Block, c: Tensor, alpha: float = 1.0) -> None:
    """Add α Σ_i c_i g_i to ``out``, in place; one matrix product where the gradients are kept as factors."""
    c = c.to(out.dtype)
    if isinstance(block, Outer) and out.is_contiguous():
        p = (
            block.signals * c[:, None, None]
            if block.signals.shape[1] > 1
            else block.signals[:, 0] * c[:, None]
        )
        flat = out.reshape(block.signals.shape[2], block.inputs.shape[2])  # a view
        flat.addmm_(p.reshape(-1, p.shape[-1]).T, block.inputs.flatten(0, 1), alpha=alpha)
    elif isinstance(block, Dense) and out.is_contiguous():
        out.view(-1).addmv_(block.values.T, c, alpha=alpha)
    else:
        out.add_(block.combine(c[:, None]).reshape(out.shape), alpha=alpha)


def _corrected(layer: Layer, name: str, start: Tensor, weights: Sequence[Tensor], scale: float) -> Tensor:
    """Start + scale · Σ_i (w_i − 1) g_i, in place in ``start``; averaged over the processes."""
    if layer.reduce is None:
        for blocks, w in zip(layer.blocks, weights, strict=True):
            add_combination(start, blocks[name], w - 1, scale)
        return start
    change = torch.zeros_like(start, memory_format=torch.contiguous_format)
    for blocks, w in zip(layer.blocks, weights, strict=True):
        add_combination(change, blocks[name], w - 1, scale)
    return start.add_(layer.reduce(change))


def _with_decay(param: Tensor, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    return grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad


def _momentum(direction: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The velocity μ·velocity + direction; the direction itself without momentum."""
    if not group["momentum"]:
        return direction
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = direction.clone()
    else:
        state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


class Identity:
    """M = I, so that the step is that of stochastic gradient descent, with momentum and weight decay."""

    def observe(self, layer: Layer) -> None:
        """Nothing to take into account."""

    def norms(self, layer: Layer, k: int) -> Tensor:
        """Lr · |g_i|²."""
        return _sum(layer.groups[name]["lr"] * layer.blocks[k][name].squares() for name in layer.params)

    def apply(self, layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> None:
        """Step."""
        for name, param in layer.params.items():
            group = layer.groups[name]
            if (
                weights is not None
                and layer.reduce is None
                and not group["momentum"]
                and param.is_contiguous()
            ):
                # the recorded gradients add up to that of the parameter: one pass over it instead of two
                if group["weight_decay"]:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                for blocks, w in zip(layer.blocks, weights, strict=True):
                    add_combination(param, blocks[name], w, -group["lr"] * scale)
            else:
                self._step(layer, name, param, weights, scale)

    def _step(
        self, layer: Layer, name: str, param: nn.Parameter, weights: Sequence[Tensor] | None, scale: float
    ) -> None:
        group, grad = layer.groups[name], param.grad
        assert grad is not None
        direction = _with_decay(param, grad, group)
        if weights is not None:
            start = direction.clone(memory_format=torch.contiguous_format) if direction is grad else direction
            direction = _corrected(layer, name, start, weights, scale)
        param.add_(_momentum(direction, layer.states[name], group), alpha=-group["lr"])

    def apply_alone(self, param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step of stochastic gradient descent."""
        assert param.grad is not None
        param.add_(_momentum(_with_decay(param, param.grad, group), state, group), alpha=-group["lr"])


class Diagonal:
    """M = diag(√v + ε), so that the step is that of RMSprop."""

    def observe(self, layer: Layer) -> None:
        """Move the average of the squared gradient."""
        for name, param in layer.params.items():
            layer.cache[name] = self._denominator(param, layer.states[name], layer.groups[name])

    def _denominator(self, param: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        assert param.grad is not None
        grad = _with_decay(param, param.grad, group)
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(param)
        average: Tensor = state["square_avg"]
        average.mul_(group["alpha"]).addcmul_(grad, grad, value=1 - group["alpha"])
        return average.sqrt().add_(group["eps"])

    def norms(self, layer: Layer, k: int) -> Tensor:
        """Lr · Σ_j g_ij²/m_j."""
        return _sum(
            layer.groups[name]["lr"] * _weighted_squares(layer.blocks[k][name], 1 / layer.cache[name])
            for name in layer.params
        )

    def apply(self, layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> None:
        """Step."""
        for name, param in layer.params.items():
            group = layer.groups[name]
            assert param.grad is not None
            direction = _with_decay(param, param.grad, group)
            if weights is not None:
                start = direction.clone(memory_format=torch.contiguous_format)
                direction = _corrected(layer, name, start, weights, scale)
            self._go(param, direction, layer.cache.pop(name), layer.states[name], group)

    def apply_alone(self, param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step of RMSprop."""
        assert param.grad is not None
        denominator = self._denominator(param, state, group)
        self._go(param, _with_decay(param, param.grad, group), denominator, state, group)

    def _go(
        self,
        param: Tensor,
        direction: Tensor,
        denominator: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        if group["momentum"]:
            param.add_(_momentum(direction / denominator, state, group), alpha=-group["lr"])
        else:
            param.addcdiv_(direction, denominator, value=-group["lr"])


class Kronecker:
    """M = A ⊗ G with damping, for dense and convolutional layers; the identity for all other parameters."""

    def __init__(self) -> None:
        self._plain = Identity()

    def observe(self, layer: Layer) -> None:
        """Move the averages of the two factors, and invert them when it is time."""
        if layer.rows is None:
            return
        state, group = layer.states["weight"], layer.groups["weight"]
        count = int(state.get("kronecker_step", 0))
        if count % group["factor_every"] == 0:
            self._move_factors(layer, layer.rows, state, group)
        if count % group["refresh"] == 0:
            self._invert(layer, state, group)
        state["kronecker_step"] = count + 1

    def _move_factors(
        self, layer: Layer, rows: Sequence[Outer], state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        A = _sum(_second_moment(part.inputs) for part in rows) / layer.samples
        # the recorded signals carry 1/B, P = B p; G is the mean over places, A the sum
        G = _sum(_second_moment(part.signals) for part in rows) * (layer.samples / rows[0].inputs.shape[1])
        if layer.reduce is not None:
            A, G = layer.reduce(A), layer.reduce(G)
        if "input_factor" in state:
            state["input_factor"].lerp_(A, 1 - group["decay"])
            state["output_factor"].lerp_(G, 1 - group["decay"])
        else:
            state["input_factor"], state["output_factor"] = A, G

    def _invert(self, layer: Layer, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        A, G = state["input_factor"], state["output_factor"]
        a, g = A.diagonal().mean(), G.diagonal().mean()
        pi = (a / g.clamp_min(torch.finfo(g.dtype).tiny)).clamp(1e-12, 1e12).sqrt()
        root = group["damping"] ** 0.5
        state["input_inverse"] = _inverse(A, pi * root, layer.path)
        state["output_inverse"] = _inverse(G, root / pi, layer.path)

    def norms(self, layer: Layer, k: int) -> Tensor:
        """Lr · g_iᵀ M⁻¹ g_i."""
        if layer.rows is None:
            return self._plain.norms(layer, k)
        # the region of trust of the last step stands for that of this one, which is not known yet
        lr = layer.groups["weight"]["lr"] * layer.states["weight"].get("trust", 1.0)
        rows = layer.rows[k]
        if _explicit_is_smaller(rows):
            gradients = self._explicit(layer, k)
            state = layer.states["weight"]
            solved = state["output_inverse"] @ gradients @ state["input_inverse"]
            return lr * (solved * gradients).sum((1, 2))
        x, p = self._solved(layer, k)
        if x.shape[1] == 1:
            return lr * (x * rows.inputs).sum((1, 2)) * (p * rows.signals).sum((1, 2))
        return lr * ((x @ rows.inputs.mT) * (p @ rows.signals.mT)).sum((1, 2))

    def apply(self, layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> None:
        """Step."""
        if layer.rows is None:
            self._plain.apply(layer, weights, scale)
            return
        state, group = layer.states["weight"], layer.groups["weight"]
        height, width = state["output_factor"].shape[0], state["input_factor"].shape[0]
        count = sum(rows.inputs.shape[0] * rows.inputs.shape[1] for rows in layer.rows)
        if count * (height**2 + width**2) < height * width * (height + width):
            direction = layer.rows[0].inputs.new_zeros(height, width)
            for k in range(len(layer.rows)):
                x, p = self._solved(layer, k)
                if weights is not None:
                    p = p * weights[k][:, None, None]
                direction.addmm_(p.flatten(0, 1).T, x.flatten(0, 1), alpha=scale)
            if layer.reduce is not None:
                direction = layer.reduce(direction)
        else:
            gradient = _joined(layer.params["weight"], layer.params.get("bias"))
            if weights is not None:
                change = torch.zeros_like(gradient)
                for k, w in enumerate(weights):
                    self._add(layer, k, w - 1, change, scale)
                gradient = gradient + (change if layer.reduce is None else layer.reduce(change))
            direction = state["output_inverse"] @ gradient @ state["input_inverse"]
        direction.mul_(self._trust(layer, direction))
        for name, param in layer.params.items():
            part = (
                direction[:, -1] if name == "bias" else direction[:, : param[0].numel()].reshape(param.shape)
            )
            part = _with_decay(param, part, layer.groups[name])
            param.add_(_momentum(part, layer.states[name], group), alpha=-layer.groups[name]["lr"])

    def apply_alone(self, param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step of stochastic gradient descent."""
        self._plain.apply_alone(param, state, group)

    def _trust(self, layer: Layer, direction: Tensor) -> Tensor:
        """The factor that keeps the change of the layer's quadratic model, η²∇J·M⁻¹∇J, below κ."""
        state, group = layer.states["weight"], layer.groups["weight"]
        width = layer.params["weight"][0].numel()
        change = (_grad(layer, "weight").flatten(1) * direction[:, :width]).sum()
        if "bias" in layer.params:
            change = change + (_grad(layer, "bias") * direction[:, -1]).sum()
        limit = group["trust"] / (group["lr"] ** 2 * change.abs()).clamp_min(torch.finfo(change.dtype).tiny)
        state["trust"] = limit.sqrt().clamp_max(1.0)
        return state["trust"]

    def _solved(self, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        """A⁻¹x and G⁻¹p of every row."""
        if ("solved", k) not in layer.cache:
            assert layer.rows is not None
            state, rows = layer.states["weight"], layer.rows[k]
            layer.cache["solved", k] = (
                rows.inputs @ state["input_inverse"],
                rows.signals @ state["output_inverse"],
            )
        return layer.cache["solved", k]

    def _explicit(self, layer: Layer, k: int) -> Tensor:
        """The gradients of the samples, (n, height, width)."""
        if ("explicit", k) not in layer.cache:
            blocks = layer.blocks[k]
            weight = layer.params["weight"]
            parts = [blocks["weight"].dense().reshape(-1, *weight.flatten(1).shape)]
            if "bias" in blocks:
                parts.append(blocks["bias"].dense()[:, :, None])
            layer.cache["explicit", k] = _wide(torch.cat(parts, 2))
        return layer.cache["explicit", k]

    def _add(self, layer: Layer, k: int, c: Tensor, out: Tensor, scale: float) -> None:
        assert layer.rows is not None
        if ("explicit", k) in layer.cache:
            out.view(-1).addmv_(layer.cache["explicit", k].flatten(1).T, c, alpha=scale)
        else:
            add_combination(out, layer.rows[k], c, scale)


def _explicit_is_smaller(rows: Outer) -> bool:
    places, width, height = rows.inputs.shape[1], rows.inputs.shape[2], rows.signals.shape[2]
    return places > 1 and places * (width + height) > width * height


def _second_moment(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    return flat.T @ flat


def _wide(values: Tensor) -> Tensor:
    """In single precision at least, as factorisations need it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _inverse(factor: Tensor, damping: Tensor, path: str) -> Tensor:
    damped = factor.clone()
    damped.diagonal().add_(damping)
    root, info = torch.linalg.cholesky_ex(damped)
    if bool(info) or not bool(torch.isfinite(root[-1, -1])):
        raise DivergenceError(
            f"the curvature of the layer {path!r} is not finite or not positive definite: lower lr or raise damping"
        )
    inverse: Tensor = torch.cholesky_inverse(root)
    return inverse


def _grad(layer: Layer, name: str) -> Tensor:
    grad = layer.params[name].grad
    assert grad is not None
    return grad


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    assert weight.grad is not None
    flat = _wide(weight.grad.flatten(1))
    if bias is None:
        return flat
    assert bias.grad is not None
    return torch.cat([flat, bias.grad[:, None]], 1)


def _weighted_squares(block: Block, metric: Tensor) -> Tensor:
    """Σ_j metric_j g_ij²."""
    if isinstance(block, Outer) and block.inputs.shape[1] == 1:
        x, p = block.inputs[:, 0], block.signals[:, 0]
        return ((p.square() @ metric.reshape(p.shape[1], x.shape[1])) * x.square()).sum(1)
    step = max(1, _ROOM // max(1, block.size))
    flat = metric.flatten()
    pieces = [block.rows(at, min(at + step, block.count)) for at in range(0, block.count, step)]
    return torch.cat([piece.dense().square() @ flat for piece in pieces])


def _sum(tensors: Any) -> Tensor:
    total = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    assert total is not None
    return total
