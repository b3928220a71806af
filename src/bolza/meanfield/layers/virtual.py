r"""Theory without a closed form: a network's own functions, run on units drawn from its Gaussians.

Layers with random weights make Gaussian values, whose kernels the theory knows. What comes between two of
them (sums of dependent values, gates, products, a ReLU after a residual sum, max pooling, a softmax written
by hand) is a function that acts on every draw alike. So the units of each random layer are drawn anew from
its kernel, the network's own functions run on them, and the kernel of what comes out is their mean product.

Gradients go the same way: where one value feeds two factors, the two gradients that come back depend on
each other, and on the value. So they are drawn once, and taken back through the same units. At the next
random layer their kernel is all that matters again.

Draws have exactly the wanted covariance and no odd moments (`bolza.ops.draws`); what is left falls as
1/√units.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, fx, nn

from bolza.meanfield import activations
from bolza.meanfield.layers.function_maps import MOVES, function_name
from bolza.meanfield.layers.moment_maps import Step
from bolza.meanfield.layers.moments import MAX_FULL_ITEMS, Moments, measure
from bolza.meanfield.layers.walk import Visit, evaluate, seeded
from bolza.ops.draws import white_draws

__all__ = ["CONTRACTIONS", "OWN_WEIGHTS", "VirtualUnits", "is_signal", "unit_dim_of"]

_UNITS = (1024, 4096)  # drawn for a layer of median width, if that many fit: more where there are fewer items
_DRAWN = 1 << 18  # numbers that such a layer should come to
_NUMBERS = 1 << 21  # of one value, at most (16 MB)
_COPIES = 64  # of the network, at most
_RANDOM = ("dropout", "rrelu", "rand", "bernoulli", "normal")

CONTRACTIONS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution matmul mm bmm addmm "
    "baddbmm einsum embedding bilinear scaled_dot_product_attention multi_head_attention_forward "
    "rnn_tanh rnn_relu lstm gru".split()
)
# Functions of each position by itself: all that can be said where only pairs at the same position are known.
_POINTWISE = (
    frozenset("add sub mul div neg pow glu chunk split where softmax layer_norm rms_norm dropout".split())
    | frozenset(activations.FUNCTIONS)
    | frozenset("sin cos exp square abs clamp clip clamp_min sign erf sqrt rsqrt log".split())
    | MOVES
)
_POINTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    *activations.ELEMENTWISE_MODULES, nn.GLU, nn.Dropout, nn.AlphaDropout, nn.LayerNorm, nn.RMSNorm,
)  # fmt: skip
OWN_WEIGHTS: tuple[type[nn.Module], ...] = (
    nn.PReLU, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
_UNITS_SECOND = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


def is_signal(value: Any) -> bool:
    """Whether a value has samples and units."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2 and value.numel() > 0


class VirtualUnits:
    """Copies of a network whose random layers are drawn from their kernels, made as far as they are needed.

    Args:
        visits: nodes of the graph; each must have its moments before a later one is asked for.
        seed: of the draws.
    """

    def __init__(self, visits: dict[fx.Node, Visit], seed: int = 0) -> None:
        self.visits, self.seed = visits, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[fx.Node, list[Any]] = {}  # one value a copy
        self.random: dict[fx.Node, bool] = {}  # whether the copies differ
        self._copies = 0

    @property
    def copies(self) -> int:
        """How many copies there are."""
        if not self._copies:
            signals = [v.value for v in self.visits.values() if is_signal(v.value)]
            known = [v.moments for v in self.visits.values() if v.moments is not None]
            items = max(m.samples * m.positions for m in known)
            units = max(_UNITS[0], min(_UNITS[1], _DRAWN // items))
            wanted = math.ceil(units / statistics.median(m.units for m in known))
            largest = max(t.numel() for t in signals)
            self._copies = max(1, min(wanted, _NUMBERS // largest, _COPIES))
        return self._copies

    # ------------------------------------------------------------------------------------- forward

    def step(self, visit: Visit) -> Step | None:
        """Moments of a node's value from virtual units; none where they have nothing to say."""
        if not self._applies(visit):
            return None
        values = self.values(visit.node)
        if not self.random[visit.node]:
            return None  # nothing random before it: that would only be the measurement
        inputs = [m for n in visit.inputs if (m := self.visits[n].moments) is not None]
        unit_dim = unit_dim_of(visit, self.visits, inputs) % visit.value.ndim
        lead = [s for d, s in enumerate(visit.value.shape) if d != unit_dim]
        full = all(m.full for m in inputs) and math.prod(lead) <= MAX_FULL_ITEMS
        out = self._moments(values, unit_dim, full)
        sources = frozenset().union(*(m.sources for m in inputs))
        out = out.with_(units=visit.value.shape[unit_dim], sources=sources)
        act = self._activation(visit)
        gain = None
        if act is not None:
            (before,) = visit.inputs
            squares = [float(act.derivative(h.detach().cpu()).square().mean()) for h in self.values(before)]
            gain = statistics.fmean(squares)

        def backward(g: Tensor) -> list[Tensor]:
            parts = self.back(visit, self.draw(g, out, visit.value))
            found = []
            for n, part in zip(visit.inputs, parts, strict=True):
                m = self.visits[n].moments
                if m is not None:
                    found.append(self._moments(part, m.unit_dim, m.full).kernel)
            return found

        return Step(out, backward, gain=gain, activation=act, note="by sampling")

    def _applies(self, visit: Visit) -> bool:
        """Whether the node's own function says it all: no weights of its own, and pairs enough are known."""
        layer, name = visit.calls, function_name(visit.node.target)
        if layer is not None:
            if not isinstance(layer, OWN_WEIGHTS) and next(layer.parameters(), None) is not None:
                return False
        elif name in CONTRACTIONS:
            given = [self.visits[n].value for n in visit.node.all_input_nodes if n not in visit.inputs
                     or n.meta["role"] != "data"]  # fmt: skip
            if any(isinstance(v, Tensor) and v.is_floating_point() and v.numel() > 1 for v in given):
                return False
        known = [m for n in visit.inputs if (m := self.visits[n].moments) is not None]
        if not known:
            return False
        if all(m.full for m in known):
            return True
        return isinstance(layer, _POINTWISE_LAYERS) if layer is not None else name in _POINTWISE

    def _activation(self, visit: Visit) -> activations.Activation | None:
        data = [n for n in visit.inputs if self.visits[n].moments is not None]
        layer = visit.calls
        if len(data) != 1 or len(visit.inputs) != 1:
            return None
        if isinstance(layer, activations.ELEMENTWISE_MODULES):
            return activations.resolve_activation(layer)
        kind = activations.FUNCTIONS.get(function_name(visit.node.target)) if layer is None else None
        return None if kind is None else activations.resolve_activation(kind)

    def values(self, node: fx.Node) -> list[Any]:
        """Values of a node, one a copy."""
        stack = [node]
        while stack:
            n = stack[-1]
            if n in self.drawn:
                stack.pop()
                continue
            visit = self.visits[n]
            if self.is_source(visit):
                assert visit.moments is not None
                self.drawn[n] = self.draw(visit.moments.kernel, visit.moments, visit.value)
                self.random[n] = True
                continue
            data = [i for i in visit.inputs if i.meta["role"] == "data"]
            given = n.meta["role"] != "data" or not data or (visit.missing is not None and visit.step is None)
            waiting = [] if given else [i for i in data if i not in self.drawn]
            if waiting:
                stack += waiting
                continue
            self.random[n] = not given and any(self.random[i] for i in data)
            if not self.random[n]:
                self.drawn[n] = [visit.value.detach() if isinstance(visit.value, Tensor) else visit.value]
                self.drawn[n] *= self.copies
                continue
            with torch.no_grad():
                self.drawn[n] = [
                    self._run(n, {i: self.drawn[i][copy] for i in data}, copy) for copy in range(self.copies)
                ]
        return self.drawn[node]

    @staticmethod
    def is_source(visit: Visit) -> bool:
        """Whether this is a layer of random weights."""
        step = visit.step
        return step is not None and not visit.sampled and step.out.sources == {visit.node.name}

    def _run(self, node: fx.Node, values: dict[fx.Node, Any], copy: int) -> Any:
        layer = self.visits[node].calls
        name = (type(layer).__name__ if layer is not None else function_name(node.target)).lower()
        if not any(word in name for word in _RANDOM):
            return evaluate(self.visits, node, values)
        device = next((v.device for v in values.values() if isinstance(v, Tensor)), torch.device("cpu"))
        with seeded(self.seed + 7919 * (1 + list(self.visits).index(node)) + copy, device):
            return evaluate(self.visits, node, values)

    # ------------------------------------------------------------------------------------ backward

    def back(self, visit: Visit, grads: list[Tensor]) -> list[list[Tensor]]:
        """Gradients at a node's inputs from those at its output, one a copy."""
        data = [i for i in visit.inputs if i.meta["role"] == "data"]
        values = {i: self.values(i) for i in data}
        parts: dict[fx.Node, list[Tensor]] = {i: [] for i in data}
        for copy, g in enumerate(grads):
            leaves = {i: v[copy] for i, v in values.items()}
            floating = [i for i, v in leaves.items() if isinstance(v, Tensor) and v.is_floating_point()]
            with torch.enable_grad():
                for i in floating:
                    leaves[i] = leaves[i].detach().requires_grad_(True)
                out = self._run(visit.node, leaves, copy)
                wanted = [leaves[i] for i in floating]
                found = torch.autograd.grad(out, wanted, g.to(out.dtype), allow_unused=True)
            for i, leaf, part in zip(floating, wanted, found, strict=True):
                parts[i].append(torch.zeros_like(leaf) if part is None else part)
        return [parts.get(n, []) for n in visit.inputs]

    def kernel(self, visit: Visit, values: list[Tensor]) -> Tensor:
        """Kernel of a node's values or gradients, in the layout of its moments."""
        assert visit.moments is not None
        return self._moments(values, visit.moments.unit_dim, visit.moments.full).kernel

    # --------------------------------------------------------------------------------------- draws

    def draw(self, kernel: Tensor, like: Moments, value: Tensor) -> list[Tensor]:
        """Gaussians of a kernel, as values of the shape of ``value``, one a copy."""
        groups, items, _ = kernel.shape
        units = like.units * self.copies
        h = _root(kernel) @ self._white(groups, items, units)
        h = h.reshape(groups, items, self.copies, like.units)
        if not like.full:
            h = h.transpose(0, 1)  # positions next to samples
        h = h.reshape(*like.lead, self.copies, like.units).movedim(-2, 0).movedim(-1, like.unit_dim + 1)
        return list(h.to(value.device, value.dtype))

    def _white(self, groups: int, items: int, units: int) -> Tensor:
        if units % 2 == 0 and units >= 2 * items and groups <= 64:
            return torch.stack([white_draws(items, units, self.generator) for _ in range(groups)])
        return torch.randn(groups, items, units, generator=self.generator, dtype=torch.float64)

    def _moments(self, values: list[Tensor], unit_dim: int, full: bool) -> Moments:
        whole = values[0] if len(values) == 1 else torch.cat(values, unit_dim)
        return measure(whole, unit_dim, full=full)


def _root(kernel: Tensor) -> Tensor:
    """R with R Rᵀ = K, also where K is singular."""
    factor, info = torch.linalg.cholesky_ex(kernel)
    if not bool(info.any()):
        return torch.as_tensor(factor)
    values, vectors = torch.linalg.eigh(kernel)
    return torch.as_tensor(vectors * values.clamp_min(0).sqrt()[..., None, :])


def unit_dim_of(visit: Visit, visits: dict[fx.Node, Visit], inputs: list[Moments]) -> int:
    """Which dimension holds the units: what the next layer says, else as before, else by the shape."""
    value = visit.value
    if value.ndim == 2:
        return 1
    queue, seen = [visit.node], {visit.node}
    for _ in range(64):
        if not queue:
            break
        node = queue.pop(0)
        for user in node.users:
            if user in seen or user not in visits:
                continue
            seen.add(user)
            layer = visits[user].layer
            name = "" if layer is not None else function_name(user.target) if user.op != "output" else ""
            same = is_signal(visits[node].value) and visits[node].value.ndim == value.ndim
            if same and (isinstance(layer, _UNITS_LAST) or name in ("linear", "layer_norm", "rms_norm")):
                return int(value.ndim) - 1
            if same and (
                isinstance(layer, _UNITS_SECOND) or name in ("conv1d", "conv2d", "conv3d", "batch_norm")
            ):
                return 1
            queue.append(user)
    for m in inputs:
        if len(m.lead) + 1 == value.ndim:
            return m.unit_dim
    return 1 if value.ndim >= 4 and visit.node.op == "placeholder" else int(value.ndim) - 1
