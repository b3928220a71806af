r"""The weight of the KL divergence of a variational autoencoder, steered to a set-point of the KL.

    loss = reconstruction + β KL,    e = KL − C

    β = clip(β_min + K_p σ(e) + Σ K_i e)                                       ControlVAE
    β ← clip(β + K_p Δσ(e) + K_i e),  e from a mean of the last five KLs       DynamicVAE

σ is the logistic function. Where the KL is: a linear autoencoder with the loss ½‖x − x̂‖² + β KL on Gaussian data of
covariance eigenvalues l_i, with learned variances of the code, has at its optimum

    KL(β) = Σ_i max(0, ½ ln(l_i/β)),

the rate of reverse water-filling at the water level β. So the weight at which the controller rests is known, and near
it an integrator alone forgets in 2β*/(k K_i) steps, k latent variables being active, if the network follows at once.

Reference: Shao et al. (2020), arXiv:2004.05988; Shao et al. (2022), CVPR. Cover & Thomas (2006), *Elements of
Information Theory*, §10.3.3, for the water-filling.

Departures: both have working protection against windup (the published tests of ControlVAE never hold, that of
DynamicVAE latches); the first step of DynamicVAE has no change of σ(e) yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.set_point import SetPoint, Target
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.ops.pid import PID

__all__ = ["ControlVAE", "DynamicVAE", "resting_beta", "water_filling_kl"]

CONTROLVAE = Reference(
    "shao2020controlvae",
    "Shao, Huajie and Yao, Shuochao and Sun, Dachun and Zhang, Aston and Liu, Shengzhong and Liu, Dongxin and "
    "Wang, Jun and Abdelzaher, Tarek",
    "ControlVAE: Controllable Variational Autoencoder",
    2020,
    venue="International Conference on Machine Learning (ICML)",
    arxiv="2004.05988",
)
DYNAMICVAE = Reference(
    "shao2022dynamicvae",
    "Shao, Huajie and Yang, Yifei and Lin, Haohong and Lin, Longzhong and Chen, Yizhuo and Yang, Qinmin and Zhao, Han",
    "Rethinking Controllable Variational Autoencoders",
    2022,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)


def water_filling_kl(eigenvalues: Tensor, beta: float | Tensor) -> Tensor:
    r"""KL of the best linear autoencoder at a weight β, Σ_i max(0, ½ ln(l_i/β)).

    Args:
        eigenvalues: l_i > 0 of the covariance of the data, shape ``(dim,)``; the code has at least as many entries
            as there are l_i above β.
        beta: β > 0, a number or a tensor of any shape.

    Returns:
        KL in nats, of the shape of β.

    Raises:
        ArgumentError: an eigenvalue or β is not positive.

    Reference: reverse water-filling, Cover & Thomas (2006), §10.3.3.

    Example:
        >>> round(float(water_filling_kl(torch.tensor([4.0, 1.0, 0.25]), 0.5)), 5)
        1.38629
    """
    l = _positive("eigenvalues", torch.as_tensor(eigenvalues))  # noqa: E741 (the letter of the theory)
    level = _positive("beta", torch.as_tensor(beta, dtype=l.dtype, device=l.device))
    return (0.5 * (l / level[..., None]).log()).clamp_min(0).sum(-1)


def resting_beta(eigenvalues: Tensor, kl: float) -> float:
    r"""Weight β at which the best linear autoencoder has a given KL.

    With the k largest eigenvalues above the level, ln β = (Σ_{i≤k} ln l_i − 2 KL)/k.

    Args:
        eigenvalues: l_i > 0 of the covariance of the data, shape ``(dim,)``.
        kl: the set-point in nats, positive.

    Returns:
        β, where a controller of the KL comes to rest.

    Raises:
        ArgumentError: an eigenvalue or the set-point is not positive.

    Reference: the inverse of :func:`water_filling_kl`.

    Example:
        >>> round(resting_beta(torch.tensor([2.0, 2.0]), 1.0), 5)  # 2/e
        0.73576
    """
    if not kl > 0 or not math.isfinite(kl):
        raise ArgumentError(f"kl={kl!r} must be positive and finite: at 0 every β ≥ max l_i is one of rest")
    l = _positive("eigenvalues", torch.as_tensor(eigenvalues)).double()  # noqa: E741
    logs = l.log().sort(descending=True).values
    count = torch.arange(1, len(logs) + 1, dtype=torch.float64, device=logs.device)
    levels = (logs.cumsum(0) - 2 * kl) / count
    active = int((levels < logs).sum())  # an eigenvalue below its own level is not active
    return math.exp(float(levels[active - 1]))


def _positive(name: str, values: Tensor) -> Tensor:
    values = values if values.is_floating_point() else values.double()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ArgumentError(f"{name} must be positive and finite; the least is {float(values.min()):g}")
    return values


@cites(CONTROLVAE)
class ControlVAE(SetPoint):
    r"""Weight β of the KL term that keeps the KL of an autoencoder at a set-point, positional law.

    ``beta = controller.step(kl)``, then ``(reconstruction + beta * kl).backward()``.

    Args:
        target: C, in nats: KL summed over the code and averaged over the batch. A function of the step for a ramp.
        kp: K_p of the logistic function of the error.
        ki: K_i per nat and step.
        low: β_min; for disentangling the paper takes 1, for images and text 0.
        high: greatest β; for images and text the paper takes 1, which a small set-point may not be reached with.
        initial: β before the first step, ``low`` by default.
        relative: the error is divided by C; the gains are then per set-point.
        anti_windup: see :class:`bolza.controllers.PID`.

    Raises:
        ArgumentError: a setting is out of its range.

    Reference: Shao et al. (2020), arXiv:2004.05988, §4. Departures: error and gain of the integral with the opposite
    signs, protection against windup that works, and no overflow of the exponential.

    Example:
        >>> controller = ControlVAE(target=10.0)
        >>> beta = [controller.step(25.0) for _ in range(100)][-1]  # a KL that is too large
        >>> round(beta, 3)
        1.51
    """

    def __init__(
        self,
        target: Target,
        *,
        kp: float = 0.01,
        ki: float = 0.001,
        low: float = 0.0,
        high: float = math.inf,
        initial: float | None = None,
        relative: bool = False,
        anti_windup: Any = "both",
    ) -> None:
        pid = PID(kp=kp, ki=ki, low=low, high=high, bias=low, squash=True, anti_windup=anti_windup)
        super().__init__(target, pid, relative=relative, initial=initial)


@cites(DYNAMICVAE)
class DynamicVAE(SetPoint):
    r"""Weight β of the KL term that falls slowly to where the KL has its set-point, incremental law.

    A large first β keeps the code closed; it opens one variable after the other while β falls, and β may end below 1.

    Args:
        target: C, in nats; usually a ramp, see :func:`bolza.controllers.ramp`.
        kp: K_p of the change of the logistic function of the error.
        ki: K_i per nat and step.
        low: least β.
        high: greatest β.
        initial: first β; the paper takes 50 or 100.
        average: KLs in the mean that is controlled.
        relative: the error is divided by C.
        latching: the published behaviour at ``low``: β as remembered may fall below it, and from then on nothing is
            integrated, in neither direction, so that a set-point lowered later is never reached. To be shown, not used.

    Raises:
        ArgumentError: a setting is out of its range.

    Reference: Shao et al. (2022), CVPR, §4. Departure: the remembered β does not leave the limits (unless latching).

    Example:
        >>> controller = DynamicVAE(target=5.0, initial=1.0)
        >>> betas = [controller.step(kl) for kl in (8.0, 8.0, 2.0, 2.0)]
        >>> [round(beta, 3) for beta in betas]
        [1.015, 1.03, 1.033, 1.03]
    """

    def __init__(
        self,
        target: Target,
        *,
        kp: float = 0.01,
        ki: float = 0.005,
        low: float = 0.1,
        high: float = math.inf,
        initial: float = 50.0,
        average: int = 5,
        relative: bool = False,
        latching: bool = False,
    ) -> None:
        pid = PID(
            kp=kp,
            ki=ki,
            low=low,
            high=high,
            form="incremental",
            squash=True,
            anti_windup="latching" if latching else "both",
        )
        super().__init__(target, pid, relative=relative, average=average, initial=initial)
