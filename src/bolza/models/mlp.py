"""A plain multi-layer perceptron, and activations by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bolza.core.errors import ArgumentError

__all__ = ["ACTIVATIONS", "activation_module", "mlp"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}


def activation_module(activation: str | Callable[[], nn.Module]) -> nn.Module:
    """A new activation module from its name or its class.

    Args:
        activation: a name of :data:`ACTIVATIONS`, or anything that makes a module when called.

    Returns:
        A fresh ``nn.Module``.

    Raises:
        ArgumentError: the name is not known, or the call made no module.

    Example:
        >>> activation_module("tanh")
        Tanh()
    """
    if isinstance(activation, str):
        if activation.lower() not in ACTIVATIONS:
            raise ArgumentError(
                f"activation={activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}, "
                "or give a module class"
            )
        return ACTIVATIONS[activation.lower()]()
    made = None if isinstance(activation, nn.Module) or not callable(activation) else activation()
    if not isinstance(made, nn.Module):
        raise ArgumentError(
            f"activation={activation!r} makes no module when called: give a class such as torch.nn.Tanh"
        )
    return made


def mlp(
    depth: int = 50,
    width: int = 100,
    activation: str | Callable[[], nn.Module] = "tanh",
    in_features: int = 64,
    out_features: int = 10,
    bias: bool = True,
) -> nn.Sequential:
    """A chain of ``depth`` linear layers with an activation between each two.

    Args:
        depth: linear layers, the last one included.
        width: neurons in each hidden layer.
        activation: name or class, see :func:`activation_module`.
        in_features: length of the input vector.
        out_features: length of the output.
        bias: whether the linear layers have biases.

    Returns:
        ``nn.Sequential`` with PyTorch's default initialisation.

    Raises:
        ArgumentError: a size is not positive, or the activation is not known.

    Example:
        >>> mlp(depth=2, width=5, in_features=3, out_features=2)
        Sequential(
          (0): Linear(in_features=3, out_features=5, bias=True)
          (1): Tanh()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )
    """
    positive(depth=depth, width=width, in_features=in_features, out_features=out_features)
    sizes = [in_features, *[width] * (depth - 1), out_features]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(sizes[i], sizes[i + 1], bias))
        if i < depth - 1:
            layers.append(activation_module(activation))
    return nn.Sequential(*layers)


def positive(**sizes: int) -> None:
    """Refuse sizes below one, by name."""
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name}={size} must be at least 1")
