r"""Many multi-layer perceptrons of one shape as one network: a batched product a layer, no autograd graph.

    u_l = h_{l−1} W_l + b_l,   h_l = φ(u_l)                     forward, the M members in the first axis
    g_{l−1} = (g_l W_lᵀ) ⊙ φ'(u_{l−1})                          backward
    W_l ← W_l − η h_{l−1}ᵀ g_l,   b_l ← b_l − η Σ_i g_l         in the same visit of the layer

What a small network costs beyond its products (a call for each member and parameter, the graph, a gradient
written and read again) is paid once for all members or not at all: the update is the third product,
accumulated into the weights where they are. The learning rate enters with the gradient of the loss, since
everything behind it is linear; so each member has its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.training.optimizers import default_loss

__all__ = ["ACTIVATIONS", "StackedMLP", "resolve"]

Elementwise = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Elementwise] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda u: u,
}

# spellings of what has a derivative by hand
_FUSED = {
    "tanh": (nn.Tanh, torch.tanh, F.tanh),
    "relu": (nn.ReLU, torch.relu, F.relu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid, F.sigmoid),
    "identity": (nn.Identity, ACTIVATIONS["identity"]),
}
_EVALUATION = 128  # samples in one pass without gradients
_SAFE = 1e-4  # σ_b² from which u is large enough for the tanh that errs by one rounding of 1


def resolve(activation: str | nn.Module | type[nn.Module] | Elementwise) -> tuple[str, Elementwise]:
    """Read an activation: the name of its derivative by hand (empty without one), and the function.

    Args:
        activation: a name of :data:`ACTIVATIONS`, a module without parameters, its class, or any function of a
            tensor, element by element.

    Raises:
        ArgumentError: the name is not known, or the module has parameters.

    Example:
        >>> resolve(nn.Tanh())[0], resolve(torch.sin)[0]
        ('tanh', '')
    """
    if isinstance(activation, str):
        if activation.lower() not in ACTIVATIONS:
            raise ArgumentError(
                f"activation={activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}, or give a "
                "module or a function"
            )
        activation = ACTIVATIONS[activation.lower()]
    if isinstance(activation, type):
        activation = activation()
    if not callable(activation):
        raise ArgumentError(f"activation={activation!r} is no name, module or function of a tensor")
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        raise ArgumentError(f"activation={activation!r} has parameters: give one without, such as nn.Tanh()")
    for name, spellings in _FUSED.items():
        if activation in spellings or type(activation) in spellings:
            return name, ACTIVATIONS[name]
    found: Any = copy.deepcopy(activation).eval() if isinstance(activation, nn.Module) else activation
    return "", found


@dataclass(frozen=True)
class _Room:
    """What a step writes into: states, their transposes, gradients on their way back."""

    states: list[Tensor]
    turned: list[Tensor]
    gradients: list[Tensor]


class StackedMLP:
    """M multi-layer perceptrons of one shape, trained together by SGD.

    Args:
        weights: of each layer, ``(members, fan_in, fan_out)`` (transposed against ``nn.Linear``); changed in place.
        biases: of each layer, ``(members, 1, fan_out)``; changed in place.
        activation: see :func:`resolve`; between each two layers.
        rates: learning rate of each member, ``(members,)``.
        momentum: μ of v ← μ v + ∇f, θ ← θ − η v.
        loss: (outputs, targets) → scalar of one member, a mean over samples.
        quick: may the tanh err by one rounding of 1 (rather than of itself) to cost a third; right where
            pre-activations are not tiny.

    Example:
        >>> net = StackedMLP([torch.zeros(2, 3, 1)], [torch.zeros(2, 1, 1)], "tanh", torch.tensor([0.1, 0.2]),
        ...     loss=F.mse_loss)
        >>> net.step(torch.ones(4, 3), torch.ones(4, 1))
        >>> net.weights[0][:, 0, 0]
        tensor([0.2000, 0.4000])
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activation: str | nn.Module | type[nn.Module] | Elementwise,
        rates: Tensor,
        momentum: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        quick: bool = False,
    ) -> None:
        self.weights, self.biases = list(weights), list(biases)
        self.kind, self.function = resolve(activation)
        self.quick = quick and self.kind == "tanh"
        self.members = len(self.weights[0])
        self.loss = loss or default_loss("classification")
        self.momentum = momentum
        first = self.weights[0]
        self._rates = torch.as_tensor(rates, dtype=first.dtype, device=first.device).reshape(-1, 1, 1)
        self._minus_one = first.new_tensor(-1.0)
        self._velocity = [torch.zeros_like(p) for p in (*self.weights, *self.biases)] if self.momentum else []
        self._turned = [w.mT for w in self.weights]
        self._rooms: dict[int, _Room] = {}

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """Outputs of all members on the same inputs ``(samples, features)``: ``(members, samples, outputs)``."""
        return torch.cat([self._outputs(part) for part in x.split(_EVALUATION)], 1)

    def _outputs(self, x: Tensor) -> Tensor:
        h = x.expand(self.members, *x.shape)
        pair: dict[tuple[int, int], Tensor] = {}  # two in turn for each width, which stay in the cache
        for i, (w, b) in enumerate(zip(self.weights[:-1], self.biases[:-1], strict=True)):
            key = (w.shape[2], i % 2)
            if key not in pair:
                pair[key] = w.new_empty(self.members, len(x), w.shape[2])
            h = self._activate(self._affine(b, h, w, pair[key], hidden=True))
        return self._affine(self.biases[-1], h, self.weights[-1], h.new_empty(0))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> None:
        """One SGD step of every member on the mini-batch ``x`` (samples, features), ``y``."""
        if self.kind and self._by_hand(y):
            with torch.inference_mode():  # calls are cheaper where nothing asks for a gradient
                self._step(x, y)
        else:
            self._step(x, y)

    def _by_hand(self, y: Tensor) -> bool:
        """Whether the gradient of the loss is a formula."""
        classes = self.loss is F.cross_entropy and y.ndim == 1 and not y.is_floating_point()
        return classes or self.loss is F.mse_loss

    def _step(self, x: Tensor, y: Tensor) -> None:
        last, count = len(self.weights) - 1, len(x)
        room = self._rooms.get(count) or self._make_room(count)
        entered, turned, graphs = [x.expand(self.members, *x.shape)], room.turned, []
        for i in range(last):
            u = self._affine(self.biases[i], entered[-1], self.weights[i], room.states[i], hidden=True)
            if self.kind:
                entered.append(self._activate(u))
            else:
                graphs.append(self._graph(u))
                entered.append(graphs[-1][1].detach())
        out = self._affine(self.biases[last], entered[last], self.weights[last], room.states[last])
        g = self._loss_gradient(out, y).mul_(self._rates)
        for i in range(last, 0, -1):
            before = torch.bmm(g, self._turned[i], out=room.gradients[i])
            self._update(i, turned[i - 1] if self.kind else entered[i].mT, g)
            g = self._slope(before, entered[i]) if self.kind else self._through(graphs.pop(), before)
        self._update(0, entered[0].mT, g)

    def _make_room(self, samples: int) -> _Room:
        """Tensors that every step of this batch size writes into."""
        made = [w.new_empty(self.members, samples, w.shape[2]) for w in self.weights]
        pairs: dict[tuple[int, int], Tensor] = {}
        for i, w in enumerate(self.weights):  # two gradients in turn for each width
            pairs.setdefault((w.shape[1], i % 2), w.new_empty(self.members, samples, w.shape[1]))
        back = [pairs[w.shape[1], i % 2] for i, w in enumerate(self.weights)]
        self._rooms = {samples: _Room(made, [h.mT for h in made], back)}
        return self._rooms[samples]

    # ------------------------------------------------------------------------------- pieces

    def _affine(self, b: Tensor, h: Tensor, w: Tensor, out: Tensor, hidden: bool = False) -> Tensor:
        """The affine map h W + b; twice that where :meth:`_activate` wants it so."""
        twice = 2 if hidden and self.quick else 1
        return torch.baddbmm(b, h, w, beta=twice, alpha=twice, out=out)

    def _activate(self, u: Tensor) -> Tensor:
        if self.quick:  # tanh u = 2 σ(2u) − 1
            return torch.add(self._minus_one, u.sigmoid_(), alpha=2, out=u)
        if self.kind == "tanh":
            return u.tanh_()
        if self.kind == "relu":
            return u.relu_()
        if self.kind == "sigmoid":
            return u.sigmoid_()
        return u if self.kind == "identity" else self.function(u)

    def _slope(self, g: Tensor, h: Tensor) -> Tensor:
        """The product g ⊙ φ'(u) from h = φ(u), in place of g."""
        if self.kind == "tanh":
            return torch.ops.aten.tanh_backward.grad_input(g, h, grad_input=g)
        if self.kind == "sigmoid":
            return torch.ops.aten.sigmoid_backward.grad_input(g, h, grad_input=g)
        if self.kind == "relu":
            return torch.ops.aten.threshold_backward.grad_input(g, h, 0, grad_input=g)
        return g

    def _graph(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """An activation without a derivative by hand: u and φ(u) with the graph between them."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            h = self.function(leaf.clone())  # a copy, since the function may work in place
        return leaf, h

    def _through(self, pair: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(pair[1], pair[0], g)
        return slope

    def _loss_gradient(self, out: Tensor, y: Tensor) -> Tensor:
        """∂ loss / ∂ outputs of each member, in a tensor of its own."""
        if self.loss is F.mse_loss:
            return (out - y).mul_(2 / y.numel())
        if self._by_hand(y):
            g = torch.softmax(out, -1)
            g.scatter_add_(
                2, y.expand(self.members, -1)[..., None], self._minus_one.expand(*out.shape[:2], 1)
            )
            return g.div_(len(y))
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            total = torch.stack([self.loss(one, y) for one in leaf]).sum()
        return torch.autograd.grad(total, leaf)[0].clone()

    def _update(self, i: int, turned: Tensor, g: Tensor) -> None:
        w, b = self.weights[i], self.biases[i]
        if not self.momentum:
            w.baddbmm_(turned, g, alpha=-1)
            b.sub_(g.sum(1, keepdim=True))
            return
        v, s = self._velocity[i], self._velocity[len(self.weights) + i]
        w.sub_(v.baddbmm_(turned, g, beta=self.momentum))
        b.sub_(s.mul_(self.momentum).add_(g.sum(1, keepdim=True)))


def draw(
    sizes: Sequence[int],
    weight_vars: Tensor,
    bias_vars: Tensor,
    seeds: Sequence[int],
    like: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters W ~ N(0, σ_w²/fan_in), b ~ N(0, σ_b²) of a stack, one member a (variances, seed).

    Members of one seed share their standard normals. The numbers are those of
    :func:`bolza.training.ensemble_parameters` for the same seed and shape.

    Args:
        sizes: width of the input, of each hidden layer and of the output.
        weight_vars: σ_w² of each member.
        bias_vars: σ_b² of each member.
        seeds: seed of each member.
        like: its dtype and device are those of the parameters.
    """
    distinct = {seed: [m for m, s in enumerate(seeds) if s == seed] for seed in dict.fromkeys(seeds)}
    members = len(seeds)
    weights = [like.new_empty(members, a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    biases = [like.new_empty(members, 1, b) for b in sizes[1:]]
    sigma_w, sigma_b = weight_vars.double().sqrt(), bias_vars.double().sqrt()
    for seed, rows in distinct.items():
        generator = torch.Generator().manual_seed(seed)
        for w, b in zip(weights, biases, strict=True):
            fan_in, fan_out = w.shape[1:]
            normal = torch.randn(fan_out, fan_in, generator=generator, dtype=like.dtype).to(like.device)
            offset = torch.randn(fan_out, generator=generator, dtype=like.dtype).to(like.device)
            w[rows] = normal.T * (sigma_w[rows] / math.sqrt(fan_in)).to(like).reshape(-1, 1, 1)
            b[rows] = offset * sigma_b[rows].to(like).reshape(-1, 1, 1)
    return weights, biases


def quick_is_right(bias_vars: Tensor) -> bool:
    """Whether no pre-activation of the stack is so small that tanh must be right relative to itself."""
    return bool((bias_vars >= _SAFE).all())
