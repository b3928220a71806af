"""Evaluating a network again without leaving a trace in it.

Replays must not touch running statistics, must see the same random numbers, and must run on
kernels that have the derivatives that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["differentiable_kernels", "frozen_statistics", "same_randomness"]

_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_ROUNDS = 15  # power iterations where none are kept from call to call; as many as torch begins with


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Evaluate ``module`` without changing any of its buffers.

    Normalisation layers in training mode normalise by the statistics of the batch, as they would
    anyway, but do not see their running averages, so nothing is written in place and ``torch.func``
    transforms work. Spectral norms in training mode iterate as they would, but inside of a transform
    from their present vectors at every call, to convergence, and keep nothing. Buffers that other
    layers write to are restored on exit.

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
    replaced = [owner for layer in module.modules() for owner in _without_writing(layer)]
    try:
        yield
    finally:
        for owner, name in replaced:
            vars(owner).pop(name)
        for layer in hidden:
            layer.track_running_stats = True  # type: ignore[assignment]
        for layer, buffers in held:
            layer._buffers.update(buffers)  # also those that were assigned anew
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)


def _without_writing(layer: nn.Module) -> Iterator[tuple[object, str]]:
    """Let the spectral norms of a layer be transformed; yields what was set, and by which name."""
    if isinstance(layer, parametrizations._SpectralNorm) and "forward" not in vars(layer):
        norm = layer

        def forward(weight: Tensor) -> Tensor:
            if weight.ndim == 1 or not norm.training or not _transformed():
                return type(norm).forward(norm, weight)
            return _over_norm(weight, norm._reshape_weight_to_matrix, norm._v, norm)

        norm.forward = forward  # type: ignore[method-assign]
        yield norm, "forward"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and "compute_weight" not in vars(hook):
            yield _older(hook), "compute_weight"


def _older(hook: Any) -> Any:
    def compute_weight(module: nn.Module, do_power_iteration: bool) -> Tensor:
        if not do_power_iteration or not _transformed():
            found: Tensor = type(hook).compute_weight(hook, module, do_power_iteration)
            return found
        weight, v = (getattr(module, hook.name + end) for end in ("_orig", "_v"))
        return _over_norm(weight, hook.reshape_weight_to_matrix, v, hook)

    hook.compute_weight = compute_weight
    return hook


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _over_norm(weight: Tensor, as_matrix: Callable[[Tensor], Tensor], v: Tensor, norm: Any) -> Tensor:
    """Weight over its spectral norm uᵀWv; u and v follow W, which its second derivatives need."""
    matrix = as_matrix(weight)
    u = v = v.detach()
    for _ in range(max(_ROUNDS, norm.n_power_iterations)):
        u = F.normalize(matrix @ v, dim=0, eps=norm.eps)
        v = F.normalize(matrix.mH @ u, dim=0, eps=norm.eps)
    return weight / torch.vdot(u, matrix @ v)


@contextmanager
def differentiable_kernels(module: nn.Module | None = None) -> Iterator[None]:
    """Use kernels that can be differentiated twice and in forward mode.

    The fused attention kernels, those of attention layers in evaluation mode, and oneDNN's LSTM
    cannot; inside this context the plain ones run instead. They are slower, and agree with the fused ones to rounding.

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
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if off:
            torch._C._set_mkldnn_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
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
