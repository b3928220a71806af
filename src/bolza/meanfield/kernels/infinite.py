r"""NNGP and neural tangent kernels of infinitely wide networks.

A network whose layers get wide becomes, before training, a Gaussian process with covariance K, and under gradient
descent a linear model with kernel Θ (in the ``"ntk"`` parametrization, where W = σ_w ω/√n_in with ω ~ N(0, 1)):

    K¹ = σ_w² x·x'/n_0 + σ_b²,          K^{l+1} = σ_w² E φ(u)φ(v) + σ_b²,     (u, v) ~ N(0, K^l)
    Θ¹ = K¹,                            Θ^{l+1} = K^{l+1} + σ_w² E φ'(u)φ'(v) ∘ Θ^l

The architecture is read from the graph of a PyTorch network, so that residual sums, convolutions, pooling and norms
are taken as they are. Kernels are computed in blocks that stay in the cache of a core; of a symmetric kernel only the
upper half is computed.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ConvergenceWarning, DataError
from bolza.core.reference import Reference, cites
from bolza.meanfield.kernels.duals import PairTable
from bolza.meanfield.kernels.graph import Options, Reader

__all__ = ["InfiniteKernels", "infinite_kernels", "nngp", "ntk"]

Parametrization = Literal["ntk", "standard"]

LEE = Reference(
    "lee2018deep",
    "Lee, Jaehoon and Bahri, Yasaman and Novak, Roman and Schoenholz, Samuel S. and Pennington, Jeffrey and "
    "Sohl-Dickstein, Jascha",
    "Deep Neural Networks as Gaussian Processes",
    2018,
    venue="ICLR",
    arxiv="1711.00165",
)
JACOT = Reference(
    "jacot2018ntk",
    "Jacot, Arthur and Gabriel, Franck and Hongler, Clément",
    "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    2018,
    venue="NeurIPS",
    arxiv="1806.07572",
)
NOVAK = Reference(
    "novak2019bayesian",
    "Novak, Roman and Xiao, Lechao and Lee, Jaehoon and Bahri, Yasaman and Yang, Greg and Hron, Jiri and "
    "Abolafia, Daniel A. and Pennington, Jeffrey and Sohl-Dickstein, Jascha",
    "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes",
    2019,
    venue="ICLR",
    arxiv="1810.05148",
)
ARORA = Reference(
    "arora2019exact",
    "Arora, Sanjeev and Du, Simon S. and Hu, Wei and Li, Zhiyuan and Salakhutdinov, Ruslan and Wang, Ruosong",
    "On Exact Computation with an Infinitely Wide Neural Net",
    2019,
    venue="NeurIPS",
    arxiv="1904.11955",
)

_BYTES = 1 << 20  # of one kernel of a block: a handful of them stay in the cache of a core


@dataclass(frozen=True)
class InfiniteKernels:
    """Both kernels of a network in the limit of infinite width.

    Args:
        nngp: covariance of the outputs of a random network, ``(n1, n2)``, or ``(n,)`` if only the diagonal
            was asked for; ``(*positions, n1, n2)`` if the network's output still has positions.
        ntk: tangent kernel in the same shape; None if not asked for.
        error: estimated largest relative error of one tabulated or sampled activation; 0 with closed forms alone.
    """

    nngp: Tensor
    ntk: Tensor | None
    error: float = 0.0


@cites(LEE, JACOT, NOVAK, ARORA)
def infinite_kernels(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    weight_var: float | None = None,
    bias_var: float | None = None,
    parametrization: Parametrization = "ntk",
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
    tangent: bool = True,
    samples: int = 4096,
    seed: int = 0,
) -> InfiniteKernels:
    r"""NNGP and tangent kernel of a network in the limit of infinite width, in one pass.

    Args:
        model: a network of linear, convolutional, embedding, activation, normalisation, average-pooling and
            dropout layers (in evaluation mode) with sums, products and concatenations between them; further
            layers through `kernel_map`. Its widths do not matter (in the ``"ntk"`` parametrization), its
            weights only through their variances.
        x1: inputs ``(n1, …)``, as the model takes them.
        x2: inputs ``(n2, …)``; None stands for ``x1``.
        weight_var: σ_w² of every layer, with W_ij of variance σ_w²/n_in. By default that of each layer's own
            weights, for a convolution each tap by itself.
        bias_var: σ_b² of every layer that has biases; by default that of each layer's own.
        parametrization: ``"ntk"``: every layer's weights count by σ_w²/n_in; ``"standard"``: by 1, as in a PyTorch
            network trained with one learning rate, which then depends on the model's widths.
        dtype: of the arithmetic and the result; default that of ``x1``. In float32 the tangent kernel of nearly
            parallel inputs is good to three digits only.
        diagonal: only K(x, x) and Θ(x, x), ``(n1,)``.
        tangent: also compute Θ.
        samples: points for an activation of a sum or product of values of which not all are Gaussian, as in
            relu(x + f(x)), where neither a closed form nor a table is at hand. They are quasi-random, the same for
            every pair of inputs; with 4096 the kernels are good to about 0.5 %, which ``error`` of the result tells.
        seed: of these points.

    Returns:
        Both kernels, on the device of ``x1``.

    Raises:
        ArgumentError: an argument makes no sense, or the model holds no weights.
        DataError: ``x1`` or ``x2`` is empty or not finite.
        TraceError: the model's graph cannot be read.
        UnsupportedError: a layer has no map; the error names it and says what to register.

    Warns:
        ConvergenceWarning: the table of an activation is worse than 10⁻⁶.

    Reference:
        Lee et al. (2018), eq. 4-5; Jacot et al. (2018), theorem 1; Novak et al. (2019) and Arora et al. (2019),
        section 4 for convolutions.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> both = infinite_kernels(net, x, weight_var=2.0, bias_var=0.0)
        >>> both.nngp[0].tolist()   # diagonal 1, and 1/π at a right angle
        [1.0, 0.3183098861837907]
        >>> both.ntk[0].tolist()
        [2.0, 0.3183098861837907]
    """
    if parametrization not in ("ntk", "standard"):
        raise ArgumentError(f"parametrization={parametrization!r} is unknown: choose 'ntk' or 'standard'")
    for name, value in (("weight_var", weight_var), ("bias_var", bias_var)):
        if value is not None and not 0 <= value < math.inf:
            raise ArgumentError(f"{name}={value} is no variance: give a number that is not negative")
    if diagonal and x2 is not None:
        raise ArgumentError("diagonal=True pairs every input with itself: leave x2 out")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}: give a torch.nn.Module")
    for name, x in (("x1", x1), ("x2", x2)):
        _check_inputs(name, x)
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        raise ArgumentError(
            f"x1 and x2 have inputs of shapes {tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}"
        )
    if dtype is None:
        dtype = x1.dtype if x1.is_floating_point() else torch.get_default_dtype()
    if samples < 4:
        raise ArgumentError(f"samples={samples} are too few points: give at least 4")
    options = Options(tangent, parametrization, weight_var, bias_var, dtype, samples, seed)
    reader = Reader(model, x1, x2, options, _BYTES // dtype.itemsize)
    own = [_join(parts, -1) for parts in reader.diagonals]
    if diagonal:
        return InfiniteKernels(own[0][0], own[0][1], _table_error(reader))
    out: list[Tensor | None] = [None, None]
    for row, column, k in reader.blocks():
        for i, part in enumerate((k.nngp, k.ntk)):
            if part is None:
                continue
            part = part.reshape(*k.space, *part.shape[-2:])
            if reader.symmetric and row == column:
                part = (part + part.transpose(-1, -2)) / 2
            whole = out[i]
            if whole is None:
                whole = out[i] = part.new_zeros(*k.space, *reader.sizes)
            whole[..., row, column] = part
            if reader.symmetric and row != column:
                whole[..., column, row] = part.transpose(-1, -2)
    if reader.symmetric:  # an input with itself: exact, without the rounding of its correlation
        for whole, exact in zip(out, own[0], strict=True):
            if whole is not None and exact is not None:
                whole.diagonal(dim1=-2, dim2=-1).copy_(exact)
    assert out[0] is not None
    tangent_kernel = torch.zeros_like(out[0]) if tangent and out[1] is None else out[1]
    return InfiniteKernels(out[0], tangent_kernel, _table_error(reader))


def _check_inputs(name: str, x: Any) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ArgumentError(f"{name} must be a batch of inputs (n, …), a tensor of at least two dimensions")
    if not len(x):
        raise DataError(f"{name} holds no inputs")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(f"{name} holds {int((~torch.isfinite(x)).sum())} numbers that are not finite")


def _join(parts: list[Any], dim: int) -> tuple[Tensor, Tensor | None]:
    """Diagonals of both kernels, ``(*positions, n)``."""
    space = parts[0].space
    joined = torch.cat([p.nngp for p in parts], dim)
    tangents = [p.ntk for p in parts if p.ntk is not None]
    tangent = torch.cat(tangents, dim).reshape(*space, -1) if tangents else None
    return joined.reshape(*space, -1), tangent


def _table_error(reader: Reader) -> float:
    tables = [t for op in reader.ops for t in op.cache.values() if hasattr(t, "error")]
    error = max((t.error for t in tables if isinstance(t, PairTable)), default=0.0)
    if error > 1e-6:
        warnings.warn(
            f"the kernels rest on tables of an activation with a relative error of about {error:.1g}: scale the "
            "inputs to similar lengths, or use an activation with a closed form",
            ConvergenceWarning,
            stacklevel=3,
        )
    return float(max((t.error for t in tables), default=0.0))


@cites(LEE, NOVAK)
def nngp(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    weight_var: float | None = None,
    bias_var: float | None = None,
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
    samples: int = 4096,
    seed: int = 0,
) -> Tensor:
    r"""Covariance K(x, x') of the outputs of a random network in the limit of infinite width.

        K¹ = σ_w² x·x'/n_0 + σ_b²,    K^{l+1} = σ_w² E φ(u)φ(v) + σ_b²,    (u, v) ~ N(0, K^l)

    Args:
        model: the network; see `infinite_kernels` for this and the other arguments.
        x1: inputs ``(n1, …)``.
        x2: inputs ``(n2, …)``; None stands for ``x1``.
        weight_var: σ_w² of every layer; by default that of its own weights.
        bias_var: σ_b² of every layer with biases; by default that of its own.
        dtype: of the arithmetic and the result; default that of ``x1``.
        diagonal: only K(x, x), ``(n1,)``.
        samples: points for activations of values that are not Gaussian, as in relu(x + f(x)); see `infinite_kernels`.
        seed: of these points.

    Returns:
        ``(n1, n2)``.

    Raises:
        ArgumentError: an argument makes no sense.
        DataError: inputs are empty or not finite.
        UnsupportedError: a layer has no map.

    Reference:
        Lee et al. (2018), eq. 4-5; Novak et al. (2019) for convolutions.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> nngp(net, torch.eye(2), weight_var=2.0, bias_var=0.0).diagonal()
        tensor([1., 1.])
    """
    return infinite_kernels(
        model, x1, x2, weight_var=weight_var, bias_var=bias_var, dtype=dtype, diagonal=diagonal, tangent=False,
        samples=samples, seed=seed,
    ).nngp  # fmt: skip


@cites(JACOT, ARORA)
def ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    weight_var: float | None = None,
    bias_var: float | None = None,
    parametrization: Parametrization = "ntk",
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
    samples: int = 4096,
    seed: int = 0,
) -> Tensor:
    r"""Neural tangent kernel Θ(x, x') of one output in the limit of infinite width.

        Θ¹ = K¹,    Θ^{l+1} = K^{l+1} + σ_w² E φ'(u)φ'(v) ∘ Θ^l

    Args:
        model: the network; see `infinite_kernels` for this and the other arguments.
        x1: inputs ``(n1, …)``.
        x2: inputs ``(n2, …)``; None stands for ``x1``.
        weight_var: σ_w² of every layer; by default that of its own weights.
        bias_var: σ_b² of every layer with biases; by default that of its own.
        parametrization: ``"ntk"``, or ``"standard"``: that of a PyTorch network of the model's widths, the
            limit of `empirical_ntk`.
        dtype: of the arithmetic and the result; default that of ``x1``.
        diagonal: only Θ(x, x), ``(n1,)``.
        samples: points for activations of values that are not Gaussian, as in relu(x + f(x)); see `infinite_kernels`.
        seed: of these points.

    Returns:
        ``(n1, n2)``. Parameters that do not require a gradient have no share.

    Raises:
        ArgumentError: an argument makes no sense.
        DataError: inputs are empty or not finite.
        UnsupportedError: a layer has no map.

    Reference:
        Jacot et al. (2018), theorem 1; Arora et al. (2019), section 4 for convolutions. Departure: with
        ``"standard"`` the sum over parameters is not divided by the widths.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> ntk(net, torch.eye(2), weight_var=2.0, bias_var=0.0).diagonal()
        tensor([2., 2.])
    """
    result = infinite_kernels(
        model, x1, x2, weight_var=weight_var, bias_var=bias_var, parametrization=parametrization, dtype=dtype,
        diagonal=diagonal, samples=samples, seed=seed,
    ).ntk  # fmt: skip
    assert result is not None
    return result
