r"""Tilted exponential layers: filters that compete, in training and in use.

    a_k = ⟨w_k, x⟩ / ‖w_k‖,      p_k = exp(t a_k) / Σ_j exp(t a_j),      reward = (1/t′) log( (1/K) Σ_k exp(t′ a_k) )

With white Gaussian noise on one of K templates of equal length, p is the posterior of which template is there; the
reward, which a training loop maximises beside its loss, draws the filters towards the templates. Such a layer stands
for convolution, normalisation and nonlinearity together, most usefully as the first of a network.

Reference: Puranik, Beirami, Qin & Madhow (2024), *Improving Robustness via Tilted Exponential Layer: A
Communication-Theoretic Perspective*, arXiv:2311.01047.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import apply
from bolza.robust.tilted import tilted_mean

__all__ = [
    "PURANIK",
    "TiltedConv1d",
    "TiltedConv2d",
    "TiltedLinear",
    "competition",
    "with_tilted_reward",
]

PURANIK = Reference(
    "puranik2024texp",
    "Puranik, Bhagyashree and Beirami, Ahmad and Qin, Yao and Madhow, Upamanyu",
    "Improving Robustness via Tilted Exponential Layer: A Communication-Theoretic Perspective",
    2024,
    venue="International Conference on Artificial Intelligence and Statistics",
    arxiv="2311.01047",
)


@cites(PURANIK)
def competition(a: Tensor, t: float, threshold: float | None = 0.5, dim: int = 1) -> Tensor:
    r"""What is left of activations that compete along an axis: tilted softmax, then a threshold.

        p = softmax(t a),      y_k = p_k if p_k > mean(p_k) + c std(p_k), else 0

    mean and std are over the positions of one sample and one filter, the axes beyond ``dim`` or, with ``dim=-1``,
    those between the first and the last. Without at least two positions there is no threshold.

    Args:
        a: activations, samples first, filters along ``dim``.
        t: the tilt, in one over the unit of a. 0 gives 1/K, and a large one a single winner.
        threshold: c in standard deviations; None for no threshold.
        dim: axis of the filters, 1 (images) or −1 (features last).

    Returns:
        Tensor of the shape of ``a``, from 0 to 1.

    Raises:
        ArgumentError: ``dim`` is another one, or ``a`` has fewer than two axes.

    Reference: Puranik et al. (2024), §3. Departure: a softmax that does not overflow.

    Example:
        >>> competition(torch.tensor([[0.0, 0.0, 3.0]]), t=1.0)
        tensor([[0.0453, 0.0453, 0.9094]])
    """
    if dim not in (1, -1) or a.ndim < 2:
        raise ArgumentError(f"dim={dim} and {a.ndim} axes: filters are along axis 1 or −1 of samples")
    p = torch.softmax(t * a, dim)
    places = list(range(2, a.ndim)) if dim == 1 else list(range(1, a.ndim - 1))
    if threshold is None or not places or math.prod(a.shape[i] for i in places) < 2:
        return p
    with torch.no_grad():
        std, mean = torch.std_mean(p, places, keepdim=True)
        kept = p > mean + threshold * std
    return p * kept


class _Tilted(nn.Module):
    """What the layers share: filters of length 1, competition, and the reward."""

    weight: Tensor
    axis = 1

    def _settle(
        self, tilt: float | None, reward_tilt: float | None, threshold: float | None, balanced: bool
    ) -> None:
        fan_in = self.weight[0].numel()
        self.tilt = 1 / math.sqrt(fan_in) if tilt is None else float(tilt)
        self.reward_tilt = 10 / math.sqrt(fan_in) if reward_tilt is None else float(reward_tilt)
        self.threshold, self.balanced = threshold, balanced
        for name, value in (("tilt", self.tilt), ("reward_tilt", self.reward_tilt)):
            if not (value >= 0 and math.isfinite(value)):
                raise ArgumentError(f"{name}={value} must be finite and not negative")
        if threshold is not None and not math.isfinite(threshold):
            raise ArgumentError(f"threshold={threshold} must be a number, or None for no threshold")

    def _respond(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def matches(self, x: Tensor) -> Tensor:
        """How well each filter matches, a_k = ⟨w_k, x⟩ / ‖w_k‖; less their mean over the filters if balanced."""
        a = self._respond(x)
        norms = self.weight.flatten(1).norm(dim=1) + 1e-6
        shape = [1] * a.ndim
        shape[self.axis] = -1
        a = a / norms.reshape(shape)
        return a - a.mean(self.axis, keepdim=True) if self.balanced else a

    def forward(self, x: Tensor) -> Tensor:
        """Posterior of the filters at each place, below the threshold set to 0."""
        return competition(self.matches(x), self.tilt, self.threshold, self.axis)

    def reward(self, x: Tensor) -> Tensor:
        """The tilted mean of the matches over the filters, averaged over places and samples; to be maximised."""
        return tilted_mean(self.matches(x), self.reward_tilt, self.axis).mean()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        own = f"tilt={self.tilt:.4g}, reward_tilt={self.reward_tilt:.4g}, threshold={self.threshold}"
        return f"{super().extra_repr()}, {own}"


@cites(PURANIK)
class TiltedLinear(_Tilted, nn.Linear):
    r"""Linear layer whose units compete: softmax of the matches with its rows.

        y = softmax(t Wx),   rows of W scaled to length 1

    Features are along the last axis; axes in between (tokens) are the places of the threshold.

    Args:
        in_features: size of x.
        out_features: number K of units.
        tilt: t; 1/√in_features by default. Near A/σ² for templates of amplitude A in noise of variance σ² the output
            is the posterior of which template is there.
        reward_tilt: t′ of the reward; ten times 1/√in_features by default.
        threshold: standard deviations above the mean over the places below which an output is 0; None for none.
        balanced: subtract the mean over the units first, which matters to the reward only.
        device: where the weights are.
        dtype: of the weights.

    Raises:
        ArgumentError: a tilt or threshold that makes no sense.

    Reference: Puranik et al. (2024), §§2 and 3.

    Example:
        >>> layer = TiltedLinear(4, 3, tilt=2.0)
        >>> layer(torch.randn(5, 4)).sum(1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], grad_fn=...)
    """

    axis = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tilt: float | None = None,
        reward_tilt: float | None = None,
        threshold: float | None = 0.5,
        balanced: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device=device, dtype=dtype)
        self._settle(tilt, reward_tilt, threshold, balanced)

    def _respond(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@cites(PURANIK)
class TiltedConv1d(_Tilted, nn.Conv1d):
    """One-dimensional convolution whose filters compete at each place; see :class:`TiltedConv2d`.

    Args:
        in_channels: channels of x, shape ``(n, channels, places)``.
        out_channels: number K of filters.
        kernel_size: of a filter.
        tilt: t of the softmax.
        reward_tilt: t′ of the reward.
        threshold: standard deviations above the mean over the places below which an output is 0; None for none.
        balanced: subtract the mean over the filters first.
        options: of ``nn.Conv1d``, without bias.

    Raises:
        ArgumentError: a tilt or threshold that makes no sense, or a bias.

    Reference: Puranik et al. (2024), §3.

    Example:
        >>> TiltedConv1d(2, 6, 5, padding=2)(torch.randn(3, 2, 20)).shape
        torch.Size([3, 6, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        tilt: float | None = None,
        reward_tilt: float | None = None,
        threshold: float | None = 0.5,
        balanced: bool = False,
        **options: Any,
    ) -> None:
        _no_bias(options)
        nn.Conv1d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self._settle(tilt, reward_tilt, threshold, balanced)

    def _respond(self, x: Tensor) -> Tensor:
        return nn.Conv1d.forward(self, x)


@cites(PURANIK)
class TiltedConv2d(_Tilted, nn.Conv2d):
    r"""Convolution whose filters compete at each place, in place of convolution, normalisation and ReLU.

        y = p · 1[p > mean(p) + c std(p)],      p = softmax_k(t ⟨w_k, x⟩/‖w_k‖)

    The outputs do not depend on the lengths of the filters, nor one sample on its batch. They lie between 0 and 1
    and are small for many filters: let a convolution with normalisation follow.

    Args:
        in_channels: channels of x, shape ``(n, channels, height, width)``.
        out_channels: number K of filters.
        kernel_size: of a filter.
        tilt: t of the softmax; 1/√(entries of a filter) by default. Larger ones keep more detail, and more noise.
        reward_tilt: t′ of the reward; ten times 1/√(entries of a filter) by default.
        threshold: standard deviations c above the mean over the places of a sample and filter below which an output
            is 0; None for none.
        balanced: subtract the mean over the filters first, which matters to the reward only.
        options: of ``nn.Conv2d`` (stride, padding, padding_mode, …), without bias.

    Raises:
        ArgumentError: a tilt or threshold that makes no sense, or a bias.

    Reference: Puranik et al. (2024), §3. Departures: the reward is a mean over the samples, in place of their sum, so
    its weight does not depend on the batch; competition among the filters of a place only.

    Example:
        >>> layer = TiltedConv2d(1, 8, 3, padding=1, tilt=1.0)
        >>> net = nn.Sequential(layer, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> net(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        tilt: float | None = None,
        reward_tilt: float | None = None,
        threshold: float | None = 0.5,
        balanced: bool = False,
        **options: Any,
    ) -> None:
        _no_bias(options)
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self._settle(tilt, reward_tilt, threshold, balanced)

    def _respond(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, x)


@cites(PURANIK)
def with_tilted_reward(model: nn.Module, x: Any) -> tuple[Any, Tensor]:
    """Output of a network and the sum of the rewards of its tilted layers.

    The reward of a layer reaches the weights of that layer only. Train on ``loss(output, y) − alpha · reward``.

    Args:
        model: a network with tilted layers.
        x: its input: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        What the network makes of x, and the sum of the rewards, a scalar.

    Raises:
        UnsupportedError: no tilted layer ran.

    Reference: Puranik et al. (2024), equation 3.

    Example:
        >>> net = nn.Sequential(TiltedLinear(4, 6), nn.Linear(6, 3))
        >>> output, reward = with_tilted_reward(net, torch.randn(8, 4))
        >>> loss = nn.functional.cross_entropy(output, torch.arange(8) % 3) - 0.1 * reward
        >>> loss.backward()
    """
    rewards: list[Tensor] = []

    def collect(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, _Tilted)
        rewards.append(layer.reward(args[0].detach()))

    handles = [
        layer.register_forward_pre_hook(collect) for layer in model.modules() if isinstance(layer, _Tilted)
    ]
    try:
        output = apply(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if not rewards:
        raise UnsupportedError(
            "no tilted layer ran: the model needs a TiltedConv2d, TiltedConv1d or TiltedLinear for a reward"
        )
    return output, torch.stack(rewards).sum()


def _no_bias(options: dict[str, Any]) -> None:
    if options.setdefault("bias", False):
        raise ArgumentError("bias=True: the filters of a tilted layer have none, so leave it out")
