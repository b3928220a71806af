r"""Training of a wide network, predicted from its kernel before training.

With the loss L = (w/2) Σ_{i,a} (f_a(x_i) − y_{ia})² and the kernel Θ of the network as it is, the network linearised
in its parameters has outputs r = f − y on the training set that obey, mode by mode of Θ = V Λ Vᵀ,

    gradient flow             r(t) = V e^{−w Λ t} Vᵀ r(0)
    gradient descent          r_s  = V (1 − η w Λ)^s Vᵀ r_0
    with heavy-ball momentum  r_{s+1} = r_s − η w Λ r_s + μ (r_s − r_{s−1})

and f_t(x) = f_0(x) − Θ(x, X) V φ_t(Λ) Vᵀ r_0 with φ_t = (1 − ρ_t)/λ elsewhere, ρ_t the factor of a mode. Descent is
stable below the learning rate 2/(w λ_max), and 2(1 + μ)/(w λ_max) with momentum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.output_gradients import OutputGradients

__all__ = ["Linearized", "linearized", "two_layer_gram"]

Reduction = Literal["mean", "sum", "half"]
_ROWS = 8192  # a dense eigendecomposition beyond this takes minutes and gigabytes

REFERENCE = Reference(
    "lee2019wide",
    "Lee, Jaehoon and Xiao, Lechao and Schoenholz, Samuel S. and Bahri, Yasaman and Novak, Roman and "
    "Sohl-Dickstein, Jascha and Pennington, Jeffrey",
    "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent",
    2019,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1902.06720",
)
DU = Reference(
    "du2019gradient",
    "Du, Simon S. and Zhai, Xiyu and Póczos, Barnabás and Singh, Aarti",
    "Gradient Descent Provably Optimizes Over-parameterized Neural Networks",
    2019,
    venue="International Conference on Learning Representations",
    arxiv="1810.02054",
)


class Linearized:
    """Training of a network linearised at its initial parameters; made by :func:`linearized`.

    Attributes:
        eigenvalues: of Θ on the training set, largest first, float64.
        rate: w in L = (w/2) Σ (f − y)².
        initial: outputs on the training set before training, (n, …).
        targets: y, of the same shape.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([[1.0], [0.0]])
        >>> net = nn.Linear(2, 1, bias=False)
        >>> theory = linearized(net, x, y, reduction="half")          # Θ = 1: every mode decays as e^{−t}
        >>> error = theory.flow(1.0) - y
        >>> bool(torch.allclose(error, (net(x) - y) / math.e))
        True
        >>> theory.max_learning_rate()
        2.0
    """

    def __init__(
        self,
        gradients: OutputGradients,
        x: Any,
        initial: Tensor,
        targets: Tensor,
        kernel: Tensor,
        rate: float,
    ) -> None:
        """Decompose the kernel."""
        self._gradients, self._x = gradients, x
        self.initial, self.targets, self.rate = initial, targets, rate
        self._full = kernel.ndim == 4
        n = len(initial)
        residual = (initial - targets).reshape(n, -1).double()
        if self._full:
            size = kernel.shape[0] * kernel.shape[2]
            kernel = kernel.transpose(1, 2).reshape(size, size)
            residual = residual.reshape(-1, 1)
        kernel = kernel.double()
        values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
        self.eigenvalues, self._vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        self._modes = self._vectors.T @ residual  # (modes, columns)

    def max_learning_rate(self, momentum: float = 0.0) -> float:
        """The learning rate 2(1 + μ)/(w λ_max) above which descent diverges.

        Args:
            momentum: heavy-ball μ, from 0 to below 1.
        """
        _check_momentum(momentum)
        top = float(self.eigenvalues[0])
        return 2 * (1 + momentum) / (self.rate * top) if top > 0 else math.inf

    def flow(self, time: float | Sequence[float] | Tensor, x: Any = None) -> Tensor:
        """Outputs after training for a time by gradient flow dθ/dt = −∇L.

        Args:
            time: one time (steps × learning rate), or several.
            x: inputs at which to predict; the training set by default.

        Returns:
            Outputs ``(m, …)``, with the times in front if there are several.

        Raises:
            ArgumentError: a time is negative or nan.
        """
        t = torch.as_tensor(time, dtype=torch.float64, device=self.eigenvalues.device)
        if not bool((t >= 0).all()):
            raise ArgumentError(f"time is {time}: it must be at least 0")
        speed = self.rate * self.eigenvalues
        exponent = t.reshape(-1, 1) * speed
        exponent = torch.where(speed == 0, torch.zeros_like(exponent), exponent)  # also at infinite time
        gain = torch.where(
            speed > 0, -torch.expm1(-exponent) / self.eigenvalues, self.rate * t.reshape(-1, 1)
        )
        return self._predict(torch.exp(-exponent), gain, x, t.ndim)

    def descent(
        self, steps: int | Sequence[int] | Tensor, lr: float, x: Any = None, *, momentum: float = 0.0
    ) -> Tensor:
        """Outputs after steps of full-batch gradient descent, as ``torch.optim.SGD`` takes them.

        Args:
            steps: one number of steps, or several.
            lr: learning rate η; above :meth:`max_learning_rate` the outputs diverge.
            x: inputs at which to predict; the training set by default.
            momentum: heavy-ball μ, without dampening.

        Returns:
            Outputs ``(m, …)``, with the steps in front if there are several.

        Raises:
            ArgumentError: steps, learning rate or momentum out of range.
        """
        s = torch.as_tensor(steps)
        if s.is_floating_point() or s.ndim > 1 or (s.numel() and int(s.min()) < 0):
            raise ArgumentError(f"steps is {steps}: give whole numbers, at least 0")
        if not 0 <= lr < math.inf:
            raise ArgumentError(f"lr is {lr}: it must be finite and at least 0")
        _check_momentum(momentum)
        # a_{s+1} = (1 + μ − ηwλ) a_s − μ a_{s−1} + ηw is the gain φ, and ρ = 1 − λ a the same without the last term
        step = torch.zeros(len(self.eigenvalues), 3, 3, dtype=torch.float64, device=self.eigenvalues.device)
        step[:, 0, 0] = 1 + momentum - lr * self.rate * self.eigenvalues
        step[:, 0, 1], step[:, 0, 2] = -momentum, lr * self.rate
        step[:, 1, 0] = step[:, 2, 2] = 1
        decays, gains = [], []
        for count in s.reshape(-1).tolist():
            power = torch.linalg.matrix_power(step, count)
            decays.append(power[:, 0, 0] + power[:, 0, 1])
            gains.append(power[:, 0, 2])
        return self._predict(torch.stack(decays), torch.stack(gains), x, s.ndim)

    def limit(self, x: Any = None, *, rtol: float = 1e-12) -> Tensor:
        """Outputs at the end of training.

        Args:
            x: inputs at which to predict; the training set by default.
            rtol: modes below this share of λ_max are taken as never learnt.
        """
        learnt = self.eigenvalues > rtol * self.eigenvalues[0]
        gain = torch.where(learnt, 1 / self.eigenvalues, 0.0)
        return self._predict(1.0 - learnt.double()[None], gain[None], x, 0)

    def loss(self, outputs: Tensor) -> Tensor:
        """Training loss of outputs on the training set, as it is reduced in training.

        Args:
            outputs: ``(n, …)``, or several of them in front of each other.
        """
        over = tuple(range(-self.targets.ndim, 0))
        return 0.5 * self.rate * (outputs - self.targets).square().sum(over)

    def _predict(self, decay: Tensor, gain: Tensor, x: Any, leading: int) -> Tensor:
        """Outputs from the factors of the modes, (times, modes)."""
        if x is None:
            base, tail = self.targets, self._vectors @ (decay[:, :, None] * self._modes)
        else:
            base = self._gradients.values(x).reshape(-1, *self.targets.shape[1:])
            cross = self._gradients.kernel(x, self._x, "full" if self._full else "mean").double()
            if self._full:
                cross = cross.transpose(1, 2).reshape(cross.shape[0] * cross.shape[2], -1)
            tail = -(cross @ self._vectors) @ (gain[:, :, None] * self._modes)
        out = base.double() + tail.reshape(len(decay), *base.shape)
        return (out if leading else out[0]).to(base.dtype)


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum is {momentum}: it must be at least 0 and below 1")


@cites(REFERENCE)
def linearized(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    reduction: Reduction = "mean",
    outputs: Literal["full", "mean"] = "full",
    params: Iterable[str] | None = None,
    scales: Mapping[str, float] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    chunk: int | None = None,
    memory: int = 2**30,
    seed: int = 0,
) -> Linearized:
    r"""Predict full-batch training on the squared error, without training.

        f_t(x) = f_0(x) − Θ(x, X) Θ⁻¹ (1 − e^{−w Θ t}) (f_0(X) − y)

    Exact for a model that is linear in its parameters, and for a network as its width grows: over a fixed time the
    gap to the trained network falls about as 1/√width or faster. Costs one kernel on the training set and its
    eigendecomposition. The model is copied: training it afterwards does not change the predictions.

    Args:
        model: the network before training, evaluated as :func:`empirical_ntk` evaluates it.
        x: training inputs, n samples.
        y: targets, of the shape of the outputs.
        reduction: of the loss: ``"mean"`` and ``"sum"`` as in ``torch.nn.functional.mse_loss``, ``"half"`` is
            ½ Σ (f − y)², as papers write it, with w = 2/(n k), 2 and 1.
        outputs: ``"full"`` takes the kernel between all n k outputs; ``"mean"`` one kernel of the samples for every
            output, which is what it becomes in a wide network, and much smaller.
        params: names of the parameters or modules that train; all that have ``requires_grad`` by default.
        scales: learning rates relative to the one given, by name of parameter or module.
        output: takes the tensor of outputs from what the model returns.
        chunk: samples in one pass.
        memory: bytes for what is kept between passes.
        seed: of the random numbers the model draws even in evaluation mode.

    Returns:
        Linearized.

    Raises:
        ArgumentError: an option makes no sense, or the kernel is too large to be decomposed.
        ShapeError: the targets do not have the shape of the outputs.

    Reference: Lee et al. (2019), section 2.2, for the squared error. Departure: the loss is reduced as PyTorch does
    by default, and descent is solved at finite learning rate as well as in the limit of flow.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Linear(2, 1).double(), torch.randn(4, 2, dtype=torch.float64)
        >>> y = x.sum(1, keepdim=True) + 1
        >>> theory = linearized(net, x, y)
        >>> bool(torch.allclose(theory.limit(), y))
        True
        >>> prediction, lr = theory.descent(5, lr=0.3), 0.3
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(net(x), y).backward()
        ...     optimizer.step()
        >>> bool(torch.allclose(net(x), prediction))                  # a linear model: exact
        True
    """
    if outputs not in ("full", "mean"):
        raise ArgumentError(f"outputs is {outputs!r}: choose 'full' or 'mean'")
    if reduction not in ("mean", "sum", "half"):
        raise ArgumentError(f"reduction is {reduction!r}: choose 'mean', 'sum' or 'half'")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
        raise ArgumentError(
            f"y is {kind}: the squared error needs targets of floating point; labels can be made into them by "
            "torch.nn.functional.one_hot(y).float()"
        )
    gradients = OutputGradients(
        copy.deepcopy(model), [x], params, output=output, scales=scales, chunk=chunk, memory=memory, seed=seed
    )
    initial = gradients.values(x)
    if y.numel() != initial.numel() or len(y) != len(initial):
        raise ShapeError(
            f"y has shape {tuple(y.shape)}, but the {len(initial)} samples have {initial.shape[1]} outputs each"
        )
    rows = initial.numel() if outputs == "full" else len(initial)
    if rows > _ROWS:
        remedy = " or outputs='mean', one kernel for all outputs," if outputs == "full" else ""
        raise ArgumentError(
            f"the kernel has {rows} rows, and at most {_ROWS} can be decomposed: take fewer samples{remedy} or fewer "
            "outputs with output="
        )
    kernel = gradients.kernel(x, None, outputs)
    targets = y.detach().to(initial)
    rate = {"mean": 2 / initial.numel(), "sum": 2.0, "half": 1.0}[reduction]
    return Linearized(gradients, x, initial.reshape(targets.shape), targets, kernel, rate)


@cites(DU)
def two_layer_gram(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    r"""Gram matrix H∞ of a wide two-layer ReLU network of which the first layer trains.

        f(x) = Σ_r a_r max(w_r·x, 0)/√m,  a_r = ±1,  w_r ~ N(0, 1)
        H∞_{ij} = E_w[x_i·x_j 1{w·x_i ≥ 0, w·x_j ≥ 0}] = x_i·x_j (π − arccos(x_i·x_j / |x_i||x_j|)) / (2π)

    Its smallest eigenvalue λ_0 is positive unless two inputs are parallel, and sets the rate: for wide enough networks
    |f_k − y|² ≤ (1 − η λ_0/2)^k |f_0 − y|² under gradient descent on ½ Σ (f − y)².

    Args:
        x1: inputs ``(n, d)``; the paper has unit vectors, here any.
        x2: inputs ``(m, d)``; x1 by default.

    Returns:
        ``(n, m)``, in the dtype of the inputs.

    Raises:
        ShapeError: the inputs are not vectors of one length.

    Reference: Du, Zhai, Póczos & Singh (2019). Departure: inputs of any length.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
        >>> torch.linalg.eigvalsh(two_layer_gram(x))
        tensor([0.3333, 0.6667])
    """
    other = x1 if x2 is None else x2
    if x1.ndim != 2 or other.ndim != 2 or x1.shape[1] != other.shape[1]:
        raise ShapeError(
            f"x1 and x2 have shapes {tuple(x1.shape)} and {tuple(other.shape)}: they need to be vectors of one "
            "length, samples first"
        )
    inner = x1 @ other.T
    size = x1.norm(dim=1)[:, None] * other.norm(dim=1)[None, :]
    cosine = torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).clamp(-1.0, 1.0)
    if x2 is None:
        cosine.fill_diagonal_(1.0)
    return inner * (math.pi - torch.arccos(cosine)) / (2 * math.pi)
