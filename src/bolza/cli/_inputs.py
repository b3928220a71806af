"""The data, the network and the device that a user names, for the verbs that take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bolza.cli._load import call, is_path, load, near
from bolza.ops.errors import ArgumentError, UserCodeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bolza.data import Dataset

__all__ = ["dataset", "device", "network", "seeded"]


def dataset(spec: str) -> Dataset:
    """A data set of ours by name, or what ``pkg.module:loader`` gives.

    Args:
        spec: one of ``bolza.data.NAMES``, or a path as `bolza.cli._load.load` reads it.

    Raises:
        ArgumentError: the name is unknown; near ones are offered.
        DataError: the data cannot be used.
        UserCodeError: the loader raised.
    """
    from bolza.data import NAMES
    from bolza.data import load as read

    if is_path(spec):
        return read(call(spec, "data"), name=spec)
    if spec not in NAMES:
        hint = near(spec, NAMES) or f"; choose one of {', '.join(NAMES)}."
        raise ArgumentError(f"data {spec!r} is unknown{hint} Your own is named as pkg.module:loader.")
    return read(spec)


def network(
    spec: str, data: Dataset, depth: int | None, width: int | None, activation: str | None
) -> nn.Module:
    """A network of ours by name, sized for the data, or what ``pkg.module:factory`` makes.

    Args:
        spec: one of ``bolza.models.NAMES``, or a path as `bolza.cli._load.load` reads it.
        data: decides the sizes of input and output.
        depth: layers or blocks, for a network of ours.
        width: neurons or channels, for a network of ours.
        activation: name or ``pkg.module:class``, for a network of ours.

    Raises:
        ArgumentError: the name is unknown, or a size is given for a network that is not ours.
        UserCodeError: the factory raised, or made something else than a module.
    """
    from torch import nn

    from bolza.models import NAMES, make

    if is_path(spec):
        sizes = {"--depth": depth, "--width": width, "--activation": activation}
        if given := [name for name, value in sizes.items() if value is not None]:
            raise ArgumentError(
                f"{given[0]} is for a built-in network; {spec} decides for itself: leave it out."
            )
        made = call(spec, "model")
        if not isinstance(made, nn.Module):
            raise UserCodeError(
                f"the model {spec} gave a {type(made).__name__}: it must return a torch.nn.Module."
            )
        return made
    if spec not in NAMES:
        hint = near(spec, NAMES) or f"; choose one of {', '.join(NAMES)}."
        raise ArgumentError(f"model {spec!r} is unknown{hint} Your own is named as pkg.module:factory.")
    own: Any = load(activation, "activation") if activation and is_path(activation) else activation
    return make(spec, data, depth=depth, width=width, activation=own)


def seeded(seed: int) -> None:
    """Seed torch, for networks that are about to be made.

    Args:
        seed: a whole number of at most 64 bits.

    Raises:
        ArgumentError: it has more.
    """
    import torch

    try:
        torch.manual_seed(seed)
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"--seed {seed} has more than 64 bits: choose a smaller number.") from error


def device(name: str | None) -> torch.device | None:
    """The device of that name, tried out; None for that of the network.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` and so on.

    Raises:
        ArgumentError: there is no such device here.
    """
    if name is None:
        return None
    from bolza.training.checks import usable_device

    return usable_device(name, f"--device {name}")
