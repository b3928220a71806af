"""The losses of the samples of a batch, from a loss that averages over them."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree

from bolza.ops.batches import Loss
from bolza.ops.errors import ShapeError

__all__ = ["sample_losses", "without_reduction"]


def sample_losses(loss: Loss, out: Any, y: Any, n: int) -> Tensor:
    """Losses of the n samples, from a loss that gives one a sample or that averages over them.

    A mean is called on each sample alone, vectorised where it can be; wrap the loss in :func:`without_reduction` once
    to spare that.

    Args:
        loss: ``loss(out, y)``, a scalar mean over the samples or ``(n,)``.
        out: what the model makes of the batch, samples first.
        y: targets, samples first.
        n: samples in the batch.

    Returns:
        Tensor ``(n,)``.

    Raises:
        ShapeError: the loss is neither a scalar nor one number a sample.

    Example:
        >>> sample_losses(torch.nn.functional.mse_loss, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), 2)
        tensor([1., 4.])
    """
    value = loss(out, y)
    if not isinstance(value, Tensor) or (value.ndim and tuple(value.shape) != (n,)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"the loss of {n} examples has shape {got}: it must be their mean, or one number an example, ({n},)"
        )
    if value.ndim:
        return value

    def alone(out: Any, y: Any) -> Tensor:
        return loss(
            *_pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, (out, y))
        )

    try:
        return vmap(alone, randomness="different")(out, y)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
    # a loss that branches on its values, such as one that checks them
    return torch.stack(
        [
            loss(
                *_pytree.tree_map(
                    lambda leaf, i=i: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, (out, y)
                )
            )
            for i in range(n)
        ]
    )


def without_reduction(loss: Loss, out: Any, y: Any, n: int) -> Loss:
    """The loss as one that gives a number a sample, where it has the option and that proves right on a few samples."""
    value = loss(out, y)
    if not isinstance(value, Tensor) or value.ndim:
        return loss
    plain: Loss
    if isinstance(loss, nn.Module):
        if getattr(loss, "reduction", None) != "mean":
            return loss
        plain = copy.copy(loss)
        vars(plain)["reduction"] = "none"
    else:
        try:
            if "reduction" not in inspect.signature(loss).parameters:
                return loss
        except (TypeError, ValueError):
            return loss
        plain = partial(loss, reduction="none")  # type: ignore[call-arg]

    def each(out: Any, y: Any) -> Tensor:
        value = plain(out, y)
        return value if value.ndim == 1 else value.flatten(1).mean(1)

    few = min(n, 4)
    parts = [_pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], (out, y)) for i in range(few)]
    wanted = torch.stack([loss(*part) for part in parts])
    found = each(*_pytree.tree_map(lambda leaf: leaf[:few], (out, y)))
    tol = 1e-4 if found.dtype == torch.float32 else 1e-10
    return each if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=tol, atol=tol) else loss
