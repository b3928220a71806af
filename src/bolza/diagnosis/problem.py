"""The network, its data and its loss, checked once and made safe to measure.

Everything here works on a copy of the model; the caller's parameters, buffers, gradients, mode and random
state stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import Dataset, load
from bolza.ops.errors import ArgumentError, BolzaError, DataError, ShapeError, UnsupportedError, UserCodeError
from bolza.ops.replay import differentiable_kernels, frozen_statistics
from bolza.training import default_loss
from bolza.training.checks import usable_device

__all__ = ["Loss", "Problem", "prepare"]

Loss = Callable[[Any, Tensor], Tensor]

_NOISY = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Problem:
    """A network with a batch to measure it on.

    Args:
        model: a private copy, with dropout off and normalisation by the statistics of the batch.
        pristine: another copy, as it came.
        x: inputs, ``(samples, ...)``.
        y: targets.
        loss: ``loss(model(x), y)``, a scalar mean over the samples.
        own_loss: the same where the user gave it, None where it is the one of the task.
        task: ``classification``, ``language`` or ``regression``.
        dataset: training and test data.
        seed: for everything random.
        without_gradient: parameters that the loss does not reach.
        frozen: parameters that do not ask for a gradient.
        batch_coupled: layers whose output for one sample depends on the others.
        initial_loss: the loss of the untrained network on the batch.
    """

    model: nn.Module
    pristine: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss
    own_loss: Loss | None
    task: str
    dataset: Dataset
    seed: int
    without_gradient: tuple[str, ...]
    frozen: tuple[str, ...]
    batch_coupled: tuple[str, ...]
    initial_loss: float

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters that the loss reaches."""
        idle = {*self.without_gradient, *self.frozen}
        return [name for name, _ in self.model.named_parameters() if name not in idle]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the loss reaches."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.parameter_names]

    def batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """The first ``samples`` of the batch."""
        return self.x[:samples], self.y[:samples]

    def with_model(self, model: nn.Module, pristine: nn.Module) -> Problem:
        """The same problem for another network of the same architecture."""
        return replace(self, model=model, pristine=pristine)


def prepare(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    loss: Loss | None = None,
    *,
    samples: int = 256,
    seed: int = 0,
    device: Any = None,
    test_fraction: float = 0.2,
) -> Problem:
    """Check a model, its data and its loss together, and copy the model.

    Args:
        model: network, or a function of no arguments that makes one.
        data: whatever `bolza.data.load` reads: a name, a Dataset, a pair ``(x, y)``, a loader; real numbers are
            converted to the dtype of the model.
        loss: ``loss(output, target)``; by default the one that suits the targets.
        samples: how many samples to measure on.
        seed: chooses them.
        device: where to work; where the parameters are by default.
        test_fraction: share held out where the data has no test part; 0 measures on all of it.

    Returns:
        The problem.

    Raises:
        ArgumentError: an argument is of the wrong kind, or the loss is not a scalar.
        DataError: the data is empty, has a single sample, is not finite, or has labels out of range.
        UnsupportedError: half precision on a CPU, or a model that cannot be copied or holds no values.
        UserCodeError: the model or the loss raised.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ArgumentError(
                f"model is a {type(model).__name__}: give a torch.nn.Module or a function that makes one"
            )
        model = _made_by(model)
    if samples < 2:
        raise ArgumentError(
            f"samples={samples} is too few: covariances need at least 2, error bars 32 or more"
        )
    dataset = _dataset(data, test_fraction, seed)
    twin = _copied(model)
    twin.zero_grad(set_to_none=True)
    first = next(iter(twin.parameters()), None)
    if first is None:
        raise ArgumentError(f"model {type(model).__name__} has no parameters: there is nothing to examine")
    place = usable_device(device) if device is not None else first.device
    _check_precision(twin, dataset.train_x, place)
    kinds = {p.dtype for p in twin.parameters() if p.is_floating_point()}
    if len(kinds) == 1:
        dataset = dataset.to(dtype=kinds.pop())
    x, y = _sample(dataset, samples, seed)
    twin.to(place)
    x, y = x.to(place), y.to(place)
    if any(isinstance(p, nn.UninitializedParameter) for p in twin.parameters()):
        _first_call(twin, x)  # lazy layers get their weights here, the same for every later copy
    pristine = copy.deepcopy(twin)
    measuring_mode_(twin)
    frozen = tuple(name for name, p in twin.named_parameters() if not p.requires_grad)
    if len(frozen) == len(list(twin.parameters())):
        raise ArgumentError(
            "every parameter has requires_grad=False: call model.requires_grad_(True) for those to train"
        )
    own_loss, loss = loss, loss or default_loss(dataset.task)
    initial, idle = _first_pass(twin, x, y, loss, dataset if own_loss is None else None)
    coupled = tuple(
        name
        for name, layer in twin.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    )
    return Problem(
        model=twin,
        pristine=pristine,
        x=x,
        y=y,
        loss=loss,
        own_loss=own_loss,
        task=dataset.task,
        dataset=dataset,
        seed=seed,
        without_gradient=idle,
        frozen=frozen,
        batch_coupled=coupled,
        initial_loss=initial,
    )


def measuring_mode_(model: nn.Module) -> nn.Module:
    """Set the mode in which a network is measured: dropout off, normalisation by the batch.

    An untrained network in evaluation mode would normalise by statistics that nobody has gathered yet.
    """
    model.train()
    for layer in model.modules():
        if isinstance(layer, _NOISY):
            layer.eval()
        elif isinstance(
            layer, (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        ):
            for name in ("dropout", "p"):
                if isinstance(getattr(layer, name, None), float):
                    setattr(layer, name, 0.0)
    return model


def _made_by(factory: Callable[[], Any]) -> nn.Module:
    name = getattr(factory, "__qualname__", repr(factory))
    try:
        made = factory()
    except Exception as error:
        raise UserCodeError(
            f"the model factory {name} raised {type(error).__name__}: {error}; it must return a torch.nn.Module "
            "when called without arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise UserCodeError(
            f"the model factory {name} returned a {type(made).__name__}: it must return a torch.nn.Module"
        )
    return made


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"model {type(model).__name__} cannot be copied ({_first_line(error).rstrip('.')}), and it is measured on "
            "a copy so that it stays as it is: do not keep locks, files or computed tensors in its attributes, or "
            "define __deepcopy__"
        ) from error


def _dataset(data: Any, test_fraction: float, seed: int) -> Dataset:
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the global generator
        torch.manual_seed(seed)
        return load(data, test_fraction=test_fraction, seed=seed)


def _sample(dataset: Dataset, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random part of the training samples, always the same for one seed."""
    x, y = dataset.train_x, dataset.train_y
    if len(x) > samples:
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:samples]
        x, y = x[chosen.to(x.device)], y[chosen.to(y.device)]
    return x, y


def _check_precision(model: nn.Module, x: Tensor, device: torch.device) -> None:
    for name, p in model.named_parameters():
        if p.is_meta:
            raise UnsupportedError(
                f"parameter {name!r} is on the meta device, where tensors hold no values: make the model outside "
                "torch.device('meta')"
            )
        if p.dtype == torch.float16 and device.type == "cpu":
            raise UnsupportedError(
                f"parameter {name!r} is float16 on a CPU, where curvature and gradients cannot be trusted: "
                "convert the model with model.float(), or move it to a GPU"
            )
    if x.dtype == torch.float16 and device.type == "cpu":
        raise UnsupportedError(
            "the inputs are float16 on a CPU: convert them with x.float(), or move to a GPU"
        )


def _first_pass(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, dataset: Dataset | None
) -> tuple[float, tuple[str, ...]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with torch.enable_grad(), frozen_statistics(model), differentiable_kernels():
        output = _first_call(model, x)
        if dataset is not None:
            dataset.check_outputs(output, y)
        try:
            value = loss(output, y)
        except BolzaError:
            raise
        except Exception as error:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserCodeError(
                f"the loss raised {type(error).__name__} for outputs {shape} and targets {tuple(y.shape)}: "
                f"{_first_line(error)}; give loss= a function of (output, target)"
            ) from error
        if not isinstance(value, Tensor) or value.ndim != 0 or value.is_complex():
            what = (
                f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise ShapeError(
                f"the loss returned {what}: it must be a real scalar, such as the mean over the samples"
            )
        if not torch.isfinite(value):
            raise DataError(
                f"the loss of the untrained network is {value.item()}: check the scale of the inputs and of "
                "the first layers"
            )
        if not value.requires_grad:
            raise ArgumentError(
                "the loss depends on no parameter: remove detach() or no_grad from the forward pass"
            )
        gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    idle = tuple(name for (name, _), g in zip(named, gradients, strict=True) if g is None)
    if len(idle) == len(named):
        raise ArgumentError(
            f"the loss depends on no parameter, not even on {idle[0]!r}: compute it from the outputs of the model"
        )
    return float(value.detach()), idle


def _first_call(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except Exception as error:
        raise UserCodeError(
            f"the model {type(model).__name__} raised {type(error).__name__} on inputs of shape {tuple(x.shape)}: "
            f"{_first_line(error)}; {_conversion(x, error)}"
        ) from error


def _conversion(x: Tensor, error: Exception) -> str:
    if "dtype" in str(error) and not x.is_floating_point():
        return f"convert the inputs, which are {str(x.dtype).removeprefix('torch.')}, with x.float()"
    return "give data of the shape and type that its forward expects"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
