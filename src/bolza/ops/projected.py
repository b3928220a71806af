r"""Curvature of the loss of each sample, seen along a few directions of the parameters.

    A_i = Vᵀ J_iᵀ ∇²ℓ_i J_i V          (k, k) for each of N samples,   J_i = ∂(outputs of sample i)/∂θ

is the Gauss–Newton matrix of sample i between the columns of V. One forward pass, k directional derivatives and k
products with the second derivative of the loss in the outputs; nothing of the size of the network is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bolza.ops.batches import (
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
from bolza.ops.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.noise import batch_statistics, each_sample_alone
from bolza.ops.replay import differentiable_kernels, same_randomness
from bolza.ops.trees import float_leaves, tree_detach, with_float_leaves

__all__ = ["projected_curvature"]


def projected_curvature(
    model: nn.Module, loss: Loss, data: Data, directions: Tensor, *, seed: int = 0
) -> Tensor:
    r"""Gauss–Newton matrix of the loss of each sample between a few directions: A_i = Vᵀ J_iᵀ ∇²ℓ_i J_i V.

    Samples are kept apart as in :class:`bolza.ops.noise.PerSampleGradients`: evaluation mode, batch norm by the
    statistics of ``data``, held fixed.

    Args:
        model: the network; every output has samples first.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)`` or an iterable of batches.
        directions: V, flat vectors in the order of ``model.parameters()`` as columns, ``(d, k)``.
        seed: of random numbers the model draws even in evaluation mode.

    Returns:
        Tensor ``(N, k, k)``, symmetric; positive semi-definite where the loss is convex in the outputs.

    Raises:
        ArgumentError: the outputs do not depend on the parameters.
        ShapeError: directions do not fit the parameters.
        UnsupportedError: an output does not have samples first.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> half = lambda z, y: (z - y).square().sum(-1).mean() / 2
        >>> projected_curvature(net, half, (x, torch.zeros(2, 1)), torch.ones(2, 1)).flatten()      # (x · v)²
        tensor([1., 9.])
    """
    params = list(select_parameters(model).values())
    size = sum(p.numel() for p in params)
    if directions.ndim != 2 or directions.shape[0] != size:
        raise ShapeError(
            f"directions has shape {tuple(directions.shape)}: give columns of length {size}, one entry a parameter"
        )
    device = params[0].device
    batches = batches_of(data)
    with differentiable_kernels(model), same_randomness(seed, device):
        statistics = batch_statistics(model, batches, device)
    found = []
    for x, y in read(batches, device):
        with (
            torch.enable_grad(),
            each_sample_alone(model, statistics),
            differentiable_kernels(model),
            same_randomness(seed, device),
        ):
            found.append(_of_batch(model, loss, x, y, params, directions.to(params[0])))
    return torch.cat(found)


def _of_batch(
    model: nn.Module, loss: Loss, x: Any, y: Any, params: list[nn.Parameter], directions: Tensor
) -> Tensor:
    n, k = count_samples(x), directions.shape[1]
    output = apply(model, x)
    outputs = [leaf for leaf in float_leaves(output) if leaf.requires_grad]
    if not outputs:
        raise ArgumentError("the outputs do not depend on the parameters: is the model detached?")
    for leaf in outputs:
        if leaf.ndim == 0 or leaf.shape[0] != n:
            raise UnsupportedError(
                f"the model turns {n} samples into an output of shape {tuple(leaf.shape)}: outputs need samples first"
            )
    points = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in float_leaves(output)]
    value = checked_loss(loss(with_float_leaves(tree_detach(output), points), y))
    points = [point for point in points if point.requires_grad]
    slopes = torch.autograd.grad(value, points, create_graph=True, allow_unused=True)
    curved = [(i, s) for i, s in enumerate(slopes) if s is not None and s.requires_grad]
    z = [torch.zeros_like(leaf, requires_grad=True) for leaf in outputs]
    pulled = torch.autograd.grad(outputs, params, z, create_graph=True, allow_unused=True)
    reached = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
    moved, bent = [], []
    for direction in directions.unbind(1):
        pieces = unflatten(direction, params)
        # J v is the derivative in z of the linear map z ↦ Jᵀ z
        pushed = torch.autograd.grad(
            [g for _, g in reached],
            z,
            [pieces[i] for i, _ in reached],
            retain_graph=True,
            materialize_grads=True,
        )
        turned = (
            torch.autograd.grad(
                [s for _, s in curved],
                points,
                [pushed[i] for i, _ in curved],
                retain_graph=True,
                materialize_grads=True,
            )
            if curved  # a loss that is linear in the outputs bends nothing
            else [torch.zeros_like(point) for point in points]
        )
        moved.append(torch.cat([p.reshape(n, -1) for p in pushed], 1))
        bent.append(torch.cat([t.reshape(n, -1) for t in turned], 1))
    along = torch.stack(moved, 2) if moved else directions.new_zeros(n, 1, k)
    back = torch.stack(bent, 2) if bent else along
    matrices = n * along.mT @ back
    return (matrices + matrices.mT).detach() / 2
