r"""Many networks of one architecture, trained at once.

    θ^m_{k+1} = θ^m_k − η^m ∇f_B(θ^m_k),   m = 1 … M, the M copies of a parameter stacked in one tensor

One forward and one backward pass serve all members, so that the price of calling small kernels is paid
once, not M times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bolza.core.errors import ArgumentError
from bolza.training.optimizers import default_loss
from bolza.training.order import BatchOrder

if TYPE_CHECKING:
    from bolza.data import Dataset

__all__ = ["EnsembleRun", "ensemble_parameters", "train_ensemble"]

Numbers = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class EnsembleRun:
    """Outcome of :func:`train_ensemble`, one entry a member.

    Args:
        train_loss: loss on the training set at the end, shape ``(members,)``; inf where it diverged.
        train_accuracy: share of right answers on the training set; empty for regression.
        test_loss: loss on the test set.
        test_accuracy: share of right answers on the test set.
        diverged: whether the parameters stopped being finite.
        parameters: stacked parameters at the end, each ``(members, *shape)``.
        steps: SGD steps of each member.

    Example:
        >>> run = EnsembleRun(*(torch.zeros(3) for _ in range(4)), torch.zeros(3, dtype=torch.bool))
        >>> len(run)
        3
    """

    train_loss: Tensor
    train_accuracy: Tensor
    test_loss: Tensor
    test_accuracy: Tensor
    diverged: Tensor
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    steps: int = 0

    def __len__(self) -> int:
        """Number of members."""
        return len(self.train_loss)


def ensemble_parameters(
    make_model: Callable[[], nn.Module],
    weight_vars: Sequence[float] | Tensor,
    bias_vars: Numbers = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Stacked random parameters, W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²), with σ's of each member's own.

    All members share one draw of standard normals, scaled differently, so that a scan over (σ_w², σ_b²)
    shows their effect and not the luck of the draw.

    Args:
        make_model: makes one network; parameters of more than one axis count as weights, those of one
            axis as biases.
        weight_vars: σ_w² of each member, shape ``(members,)``.
        bias_vars: σ_b², one number or one a member.
        seed: seed of the draw.

    Returns:
        Name → tensor ``(members, *shape)``.

    Raises:
        ArgumentError: a variance is negative, or the numbers of variances differ.

    Example:
        >>> ensemble_parameters(lambda: nn.Linear(3, 2), [1.0, 2.0], 0.05)["weight"].shape
        torch.Size([2, 2, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    sigma_w = _per_member("weight_vars", weight_vars, len(weight_vars)).sqrt()
    sigma_b = _per_member("bias_vars", bias_vars, len(weight_vars)).sqrt()
    if not (sigma_w.isfinite().all() and sigma_b.isfinite().all()):
        raise ArgumentError(f"weight_vars={weight_vars} and bias_vars={bias_vars} must not be negative")
    stacked = {}
    for name, p in make_model().named_parameters():
        draw = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        scale = sigma_w / math.sqrt(math.prod(p.shape[1:])) if p.ndim > 1 else sigma_b
        stacked[name] = scale.to(draw).reshape(-1, *[1] * p.ndim) * draw
    return stacked


def train_ensemble(
    make_model: Callable[[], nn.Module],
    data: Dataset,
    *,
    parameters: Mapping[str, Tensor] | int | None = None,
    weight_vars: Sequence[float] | Tensor | None = None,
    bias_vars: Numbers = 0.0,
    lr: Numbers = 0.1,
    momentum: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 64,
    steps: int = 200,
    seed: int = 0,
    chunk: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> EnsembleRun:
    r"""Train M networks of one architecture by SGD at once: θ^m ← θ^m − η^m v^m, v^m ← μ v^m + ∇f_B(θ^m).

    All members see the same mini-batches. Each trains as if it were alone, and a member that diverges
    does not touch the others. Layers with buffers (batch norm) or noise (dropout) are refused.

    Args:
        make_model: makes one network; only its structure is used where parameters are given.
        data: the data set.
        parameters: stacked start, each ``(members, *shape)``; or a number of members, each as
            ``make_model`` made it.
        weight_vars: in place of ``parameters``: σ_w² of each member, see :func:`ensemble_parameters`.
        bias_vars: σ_b², one number or one a member.
        lr: learning rate η, one number or one a member.
        momentum: μ.
        loss: (outputs, targets) → scalar of one member; the default of the task where not given.
        batch_size: samples a step.
        steps: SGD steps.
        seed: seed of the batches and of the draw.
        chunk: members trained together; all of them by default. Smaller chunks need less memory.
        progress: called after each step of each chunk with (steps done, steps in all).

    Returns:
        :class:`EnsembleRun`.

    Raises:
        ArgumentError: no start is given, sizes differ, or the network has buffers.
        DataError: the labels do not fit the outputs.

    Example:
        >>> from bolza.data import digits
        >>> run = train_ensemble(lambda: nn.Linear(64, 10), digits(), weight_vars=[0.1, 1.0], steps=100)
        >>> bool((run.test_accuracy > 0.8).all())
        True
    """
    template = make_model()
    if next(template.buffers(), None) is not None:
        raise ArgumentError(
            "the network has buffers (batch normalisation?), which members cannot share: train one by one"
        )
    if isinstance(parameters, int):
        parameters = stack_module_state([make_model() for _ in range(parameters)])[0]
    if parameters is None:
        if weight_vars is None:
            raise ArgumentError("give parameters=, or weight_vars= to draw them")
        parameters = ensemble_parameters(make_model, weight_vars, bias_vars, seed)
    members = len(next(iter(parameters.values())))
    rates = _per_member("lr", lr, members)
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"chunk={chunk} must be at least 1")
    size = chunk or members
    first = next(iter(parameters.values()))
    data = data.to(first.device, first.dtype)
    parts = []
    total = steps * math.ceil(members / size)
    for i, start in enumerate(range(0, members, size)):
        part = {
            name: p[start : start + size].detach().clone().requires_grad_() for name, p in parameters.items()
        }
        group = _Group(
            template, part, rates[start : start + size].to(first), momentum, loss or default_loss(data.task)
        )
        report = None if progress is None else _offset(progress, i * steps, total)
        order = BatchOrder(data.train_x, data.train_y, batch_size, seed)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be batched over members
            group.train(data, order, steps, report)
            parts.append(group.result(data, steps))
    return _join(parts)


class _Group:
    """Members that share one forward pass."""

    def __init__(
        self, template: nn.Module, parameters: dict[str, Tensor], rates: Tensor, momentum: float, loss: Any
    ) -> None:
        self.parameters, self.momentum, self.loss = parameters, momentum, loss
        self.minus_rates = [-rates.reshape(-1, *[1] * (p.ndim - 1)) for p in parameters.values()]
        self.forward = vmap(lambda p, x: functional_call(template, p, (x,)), in_dims=(0, None))

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss of each member; outputs are (members, batch, ...)."""
        if self.loss is F.cross_entropy:
            # one fused call: members are as good as samples until the mean
            flat = F.cross_entropy(outputs.flatten(0, 1), y.repeat(len(outputs)), reduction="none")
            return flat.view(len(outputs), -1).mean(1)
        return vmap(self.loss, in_dims=(0, None))(outputs, y)

    def train(
        self, data: Dataset, order: BatchOrder, steps: int, progress: Callable[[int], object] | None
    ) -> None:
        tensors = list(self.parameters.values())
        velocity = [torch.zeros_like(p) for p in tensors] if self.momentum else []
        for k in range(steps):
            x, y = order.next()
            outputs = self.forward(self.parameters, x)
            if k == 0:
                data.check_outputs(outputs[0], y)
            # the gradient of a sum over members is the gradient of each member
            update = list(torch.autograd.grad(self.losses(outputs, y).sum(), tensors))
            with torch.no_grad():
                if self.momentum:
                    torch._foreach_mul_(velocity, self.momentum)
                    torch._foreach_add_(velocity, update)
                    update = velocity
                torch._foreach_addcmul_(tensors, update, self.minus_rates)
            if progress is not None:
                progress(k + 1)

    @torch.no_grad()
    def result(self, data: Dataset, steps: int) -> EnsembleRun:
        finite = torch.stack([p.flatten(1).isfinite().all(1) for p in self.parameters.values()]).all(0)
        values = []
        for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
            outputs = torch.cat([self.forward(self.parameters, part) for part in x.split(512)], 1)
            losses = self.losses(outputs, y).nan_to_num(nan=math.inf) if len(x) else x.new_empty(0)
            values.append(torch.where(finite, losses, math.inf) if len(x) else losses)
            labels = data.task != "regression" and len(x)
            values.append((outputs.argmax(-1) == y).flatten(1).double().mean(1) if labels else x.new_empty(0))
        state = {name: p.detach() for name, p in self.parameters.items()}
        return EnsembleRun(values[0], values[1], values[2], values[3], ~finite, state, steps)


def _join(parts: list[EnsembleRun]) -> EnsembleRun:
    if len(parts) == 1:
        return parts[0]
    return EnsembleRun(
        torch.cat([part.train_loss for part in parts]),
        torch.cat([part.train_accuracy for part in parts]),
        torch.cat([part.test_loss for part in parts]),
        torch.cat([part.test_accuracy for part in parts]),
        torch.cat([part.diverged for part in parts]),
        {name: torch.cat([part.parameters[name] for part in parts]) for name in parts[0].parameters},
        parts[0].steps,
    )


def _per_member(name: str, values: Numbers, members: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(tensor) not in (1, members):
        raise ArgumentError(
            f"{name} holds {len(tensor)} values for {members} members: give one, or one a member"
        )
    return tensor.expand(members)


def _offset(progress: Callable[[int, int], object], done: int, total: int) -> Callable[[int], object]:
    return lambda step: progress(done + step, total)
