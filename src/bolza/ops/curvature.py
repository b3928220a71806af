r"""Hessian and Gauss–Newton matrix of a loss in the parameters of a network, by products.

    f(θ) = Σ_b (n_b / N) ℓ(model_θ(x_b), y_b)
    H v = ∇(∇f · v)                       Hessian: one more backward through the graph of the gradient
    G v = (1/N) Σ_b n_b J_bᵀ ∇²ℓ_b J_b v  Gauss–Newton: J_b is the Jacobian of the outputs in θ

Vectors are flat, in the order of ``model.parameters()``. The model is evaluated in the mode it is in, on
kernels that can be differentiated twice, with its buffers left alone and the same random numbers (dropout
masks) at every product, so that the operator is one fixed matrix. For a single batch the graph of the first
derivative is kept between products, which then cost 1.7 gradients instead of 2.7. The matrix
multiplications alone of a deep stack of dense layers come to 3 and 2: more is not to be had from two reverse passes.

Reference: Pearlmutter (1994), *Fast exact multiplication by the Hessian*; Schraudolph (2002), *Fast curvature
matrix-vector products*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.ops.batches import (
    Batch,
    Data,
    Loss,
    apply,
    batches_of,
    checked_loss,
    count_samples,
    read,
    select_parameters,
    unflatten,
)
from bolza.ops.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.ops.operators import LinearOperator
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness
from bolza.ops.trees import float_leaves, tree_detach, with_float_leaves

__all__ = ["closure_hessian", "ggn_operator", "gradient", "hessian_operator"]

Product: TypeAlias = Callable[[Tensor], Tensor]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class _Stamp:
    """What tells a state from a changed one: versions, and norms, since fused optimizers count no version.

    Layers count with their mode, and in evaluation, where it matters, with what they remember.
    """

    versions: tuple[Any, ...]
    norms: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, leaves: Sequence[Tensor], model: nn.Module | None = None, batch: Any = None) -> _Stamp:
        norms = [n.to(leaves[0]) for n in torch._foreach_norm(list(leaves))]
        versions: list[Any] = [p._version for p in leaves]
        for layer in model.modules() if model is not None else ():
            versions.append(layer.training)
            if not layer.training:
                versions += [b._version for b in layer._buffers.values() if b is not None]
        versions += [x._version for x in _pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        return cls(tuple(versions), torch.stack(norms))

    def same(self, other: _Stamp) -> bool:
        return self.versions == other.versions and torch.equal(self.norms, other.norms)


@contextmanager
def _second_derivatives(task: str) -> Iterator[None]:
    """Say which operation stands in the way when torch has no second derivative of it."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = re.search(r"derivative for '?([\w:.]+)'? is not implemented", str(error))
        if found is None:
            raise
        raise UnsupportedError(
            f"{task} needs a second derivative, and torch has none of {found[1]!r}: replace that operation, "
            "or leave out the parameters before it with params=[...]"
        ) from error


def _flat(parts: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """One vector from gradients; a parameter that is not reached counts as zero."""
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params, strict=True)]
    )


@dataclass
class _Objective:
    """f(θ) as a weighted sum over batches, and the products that belong to it."""

    model: nn.Module
    loss: Loss
    batches: Iterable[Batch]
    params: dict[str, nn.Parameter]
    reduction: Reduction
    seed: int
    build: Callable[[_Objective, Batch], Product]
    task: str
    kept: Product | None = field(default=None, init=False)
    stamp: _Stamp | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ArgumentError(
                f"reduction is {self.reduction!r}: choose 'mean' or 'sum', as the loss does over a batch"
            )

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.params.values())

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    def output(self, x: Any) -> Any:
        return apply(self.model, x)

    def value(self, batch: Batch) -> Tensor:
        value = checked_loss(self.loss(self.output(batch[0]), batch[1]))
        if not value.requires_grad:
            raise ArgumentError(
                "the loss does not depend on any of the parameters: is the model detached or under no_grad?"
            )
        return value

    @contextmanager
    def context(self, index: int) -> Iterator[None]:
        with (
            torch.enable_grad(),
            frozen_statistics(self.model),
            differentiable_kernels(self.model),
            same_randomness(self.seed + index, self.device),
            _second_derivatives(self.task),
        ):
            yield

    def product(self, v: Tensor) -> Tensor:
        only = self.batches[0] if isinstance(self.batches, Sequence) and len(self.batches) == 1 else None
        single = only is not None
        stamp = _Stamp.of(self.leaves, self.model, only)
        if self.kept is not None and self.stamp is not None and self.stamp.same(stamp):
            with torch.enable_grad(), _second_derivatives(self.task):
                return self.kept(v)
        self.kept = None
        total, weight_sum = torch.zeros_like(v), 0
        for index, batch in enumerate(read(self.batches, self.device)):
            weight = count_samples(batch[0]) if self.reduction == "mean" and not single else 1
            with self.context(index):
                product = self.build(self, batch)
                total = total.add_(product(v), alpha=weight)
            weight_sum += weight
            if single:
                self.kept, self.stamp = product, stamp
        return total / weight_sum if self.reduction == "mean" else total

    def operator(self) -> LinearOperator:
        size = sum(p.numel() for p in self.leaves)
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in self.leaves) else torch.float32
        return LinearOperator(self.product, size, dtype, self.device)


def _hessian_product(value: Tensor, params: Sequence[Tensor]) -> Product:
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
    live = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def product(v: Tensor) -> Tensor:
        if not live:
            return torch.zeros_like(v)
        directions = unflatten(v, params)
        out = torch.autograd.grad(
            [g for _, g in live],
            params,
            [directions[i] for i, _ in live],
            retain_graph=True,
            allow_unused=True,
        )
        return _flat(out, params)

    return product


def _build_hessian(objective: _Objective, batch: Batch) -> Product:
    return _hessian_product(objective.value(batch), objective.leaves)


def _build_ggn(objective: _Objective, batch: Batch) -> Product:
    params = objective.leaves
    output = objective.output(batch[0])
    outputs = [leaf for leaf in float_leaves(output) if leaf.requires_grad]
    if not outputs:
        raise ArgumentError(
            "the outputs do not depend on any of the parameters: is the model detached or under no_grad?"
        )
    points = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in float_leaves(output)]
    value = checked_loss(objective.loss(with_float_leaves(tree_detach(output), points), batch[1]))
    points = [point for point in points if point.requires_grad]
    slopes = torch.autograd.grad(value, points, create_graph=True, allow_unused=True)
    live = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
    if not live:  # the loss is linear in the outputs
        return torch.zeros_like
    points, outputs = [points[i] for i in live], [outputs[i] for i in live]
    curved = [slope for slope in slopes if slope is not None and slope.requires_grad]
    # J v is the derivative in z of the linear map z ↦ Jᵀ z, so that only reverse mode is needed
    z = [torch.zeros_like(leaf, requires_grad=True) for leaf in outputs]
    pulled = torch.autograd.grad(outputs, params, z, create_graph=True, allow_unused=True)
    reached = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    if not reached:
        return torch.zeros_like

    def product(v: Tensor) -> Tensor:
        directions = unflatten(v, params)
        pushed = torch.autograd.grad(
            [g for _, g in reached],
            z,
            [directions[i] for i, _ in reached],
            retain_graph=True,
            materialize_grads=True,
        )
        bent = torch.autograd.grad(curved, points, pushed, retain_graph=True, materialize_grads=True)
        return _flat(torch.autograd.grad(outputs, params, bent, retain_graph=True, allow_unused=True), params)

    return product


def hessian_operator(
    model: nn.Module,
    loss: Loss,
    data: Data,
    params: Iterable[str] | None = None,
    *,
    reduction: Reduction = "mean",
    seed: int = 0,
) -> LinearOperator:
    r"""Hessian ∂²f/∂θ² of the training loss, as an operator on flat vectors.

    It follows the parameters: after an optimizer step the next product is taken at the new ones. Batch
    normalisation in training mode uses the statistics of each batch and is differentiated through. A
    parameter that does not reach the loss has zero rows.

    Args:
        model: the network, in the mode in which it is to be evaluated.
        loss: ``loss(prediction, y)`` to a scalar.
        data: one pair ``(x, y)``, or an iterable of such batches that gives the same batches every time.
            ``x`` is a tensor, a tuple of positional or a dict of keyword arguments.
        params: names of parameters or modules to keep; all that have ``requires_grad`` by default.
        reduction: what ``loss`` does over the samples of a batch, ``"mean"`` or ``"sum"``; f does the same
            over all batches.
        seed: of the random numbers the model draws (dropout), the same at every product.

    Returns:
        LinearOperator of size Σ numel, with the dtype and device of the parameters.

    Raises:
        ArgumentError: nothing to differentiate, an unknown or frozen name, malformed data.
        ShapeError: the loss is not a scalar.
        UnsupportedError: half-precision parameters, or an operation without second derivative.

    Reference: Pearlmutter (1994). Departure: reverse over reverse, with the first pass kept.

    Example:
        >>> net, x, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> hessian = hessian_operator(net, nn.functional.mse_loss, (x, y))
        >>> hessian @ torch.tensor([1.0, 2.0])            # f = |θ|² / 2
        tensor([1., 2.])
    """
    return _Objective(
        model,
        loss,
        batches_of(data),
        select_parameters(model, params),
        reduction,
        seed,
        _build_hessian,
        "the Hessian",
    ).operator()


def ggn_operator(
    model: nn.Module,
    loss: Loss,
    data: Data,
    params: Iterable[str] | None = None,
    *,
    reduction: Reduction = "mean",
    seed: int = 0,
) -> LinearOperator:
    r"""Generalised Gauss–Newton matrix Jᵀ (∂²ℓ/∂z²) J, z the outputs of the model.

    It is the Hessian without the curvature of the network itself: positive semi-definite when ℓ is convex
    in z, and the Fisher matrix when ℓ is a negative log-likelihood of exponential family in z.

    Args:
        model: the network; it may return a tree of tensors.
        loss: as in :func:`hessian_operator`; everything it does counts as ℓ.
        data: as in :func:`hessian_operator`.
        params: as in :func:`hessian_operator`.
        reduction: as in :func:`hessian_operator`.
        seed: as in :func:`hessian_operator`.

    Returns:
        LinearOperator of size Σ numel.

    Raises:
        ArgumentError: as :func:`hessian_operator`.
        ShapeError: the loss is not a scalar.
        UnsupportedError: as :func:`hessian_operator`.

    Reference: Schraudolph (2002). Departure: J v by two reverse passes instead of forward mode, so that
    every model that trains is accepted.

    Example:
        >>> net, x, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> ggn_operator(net, nn.functional.mse_loss, (x, y)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _Objective(
        model,
        loss,
        batches_of(data),
        select_parameters(model, params),
        reduction,
        seed,
        _build_ggn,
        "the Gauss–Newton matrix",
    ).operator()


def closure_hessian(closure: Callable[[], Tensor], params: Iterable[Tensor]) -> LinearOperator:
    """Hessian of any scalar function of some leaf tensors.

    Args:
        closure: evaluates the function from the present values of ``params``, the same way every time.
        params: leaf tensors with ``requires_grad``.

    Returns:
        LinearOperator on flat vectors in the order of ``params``; it follows their values.

    Raises:
        ArgumentError: no ``params``, or one of them cannot be differentiated.
        ShapeError: the function is not a scalar.

    Example:
        >>> a = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> closure_hessian(lambda: (a**3).sum(), [a]) @ torch.ones(2)
        tensor([ 6., 12.])
    """
    leaves = list(params)
    if not leaves or not all(p.requires_grad for p in leaves):
        raise ArgumentError(
            "params is empty or holds a tensor without requires_grad: give the leaves to differentiate"
        )
    kept: list[tuple[_Stamp, Product]] = []

    def product(v: Tensor) -> Tensor:
        stamp = _Stamp.of(leaves)
        with torch.enable_grad(), differentiable_kernels(), _second_derivatives("the Hessian"):
            if not kept or not kept[0][0].same(stamp):
                value = checked_loss(closure())
                if not value.requires_grad:
                    raise ArgumentError("closure returns a value that does not depend on params")
                kept[:] = [(stamp, _hessian_product(value, leaves))]
            return kept[0][1](v)

    dtype = torch.float64 if all(p.dtype == torch.float64 for p in leaves) else torch.float32
    return LinearOperator(product, sum(p.numel() for p in leaves), dtype, leaves[0].device)


def gradient(
    model: nn.Module,
    loss: Loss,
    data: Data,
    params: Iterable[str] | None = None,
    *,
    reduction: Reduction = "mean",
    seed: int = 0,
) -> tuple[float, Tensor]:
    """Loss and flat gradient under the conventions of :func:`hessian_operator`.

    Args:
        model: the network.
        loss: ``loss(prediction, y)`` to a scalar.
        data: one pair ``(x, y)`` or an iterable of batches.
        params: names of parameters or modules to keep.
        reduction: of the loss over a batch.
        seed: of the random numbers the model draws.

    Returns:
        The loss f and ∇f, ``(n,)`` in the order of ``model.parameters()``.

    Raises:
        DivergenceError: the gradient of a parameter, named, is not finite.

    Example:
        >>> net, x, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> value, slope = gradient(net, nn.functional.mse_loss, (x, y))
        >>> bool(torch.allclose(slope, net.weight[0].detach()))
        True
    """
    objective = _Objective(
        model,
        loss,
        batches_of(data),
        select_parameters(model, params),
        reduction,
        seed,
        _build_hessian,
        "the gradient",
    )
    total: Tensor | None = None
    value_sum, weight_sum = 0.0, 0
    for index, batch in enumerate(read(objective.batches, objective.device)):
        weight = count_samples(batch[0]) if reduction == "mean" else 1
        with objective.context(index):
            value = objective.value(batch)
            grads = torch.autograd.grad(value, objective.leaves, allow_unused=True)
        for name, g in zip(objective.params, grads, strict=True):
            if g is not None and not bool(torch.isfinite(g).all()):
                raise DivergenceError(f"the gradient of parameter {name!r} is not finite", layer=name)
        flat = _flat(grads, objective.leaves) * weight
        total = flat if total is None else total.add_(flat)
        value_sum, weight_sum = value_sum + float(value.detach()) * weight, weight_sum + weight
    assert total is not None  # read() raises when there is no batch
    scale = weight_sum if reduction == "mean" else 1
    return value_sum / scale, total / scale
