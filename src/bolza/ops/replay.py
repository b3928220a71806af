"""Evaluating a network again without leaving a trace in it.

Replays must not touch running statistics, must see the same random numbers, and must run on
kernels that have the derivatives that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable_kernels", "frozen_statistics", "same_randomness"]

_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Evaluate ``module`` without changing any of its buffers.

    Normalisation layers in training mode normalise by the statistics of the batch, as they would
    anyway, but do not see their running averages, so nothing is written in place and ``torch.func``
    transforms work. Buffers that other layers write to are restored on exit.

    Args:
        module: a network; its mode is left as it is.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with frozen_statistics(layer):
        ...     _ = layer(torch.randn(4, 2))
        >>> int(layer.num_batches_tracked)
        0
    """
    held = [(layer, dict(layer._buffers)) for layer in module.modules() if layer._buffers]
    hidden: list[nn.Module] = []
    for layer, buffers in held:
        if isinstance(layer, _NORMS_WITH_STATISTICS) and layer.training and layer.track_running_stats:
            hidden.append(layer)
            layer.track_running_stats = False
            layer._buffers.update(dict.fromkeys(buffers))
    kept = [(buffer, buffer._version, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for layer in hidden:
            layer.track_running_stats = True  # type: ignore[assignment]
        for layer, buffers in held:
            layer._buffers.update(buffers)  # also those that were assigned anew
        with torch.no_grad():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def differentiable_kernels(module: nn.Module | None = None) -> Iterator[None]:
    """Use kernels that can be differentiated twice and in forward mode.

    The fused attention kernels and oneDNN's LSTM cannot; inside this context the plain ones run
    instead. They are slower, and agree with the fused ones to rounding.

    Args:
        module: what will be evaluated. oneDNN stays on when it has no ``nn.LSTM``, because without
            it a convolution takes twice the time; by default it goes off.

    Example:
        >>> from torch.nn.functional import scaled_dot_product_attention as attend
        >>> q = torch.randn(1, 3, 4)
        >>> with differentiable_kernels():
        ...     _, tangent = torch.func.jvp(lambda a: attend(a, a, a), (q,), (q,))
        >>> tangent.shape
        torch.Size([1, 3, 4])
    """
    # torch.backends.mkldnn.flags would also set a TF32 flag, and warn about it
    enabled = torch._C._get_mkldnn_enabled()
    off = module is None or any(isinstance(layer, nn.LSTM) for layer in module.modules())
    try:
        if off:
            torch._C._set_mkldnn_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if off:
            torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def same_randomness(state: Tensor | int, device: torch.device | None = None) -> Iterator[None]:
    """Draw the random numbers that a stored generator state, or a seed, gives; then go back.

    Args:
        state: a state from ``torch.get_rng_state()`` (or the CUDA one, for a CUDA device), or a seed.
        device: where the network draws its random numbers; the CPU by default.

    Example:
        >>> with same_randomness(0):
        ...     a = torch.rand(1)
        >>> with same_randomness(0):
        ...     b = torch.rand(1)
        >>> bool(a == b)
        True
    """
    on_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        if isinstance(state, int):
            torch.default_generator.manual_seed(state)  # torch.manual_seed would seed every device
            if on_cuda and device is not None:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(state)
        elif on_cuda and device is not None:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
