"""What all meta-learners share: a network, a loss, an inner rule, and batches of tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, UnsupportedError
from bolza.meta.adaptation import Adaptation, TaskLoss, batched, count_tasks
from bolza.meta.statistics import collected, fix, using
from bolza.ops.batches import select_parameters
from bolza.ops.replay import differentiable_kernels, frozen_statistics
from bolza.ops.trees import Tree, tree_detach
from bolza.systems.training import SGD, UpdateRule

__all__ = ["Learner", "Statistics", "default_loss"]

Statistics = Literal["batch", "support"]
Loss = Callable[[Any, Any], Tensor]
TaskData = tuple[Any, Any]


def default_loss(output: Any, y: Any) -> Tensor:
    """Cross-entropy for integer targets, mean square error for others."""
    integer = isinstance(y, Tensor) and not y.is_floating_point()
    return F.cross_entropy(output, y) if integer else F.mse_loss(output, y)


class Learner(nn.Module):
    """A network that is to learn new tasks from little; its ``forward`` is the loss of the outer loop.

    The network itself is not copied: the outer optimizer moves it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        rule: UpdateRule | float,
        steps: int,
        params: Iterable[str] | None,
        statistics: Statistics,
        vectorized: bool | None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ArgumentError(f"steps={steps} must be at least 1: without an inner step nothing is adapted")
        if isinstance(rule, int | float) and not rule > 0:
            raise ArgumentError(f"lr={rule} must be positive: it is the rate of the inner steps")
        if statistics not in ("batch", "support"):
            raise ArgumentError(f"statistics={statistics!r} is unknown: choose 'batch' or 'support'")
        self.model, self.loss = model, loss or default_loss
        self.rule: UpdateRule = SGD(lr=rule) if isinstance(rule, int | float) else rule
        self.steps, self.statistics = steps, statistics
        if vectorized is None:  # torch has no batching rules for its recurrent layers
            vectorized = not any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in model.modules())
        self.vectorized = vectorized
        self._adapted = tuple(select_parameters(model, params))

    def split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters that the inner steps adapt, and the other trainable ones."""
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = [name for name in self._adapted if name not in trainable]
        if missing:
            raise ArgumentError(
                f"parameter {missing[0]!r} was to be adapted, but is frozen or gone now: make a new "
                f"{type(self).__name__} of the model as it is"
            )
        adapted = {name: trainable.pop(name) for name in self._adapted}
        return adapted, trainable  # type: ignore[return-value]

    def controls(self) -> dict[str, Tree]:
        """Hyper-parameters of an inner step."""
        return self.rule.controls()

    def evaluation(self) -> AbstractContextManager[Any]:
        """Leave the network's buffers alone, on kernels that have second derivatives."""
        stack = ExitStack()
        stack.enter_context(frozen_statistics(self.model))
        stack.enter_context(differentiable_kernels(self.model))
        return stack

    def inner_losses(self) -> TaskLoss:
        """(stacked params, shared, support) → loss of every task."""

        def one(params: Tree, shared: Tree, data: TaskData) -> Tensor:
            return self.loss(self._call(params, shared, data[0]), data[1])

        return batched(one, self.vectorized)

    def outer_losses(self) -> TaskLoss:
        """(stacked params, shared, support, query) → loss of every task after adaptation."""

        def one(params: Tree, shared: Tree, support: TaskData, query: TaskData) -> Tensor:
            return self.loss(self._answer(params, shared, support[0], query[0]), query[1])

        return batched(one, self.vectorized)

    def adaptation(
        self, support: TaskData, first_order: bool = False, seed: int | None = None, steps: int | None = None
    ) -> Adaptation:
        """The inner run on a batch of tasks."""
        check_pair(support, "support")
        return Adaptation(
            self.inner_losses(),
            support,
            self.rule,
            self.steps if steps is None else steps,
            first_order,
            seed,
        )

    def adapt(self, x: Any, y: Any, steps: int | None = None) -> nn.Module:
        """A copy of the network that has learned one task.

        Args:
            x: inputs of the task, samples first (a tuple or a dict for several inputs).
            y: its targets.
            steps: inner steps; those of training by default.

        Returns:
            A network like ``model``, in the same mode. With ``statistics="support"`` its batch normalisations hold
            the statistics of ``x`` and are in evaluation mode.

        Raises:
            DataError: the pair holds no samples.
        """
        task = torch.utils._pytree.tree_map(
            lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, (x, y)
        )
        params = {name: p[0] for name, p in self.adapt_tasks(task, steps).items()}
        network = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.grad = None
                if name in params:
                    p.copy_(params[name])
            if self.statistics == "support":
                names = {layer: name for name, layer in self.model.named_modules()}
                shared = tree_detach(self.split()[1])
                with self.evaluation(), collected(self.model) as seen:
                    self._call(params, shared, x)
                fix(names, network, seen)
        return network

    def adapt_tasks(self, support: TaskData, steps: int | None = None) -> dict[str, Tensor]:
        """Adapted parameters of a batch of tasks, without gradients.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            steps: inner steps; those of training by default.

        Returns:
            Parameters by name, each ``(tasks, …)``.
        """
        with torch.no_grad(), self.evaluation():
            return self._adapt(self.adaptation(support, steps=steps))

    def predict(self, support: TaskData, x: Any, steps: int | None = None) -> Any:
        """Outputs on new inputs of a batch of tasks, after learning them from their support sets.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            x: new inputs, ``(tasks, queries, …)``.
            steps: inner steps; those of training by default, 0 for the network as it is.

        Returns:
            Outputs ``(tasks, queries, …)``, without gradients.
        """
        params = self.adapt_tasks(support, steps)
        shared = tree_detach(self.split()[1])
        with torch.no_grad(), self.evaluation():
            if not self.vectorized:
                parts = []
                for i in range(count_tasks(support, "support")):
                    own = torch.utils._pytree.tree_map(
                        lambda leaf, i=i: leaf[i] if isinstance(leaf, Tensor) else leaf,
                        (params, support[0], x),
                    )
                    parts.append(self._answer(own[0], shared, own[1], own[2]))
                return torch.utils._pytree.tree_map(lambda *outs: torch.stack(outs), *parts)
            return torch.func.vmap(self._answer, in_dims=(0, None, 0, 0), randomness="different")(
                params, shared, support[0], x
            )

    def _adapt(self, adaptation: Adaptation) -> dict[str, Tensor]:
        params, shared = (tree_detach(part) for part in self.split())
        state = adaptation.run(adaptation.initial_state(params, shared), tree_detach(self.controls()))
        return state["params"]  # type: ignore[no-any-return]

    def _call(self, params: Tree, shared: Tree, x: Any) -> Any:
        values = {**params, **shared}
        if isinstance(x, dict):
            return functional_call(self.model, values, (), x)
        return functional_call(self.model, values, x)

    def _answer(self, params: Tree, shared: Tree, support_x: Any, x: Any) -> Any:
        if self.statistics == "batch":
            return self._call(params, shared, x)
        with collected(self.model) as seen:
            self._call(params, shared, support_x)
        if not seen:
            return self._call(params, shared, x)
        with using(self.model, seen):
            try:
                return self._call(params, shared, x)
            except StopIteration as error:
                raise UnsupportedError(
                    "a batch normalisation was called more often on the query than on the support set: "
                    "use statistics='batch'"
                ) from error


def check_pair(data: Any, name: str) -> None:
    """Raise a DataError unless ``data`` is a pair (x, y)."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            f"{name} is a {type(data).__name__}, not a pair (x, y): give x of shape (tasks, shots, …) and the targets"
        )


def check_tasks(support: TaskData, query: TaskData) -> None:
    """Raise a DataError unless both are pairs of the same number of tasks."""
    check_pair(support, "support")
    check_pair(query, "query")
    counts = count_tasks(support, "support"), count_tasks(query, "query")
    if counts[0] != counts[1]:
        raise DataError(f"support has {counts[0]} tasks and query {counts[1]}: give both for the same tasks")
