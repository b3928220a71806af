r"""Gradients of every output of every sample, and their inner products, in bounded memory.

With J_{ia} = ∂f_a(x_i)/∂θ the kernel of a network as it is now is Θ_{ia,jb} = J_{ia} · J_{jb}. In layers that act on
each sample alone J is the outer product of what entered and what came back, and a linear layer with bias adds

    (X X'ᵀ + 1) ∘ (P P'ᵀ),

so that neither J nor a gradient of a weight is formed. Parameters of other layers, or that are used in other ways, go
through explicit gradients, a block of samples at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.ops.batches import apply, count_samples, select_parameters, to_device
from bolza.ops.errors import ArgumentError, DataError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.factors import Use, blocks_of, cut, surely_alone, vmapped, watching
from bolza.ops.noise import batch_statistics, each_sample_alone
from bolza.ops.persample import RULES, Block, storage
from bolza.ops.replay import differentiable_kernels, same_randomness
from bolza.ops.stacks import Explicit, Outputs, Stack, add_products, explicit_of, mirror, stacked

__all__ = ["OutputGradients", "Outputs"]

_BATCH = 512  # samples times outputs in one vmapped call
_MODES = ("mean", "trace", "each", "full")


@dataclass(frozen=True)
class _Part:
    """What is known of some samples: for each parameter the gradients of all outputs."""

    count: int
    outputs: int
    stacks: dict[str, Stack]
    blocks: list[dict[str, Block]]  # what the stacks are made of, an entry an output
    passed: int  # numbers that went in and out of layers

    def storage(self) -> int:
        """Bytes that are kept."""
        made = [stack.values for stack in self.stacks.values() if isinstance(stack, Explicit)]
        explicit = sum(values.numel() * values.element_size() for values in made if values is not None)
        return explicit + storage([block for blocks in self.blocks for block in blocks.values()])


class OutputGradients:
    """Gradients of the outputs of a network at the parameters it has when they are asked for.

    Args:
        model: the network, evaluated in evaluation mode.
        data: inputs by whose statistics a batch norm in training mode normalises, held fixed.
        params: names of parameters or modules; all that have ``requires_grad`` by default.
        output: takes the tensor of outputs, samples first, from what the model returns.
        scales: factor of the contribution of parameters or modules, by name; 1 by default.
        chunk: samples in one pass; as many as fit by default.
        memory: bytes for factors.
        seed: of the random numbers a model draws even in evaluation mode.

    Attributes:
        params: the parameters by name.
        device: where they are.
        dtype: of the kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        params: Any = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
        scales: Mapping[str, float] | None = None,
        chunk: int | None = None,
        memory: int = 2**30,
        seed: int = 0,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ArgumentError(f"chunk is {chunk}: it must be at least 1 sample, or None")
        if memory < 1:
            raise ArgumentError(f"memory is {memory}: it must be a positive number of bytes")
        self.params = select_parameters(model, params)
        self._model, self._output, self._memory, self._seed = model, output, memory, seed
        self._scales = _scales_by_parameter(model, self.params, scales or {})
        first = next(iter(self.params.values()))
        self.device, self.dtype = first.device, first.dtype
        self._chunk = chunk
        self._layers = list(model.modules())
        self._statistics = {}
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self._layers):
            self._statistics = batch_statistics(model, [(x, None) for x in data], self.device)
        self._plain = surely_alone(model)
        self._trusted: dict[str, int] | None = None
        self._bytes = 0.0  # a sample

    def values(self, x: Any) -> Tensor:
        """Outputs of the network, (n, outputs)."""
        x = _checked(x, self.device)
        with self._alone():
            bounds = self._bounds(x)
            with torch.no_grad():
                return torch.cat([self._outputs(cut(x, i, j)) for i, j in bounds])

    def kernel(self, x1: Any, x2: Any = None, mode: Outputs = "mean") -> Tensor:
        """Θ between two sets of inputs, or of one with itself.

        Args:
            x1: inputs, n samples.
            x2: inputs, m samples; x1 by default.
            mode: as in :func:`bolza.meanfield.kernels.empirical_ntk`.

        Returns:
            (n, m), (n, m, outputs) or (n, m, outputs, outputs).
        """
        if mode not in _MODES:
            raise ArgumentError(f"outputs is {mode!r}: choose one of {', '.join(map(repr, _MODES))}")
        left = _checked(x1, self.device)
        right = left if x2 is None else _checked(x2, self.device)
        with self._alone():
            out = self._kernel(left, right, mode)
        if not isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
            raise DivergenceError(
                "the kernel is not finite: check the inputs and the parameters for nan and inf"
            )
        return out

    def _kernel(self, left: Any, right: Any, mode: Outputs) -> Tensor:
        same, n, m = right is left, _count(left), _count(right)
        rows, columns = self._bounds(left), self._bounds(right)
        kept: dict[tuple[int, int], _Part] = {}
        held = 0
        out: Tensor | None = None
        for at, i in rows:
            a = kept.pop((at, i), None) if same else None
            if a is None:
                a = self._part(cut(left, at, i))
            else:
                held -= a.storage()
            if out is None:
                outputs = a.outputs
                tail = {"each": (outputs,), "full": (outputs, outputs)}.get(mode, ())
                out = torch.zeros(n, m, *tail, dtype=self.dtype, device=self.device)
            for start, j in columns:
                if same and start < at:
                    continue
                b = a if same and start == at else kept.get((start, j))
                if b is None:
                    b = self._part(cut(right, start, j))
                    size = b.storage() if len(rows) > 1 else 0  # a part that is used once need not be kept
                    if len(rows) > 1 and held + size <= self._memory // 2:
                        kept[start, j] = b
                        held += size
                block = out[at:i, start:j]
                add_products(block, a.stacks, b.stacks, mode, self._scales)
                if same and start > at:
                    mirror(out, block, at, start, mode)
        assert out is not None
        return out.div_(outputs) if mode == "mean" and outputs > 1 else out

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with each_sample_alone(self._model, self._statistics), ExitStack() as stack:
            if not self._plain:  # a chain of plain layers draws nothing in evaluation mode
                stack.enter_context(same_randomness(self._seed, self.device))
            yield

    def _outputs(self, x: Any) -> Tensor:
        return self._flat(apply(self._model, x), _count(x))

    def _flat(self, found: Any, n: int) -> Tensor:
        if self._output is not None:
            found = self._output(found)
        if not isinstance(found, Tensor):
            raise ArgumentError(
                f"the model returns a {type(found).__name__}: give output=, which takes the tensor of outputs from it"
            )
        if found.shape[:1] != (n,):
            raise ShapeError(
                f"the outputs of {n} samples have shape {tuple(found.shape)}: they need samples first; "
                "output= can turn them"
            )
        return found.reshape(n, -1)

    def _bounds(self, x: Any) -> list[tuple[int, int]]:
        """Where to cut the samples."""
        n = _count(x)
        if self._trusted is None:
            self._prepare(x)
        chunk = self._chunk or max(1, int(self._memory / 4 / max(1.0, self._bytes)))
        count = -(-n // chunk)
        return list(pairwise([round(k * n / count) for k in range(count + 1)]))

    def _prepare(self, x: Any) -> None:
        """Find out which parameters have factors that can be trusted, and what a sample takes."""
        layers = self._layers
        if self._plain and isinstance(x, Tensor) and x.ndim > 1:
            owned = {id(p) for layer in layers if type(layer) in RULES for p in layer._parameters.values()}
            self._trusted = {name: 0 for name, p in self.params.items() if id(p) in owned}
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            simple = all(isinstance(layer, nn.Linear) for layer in layers if type(layer) in RULES)
            if simple and x.ndim == 2 and len(self._trusted) == len(self.params):
                outputs = linear[-1].out_features
                numbers = sum(layer.in_features + (1 + outputs) * layer.out_features for layer in linear)
                self._bytes = float(self.dtype.itemsize * numbers)
                return
        else:
            self._trusted = self._compare(x)
        few = min(2, _count(x))
        part = self._part(cut(x, 0, few))
        self._bytes = (part.storage() + 4 * part.passed * self.dtype.itemsize) / few

    def _compare(self, x: Any) -> dict[str, int]:
        """Names whose factors give the gradients of samples taken alone, with the number of their uses."""
        n = _count(x)
        picked = sorted({0, n // 2, n - 1})
        few = _pytree.tree_map(lambda leaf: leaf[picked] if isinstance(leaf, Tensor) else leaf, x)
        with torch.enable_grad():
            with watching(self._model, self.params, len(picked)) as uses:
                together = self._outputs(few)
            if not together.requires_grad:
                raise ArgumentError(
                    "the outputs do not depend on any of the parameters: is the model detached?"
                )
            draw = torch.Generator().manual_seed(self._seed)
            weights = torch.randn(together.shape, generator=draw, dtype=together.dtype).to(self.device)
            slopes = self._slopes((together * weights).sum(), uses, False)
            alone = []
            for k in range(len(picked)):
                value = (self._outputs(cut(few, k, k + 1)) * weights[k]).sum()
                alone.append(torch.autograd.grad(value, list(self.params.values()), allow_unused=True))
        with torch.no_grad():
            blocks = blocks_of(uses, [slopes])[0]
            counts = Counter(name for use in uses for name in use.names.values())
            trusted = {name: counts[name] for name in self.params if name in blocks}
            tol = 1e-3 if self.dtype == torch.float32 else 1e-8
            for k, grads in enumerate(alone):
                norms = [g.norm() for g in grads if g is not None]
                whole = torch.stack(norms).norm() if norms else weights.new_zeros(())
                for name, g in zip(self.params, grads, strict=True):
                    if name in trusted:
                        made = blocks[name].rows(k, k + 1).dense()[0]
                        truth = torch.zeros_like(made) if g is None else g.flatten()
                        if not bool((made - truth).norm() <= tol * (truth.norm() + 1e-4 * whole)):
                            del trusted[name]
        return trusted

    @staticmethod
    def _slopes(value: Tensor, uses: Sequence[Use], again: bool) -> tuple[Tensor | None, ...]:
        if not uses:
            return ()
        return torch.autograd.grad(value, [use.edge for use in uses], retain_graph=again, allow_unused=True)

    def _part(self, x: Any) -> _Part:
        assert self._trusted is not None
        n = _count(x)
        wanted = {name: self.params[name] for name in self._trusted}
        with torch.enable_grad(), watching(self._model, wanted, n) as uses:
            f = self._outputs(x)
            outputs = f.shape[1]
            slopes = [
                self._slopes(f[:, a].sum() if outputs > 1 else f.sum(), uses, a + 1 < outputs)
                for a in range(outputs)
            ]
        del f
        with torch.no_grad():
            found = blocks_of(uses, slopes)
            if not self._plain and not self._same_uses(uses):  # another path than that which was compared
                found = [{} for _ in found]
            memo: dict[tuple[int, ...], Tensor] = {}
            stacks = {name: stacked([blocks[name] for blocks in found], memo) for name in found[0]}
        rest = [name for name in self.params if name not in stacks]
        if rest:
            for name, values in self._explicit(x, rest, outputs).items():
                stacks[name] = explicit_of(values)
        passed = sum(use.entered.numel() + use.shape.numel() for use in uses)
        return _Part(n, outputs, stacks, found, passed)

    def _same_uses(self, uses: Sequence[Use]) -> bool:
        counts = Counter(name for use in uses for name in use.names.values())
        return all(counts[name] == count for name, count in (self._trusted or {}).items() if count)

    def _explicit(self, x: Any, names: list[str], outputs: int) -> dict[str, Tensor]:
        """Gradients of all outputs in the named parameters: (n, outputs, d) each."""
        n = _count(x)
        values = {name: p.detach() for name, p in self.params.items()}

        def loss(found: Any, weights: Tensor) -> Tensor:
            return (self._flat(found, 1) * weights).sum()

        # outputs count as further samples: one call for as many as make a batch of reasonable size
        eye = torch.eye(outputs, dtype=self.dtype, device=self.device)
        pieces: list[dict[str, Tensor]] = []
        try:
            with differentiable_kernels(self._model):
                for rows in torch.split(eye, max(1, _BATCH // n)):
                    repeated = _repeated(x, len(rows))
                    found = vmapped(self._model, values, loss, repeated, rows.repeat(n, 1), names)
                    pieces.append({name: g.values.reshape(n, len(rows), -1) for name, g in found.items()})
            return {name: torch.cat([piece[name] for piece in pieces], 1) for name in names}
        except UnsupportedError:  # a path that depends on the values, or an operation vmap cannot take
            return self._by_loop(x, names)

    def _by_loop(self, x: Any, names: list[str]) -> dict[str, Tensor]:
        free = [self.params[name] for name in names]
        rows: list[list[Tensor]] = []
        for i in range(_count(x)):
            with torch.enable_grad():
                f = self._outputs(cut(x, i, i + 1))[0]
                found = [torch.autograd.grad(v, free, retain_graph=True, allow_unused=True) for v in f]
            columns = zip(*found, strict=True)
            rows.append(
                [
                    torch.stack([torch.zeros_like(p) if g is None else g for g in gs]).flatten(1)
                    for p, gs in zip(free, columns, strict=True)
                ]
            )
        return {
            name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }


def _repeated(x: Any, times: int) -> Any:
    """Each sample several times."""
    return _pytree.tree_map(
        lambda leaf: leaf.repeat_interleave(times, 0) if isinstance(leaf, Tensor) else leaf, x
    )


def _count(x: Any) -> int:
    return len(x) if isinstance(x, Tensor) else count_samples(x)


def _checked(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor) and x.ndim and len(x):
        return x.to(device)
    x, n = to_device(x, device), count_samples(x)
    for leaf in _pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != n):
            raise DataError(
                f"the inputs have {n} samples and a tensor of shape {tuple(leaf.shape)}: every tensor needs one entry "
                "a sample, samples first"
            )
    return x


def _scales_by_parameter(
    model: nn.Module, params: Mapping[str, Tensor], scales: Mapping[str, float]
) -> dict[str, float]:
    """The scale of each parameter: that of its own name, or of the nearest module above it."""
    if not scales:
        return {}
    names = {id(p): [name] for name, p in params.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            names[id(parameter)].append(name)
    used: set[str] = set()
    found: dict[str, float] = {}
    for name, p in params.items():
        above = [
            s for s in scales for full in names[id(p)] if full == s or full.startswith(f"{s}.") or s == ""
        ]
        if above:
            nearest = max(above, key=len)
            found[name] = float(scales[nearest])
            used.update(above)
    for name, value in scales.items():
        if name not in used:
            raise ArgumentError(
                f"scales names {name!r}, but no parameter of the kernel has that name or module"
            )
        if not 0 <= value < float("inf"):
            raise ArgumentError(f"scales[{name!r}] is {value}: it must be finite and at least 0")
    return found
