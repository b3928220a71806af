"""Activations from functions of the user: integrated where that is right, sampled where it is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.meanfield.activations import Activation
from bolza.meanfield.probing import autograd, check_elementwise, probe
from bolza.meanfield.sampled import SampledForm, differentiate, frozen_noise, sobol_normals

__all__ = ["read_callable", "sampled_activation"]

Elementwise = Callable[[Tensor], Tensor]


def read_callable(f: Elementwise, name: str) -> Activation:
    """An activation from a function: by quadrature if that is right, else by sampling."""
    if check_elementwise(f, name):
        return sampled_activation(f, name=name)

    def phi(h: Tensor) -> Tensor:
        with torch.no_grad():
            return f(h.clone()).double()

    seen = probe(phi, autograd(f))
    if seen.rough:
        return sampled_activation(f, name=name)
    return Activation(
        name, phi, autograd(f), seen.kinks, width=seen.width, true_derivative=seen.true_derivative
    )


def sampled_activation(
    f: Elementwise, samples: int = 1 << 16, *, seed: int = 0, name: str | None = None
) -> Activation:
    """An activation whose moments are means over sampled points, with error bars.

    `resolve_activation` comes here by itself for a function that draws random numbers or is too rough for
    quadrature; call it to have another number of points. Noise counts as independent between units and
    between inputs. The user's random state is left as it was.

    Args:
        f: elementwise function of a tensor; may draw from torch's default generator.
        samples: points of the means; sixteenths of them, drawn apart, give the error.
        seed: of the points and of the noise.
        name: what reports call it.

    Returns:
        An `Activation` for any function of this room; `fixed_point` then gives ``error``.

    Raises:
        ArgumentError: ``f`` is not elementwise, or ``samples`` is below 256.
        UserCodeError: ``f`` raised.

    Example:
        >>> act = sampled_activation(lambda h: torch.tanh(h) + 0.1 * torch.randn_like(h), 4096)
        >>> round(float(act.second(torch.tensor(1.0))), 2), act.noisy   # E tanh² = 0.394, and 0.1² of noise
        (0.4, True)
    """
    if samples < 256:
        raise ArgumentError(f"samples is {samples}; error bars need at least 256.")
    label = name or str(getattr(f, "__name__", type(f).__name__))
    noisy = check_elementwise(f, label)

    def phi(h: Tensor) -> Tensor:
        return f(h.clone()).double()

    points = sobol_normals(4096, seed)
    with frozen_noise(seed):
        gap = points[:, 0] * phi(points[:, 0].clone()).detach()
    with frozen_noise(seed):
        gap = gap - differentiate(phi, points[:, 0])  # Stein: E z φ(z) = E φ'(z), if autograd sees all of φ'
    smooth = bool(gap.mean().abs() < 6 * gap.std() / 64)

    def form(count: int, at: int) -> SampledForm:
        return SampledForm(phi, sobol_normals(count, at), at, noisy, smooth)

    def make(closed: SampledForm, replicas: tuple[Activation, ...] = ()) -> Activation:
        return Activation(label, phi, autograd(phi), (), closed, noisy=noisy, replicas=replicas)

    return make(form(samples, seed), tuple(make(form(samples // 16, seed + 1 + r)) for r in range(16)))
