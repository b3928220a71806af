r"""Sharpness along a training run, and the few steep directions that carry the gradient.

    sharpness   λ₁(P⁻¹H) against the limit 2(1 + μ)/η of the optimizer       (above it the linearised step grows)
    share       ‖Vᵀg‖² / ‖g‖²,   V = (u₁, …, u_k) the steepest directions    (1: the gradient lies in their span)

Gradient descent on a network raises the sharpness until it hovers at the limit, the *edge of stability*; from there
on most of the gradient points across the valley, into the steep directions, and little of the progress is made there.
Eigenvectors move slowly along a run: started from the last ones, a Lanczos iteration needs a few products.

Reference: Lowell (2022), *There is a Singularity in the Loss Landscape*; Cohen, Kaur, Li, Kolter & Talwalkar (2021),
*Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability*; Cohen et al. (2022), *Adaptive Gradient
Methods at the Edge of Stability*, for optimizers with a preconditioner P.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss, select_parameters
from bolza.ops.curvature import gradient as flat_gradient
from bolza.ops.curvature import hessian_operator
from bolza.ops.errors import ConvergenceWarning
from bolza.ops.krylov import top_eigenpairs
from bolza.ops.operators import LinearOperator
from bolza.stability.limits import COHEN, optimizer_limit

__all__ = [
    "LOWELL",
    "Sharpness",
    "SharpnessPoint",
    "subspace_share",
]

LOWELL = Reference(
    "lowell2022singularity",
    "Lowell, Mark",
    "There is a Singularity in the Loss Landscape",
    2022,
    arxiv="2201.06964",
)

_FRESH = 0.1  # length of the random part of the first direction, beside unit eigenvectors


@cites(LOWELL)
def subspace_share(gradient: Tensor, vectors: Tensor) -> float:
    r"""Share of a gradient that lies in a subspace, ‖Vᵀg‖² / ‖g‖².

    Args:
        gradient: g, flat ``(n,)``.
        vectors: V, orthonormal columns ``(n, k)``, such as eigenvectors of the Hessian.

    Returns:
        A number from 0 to 1; nan where g = 0. A random g has the share k/n.

    Raises:
        ShapeError: the shapes do not fit.

    Reference: Lowell (2022).

    Example:
        >>> subspace_share(torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [0.0]]))           # 9 of 25
        0.36
    """
    if gradient.ndim != 1 or vectors.ndim != 2 or vectors.shape[0] != gradient.shape[0]:
        raise ShapeError(
            f"gradient has shape {tuple(gradient.shape)} and vectors {tuple(vectors.shape)}: give (n,) and (n, k)"
        )
    g, v = gradient.detach().double(), vectors.detach().double()
    whole = float(g.square().sum())
    return float((v.T @ g).square().sum()) / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class SharpnessPoint:
    """The landscape at one moment of a run.

    Attributes:
        step: number of the step.
        loss: f(θ).
        gradient_norm: ‖∇f‖.
        eigenvalues: the k largest of the (preconditioned) Hessian, the largest first.
        errors: estimated error of each.
        residuals: ‖H u − λ u‖ of each; some eigenvalue lies this close, always.
        share: share of the gradient in their span.
        limit: curvature at which the optimizer becomes unstable; nan if no optimizer was given.
        products: Hessian products that this took.
        converged: whether every error is within the tolerance.
    """

    step: int
    loss: float
    gradient_norm: float
    eigenvalues: tuple[float, ...]
    errors: tuple[float, ...]
    residuals: tuple[float, ...]
    share: float
    limit: float
    products: int
    converged: bool

    @property
    def sharpness(self) -> float:
        """λ₁, the largest eigenvalue."""
        return self.eigenvalues[0]

    @property
    def edge(self) -> float:
        """λ₁ over the limit: below 1 stable, at 1 the edge of stability, above 1 the steepest direction grows."""
        return self.sharpness / self.limit

    def __str__(self) -> str:
        told = f"sharpness {self.sharpness:.4g} ± {self.errors[0]:.1g}"
        return told if math.isnan(self.limit) else f"{told}, {self.edge:.2f} of the stability limit"


@cites(COHEN, LOWELL)
class Sharpness:
    r"""Sharpness along a run by warm-started Lanczos iteration: the edge of stability, and the share of the gradient.

    Each call of :meth:`measure` starts from the eigenvectors of the last one, which saves most of the products while θ
    moves slowly. The network, its mode, its gradients and its random numbers are left as they are.

    Args:
        model: the network.
        loss: ``loss(prediction, y)`` to a scalar.
        data: one pair ``(x, y)``, or an iterable of batches: what the curvature is that of. A fixed part of the
            training set will do: a hundred samples a class give the sharpness to some per cent.
        k: number of eigenpairs.
        tol: relative accuracy of the eigenvalues.
        max_products: Hessian products that one measurement may take.
        params: names of parameters or modules to keep; all that are trained by default.
        seed: of the first direction, and of random layers.

    Attributes:
        history: every :class:`SharpnessPoint` so far.
        vectors: the last eigenvectors ``(n, k)``, in the order of ``model.parameters()``; None before.
        params: the parameters that they belong to.

    Raises:
        ArgumentError: k larger than the number of parameters, or malformed data.
        UnsupportedError: an operation of the network has no second derivative; it is named.

    Reference: Cohen et al. (2021), Lowell (2022). Departures: block Lanczos from the last eigenvectors; errors and
    residuals with every eigenvalue.

    Example:
        >>> net, x, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> sharp = Sharpness(net, nn.functional.mse_loss, (x, y))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> point = sharp.measure(optimizer)
        >>> round(point.sharpness, 4), round(point.edge, 4)          # f = |θ|² / 2, limit 2/η
        (1.0, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        k: int = 1,
        *,
        tol: float = 1e-2,
        max_products: int = 100,
        params: Iterable[str] | None = None,
        seed: int = 0,
    ) -> None:
        self._names = None if params is None else list(params)
        self._named = select_parameters(model, self._names)
        self.params: list[Tensor] = list(self._named.values())
        self._data = data if isinstance(data, tuple) or not hasattr(data, "__next__") else list(data)
        self._hessian = hessian_operator(model, loss, self._data, self._names, seed=seed)
        if not 1 <= k <= self._hessian.size or tol <= 0 or max_products < 1:
            raise ArgumentError(
                f"k is {k}, tol {tol} and max_products {max_products}: k must be between 1 and the "
                f"{self._hessian.size} parameters, the others positive"
            )
        self.model, self.loss = model, loss
        self.k, self.tol, self.max_products, self.seed = k, tol, max_products, seed
        self.vectors: Tensor | None = None
        self._kept: Tensor | None = None
        self.history: list[SharpnessPoint] = []

    def __getstate__(self) -> dict[str, Any]:
        """All but the operator, which would bind a copy to the network of the original."""
        return {name: value for name, value in vars(self).items() if name != "_hessian"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the operator anew, of the network that was copied along."""
        vars(self).update(state)
        self._hessian = hessian_operator(self.model, self.loss, self._data, self._names, seed=self.seed)

    def measure(
        self, optimizer: torch.optim.Optimizer | None = None, step: int | None = None
    ) -> SharpnessPoint:
        """Measure at the present parameters, and add the point to ``history``.

        Args:
            optimizer: gives the limit. SGD with any options; RMSprop, Adam and AdamW, whose curvature is then that
                of P^(−1/2) H P^(−1/2) with their present P. Groups may have rates of their own: P is then 1 in the
                one with the largest. Without an optimizer the limit is nan, and P = I.
            step: number of the step; one more than the last by default.

        Returns:
            The point; ``converged`` is False if ``max_products`` were not enough.

        Raises:
            UnsupportedError: the limit of this optimizer is not known, or its groups have none in common.
            ArgumentError: it holds none of the parameters, or has not made a step yet; a parameter was frozen since.
        """
        if frozen := [name for name, p in self._named.items() if not p.requires_grad]:
            raise ArgumentError(
                f"parameter {frozen[0]!r} was frozen after this was made: make it anew, for those still trained"
            )
        op, limit, scale = self._hessian, math.nan, None
        if optimizer is not None:
            of = optimizer_limit(optimizer, self.params)
            limit = of.bound
            if of.plain and bool((of.decay == of.decay[0]).all()):
                limit -= float(of.decay[0])
            else:
                scale = of.scale().to(op.dtype)
                op = _scaled(op, scale, of.decay.to(op.dtype))
        # one more pair than asked for: the direction that is about to overtake the steepest one has to be in view
        count = min(self.k + 1, op.size)
        generator = torch.Generator().manual_seed(self.seed + len(self.history))
        start = None
        if self._kept is not None:  # the last directions, and a little of every other one
            fresh = torch.randn(op.size, generator=generator, dtype=torch.float64).to(self._kept)
            start = self._kept.sum(1) + _FRESH * fresh / fresh.norm()
        with warnings.catch_warnings():  # told by `converged`
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = top_eigenpairs(
                op,
                count,
                tol=self.tol,
                max_products=self.max_products,
                which="largest algebraic",
                start=start,
                generator=generator,
            )
        kept = slice(0, self.k)
        values, errors = found.eigenvalues[kept], found.errors[kept]
        enough = values.numel() == self.k and bool((errors <= self.tol * values.abs()).all())
        self._kept = found.eigenvectors
        self.vectors = found.eigenvectors[:, kept] if values.numel() == self.k else None
        value, slope = flat_gradient(self.model, self.loss, self._data, self._names, seed=self.seed)
        point = SharpnessPoint(
            step=(self.history[-1].step + 1 if self.history else 0) if step is None else step,
            loss=value,
            gradient_norm=float(slope.double().norm()),
            eigenvalues=tuple(values.tolist()),
            errors=tuple(errors.tolist()),
            residuals=tuple(found.residuals[kept].tolist()),
            share=subspace_share(slope if scale is None else slope * scale, found.eigenvectors[:, kept]),
            limit=limit,
            products=found.products,
            converged=found.converged or enough,
        )
        self.history.append(point)
        return point

    def subspace(self) -> Tensor:
        """Measure, and return the k steepest directions, orthonormal columns ``(n, k)``.

        Raises:
            ArgumentError: fewer than k were found in ``max_products``.
        """
        self.measure()
        if self.vectors is None:
            raise ArgumentError(
                f"max_products is {self.max_products}, too few for k = {self.k} directions: raise it to 2 k or more"
            )
        return self.vectors

    @property
    def edge_step(self) -> int | None:
        """First step at which the sharpness, less its error, was at the limit or above; None if there was none."""
        for point in self.history:
            if point.sharpness - point.errors[0] >= point.limit:
                return point.step
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a later measurement depends on: the eigenvectors and the history."""
        return {"vectors": self._kept, "history": [asdict(point) for point in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ShapeError: the eigenvectors are those of another network.
        """
        vectors = state["vectors"]
        if vectors is not None and (vectors.ndim != 2 or vectors.shape[0] != self._hessian.size):
            raise ShapeError(
                f"vectors have the shape {tuple(vectors.shape)}, not {(self._hessian.size, self.k + 1)}: this state "
                "belongs to another network"
            )
        self._kept = None if vectors is None else vectors.to(self._hessian.device, self._hessian.dtype)
        enough = self._kept is not None and self._kept.shape[1] >= self.k
        self.vectors = self._kept[:, : self.k] if enough and self._kept is not None else None
        rows: list[dict[str, Any]] = [dict(point) for point in state["history"]]
        for row in rows:
            row.update({name: tuple(row[name]) for name in ("eigenvalues", "errors", "residuals")})
        self.history = [SharpnessPoint(**row) for row in rows]


def _scaled(op: LinearOperator, scale: Tensor, decay: Tensor) -> LinearOperator:
    """P^(−1/2) (A + W) P^(−1/2), ``scale`` the diagonal of P^(−1/2) and ``decay`` that of W."""

    def product(v: Tensor) -> Tensor:
        u = scale * v
        return scale * (op @ u + decay * u)

    return LinearOperator(product, op.size, op.dtype, op.device)
