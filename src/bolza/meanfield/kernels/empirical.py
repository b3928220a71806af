r"""The tangent kernel of a network as it is: finite width, present parameters.

    Θ_{ia,jb} = Σ_p s_p  ∂f_a(x_i)/∂θ_p · ∂f_b(x_j)/∂θ_p

Under gradient flow on the squared error the outputs of the network move by −Θ (f − y), exactly, at this moment; in a
wide network Θ hardly moves, and this is the whole of training (:mod:`bolza.meanfield.kernels.linearized`).

A linear layer with inputs X and output gradients P adds (X Xᵀ + 1) ∘ (P Pᵀ). One forward pass, and one backward pass
for each output, give the X and P of all layers; the Jacobian is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bolza.core.reference import Reference, cites
from bolza.ops.output_gradients import OutputGradients
from bolza.ops.stacks import Outputs

__all__ = ["empirical_ntk"]

REFERENCE = Reference(
    "novak2022fast",
    "Novak, Roman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S.",
    "Fast Finite Width Neural Tangent Kernel",
    2022,
    venue="International Conference on Machine Learning",
    arxiv="2206.08720",
)


@cites(REFERENCE)
def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: Outputs = "mean",
    params: Iterable[str] | None = None,
    scales: Mapping[str, float] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    chunk: int | None = None,
    memory: int = 2**30,
    seed: int = 0,
) -> Tensor:
    r"""Neural tangent kernel of this network at its present parameters.

        Θ_{ia,jb} = Σ_p s_p ∂f_a(x_i)/∂θ_p · ∂f_b(x_j)/∂θ_p

    Linear layers, convolutions, normalisations and embeddings cost no more than a forward pass and a backward pass for
    each output, and products of what entered them and what came back. Parameters of other layers (attention,
    recurrent cells, weights that are also used in another way) take explicit gradients, some samples at a time. Which
    is which is found by comparison with samples taken alone.

    The network is evaluated in evaluation mode, so that dropout adds nothing and samples do not meet. A batch norm in
    training mode normalises by the mean and variance of x1 and x2 together, held fixed; in evaluation mode by its
    running averages. The model itself is left as it is.

    Args:
        model: the network.
        x1: inputs, n samples: a tensor, a tuple of positional or a dict of keyword arguments; samples first in every
            tensor.
        x2: inputs, m samples; x1 by default.
        outputs: what becomes of the output indices a, b: ``"mean"`` over a = b, which is what the kernel of the
            infinitely wide network is the limit of; ``"trace"``, the sum over a = b; ``"each"`` a = b;
            ``"full"``, all pairs.
        params: names of parameters or modules; all that have ``requires_grad`` by default.
        scales: factors s by name of parameter or module, 1 by default: learning rates that differ, or another
            parametrisation. With weights w = ω σ/√fan_in the kernel with respect to ω has s = σ²/fan_in.
        output: takes the tensor of outputs, samples first, from what the model returns, or some of the outputs.
        chunk: samples in one pass; as many as ``memory`` allows by default.
        memory: bytes for what is kept between passes, about.
        seed: of the random numbers the model draws even in evaluation mode.

    Returns:
        ``(n, m)`` for ``"mean"`` and ``"trace"``, ``(n, m, k)`` for ``"each"`` and ``(n, m, k, k)`` for ``"full"`` of
        k outputs, all dimensions of an output but the first taken together; dtype and device of the parameters.

    Raises:
        ArgumentError: an option makes no sense, nothing depends on the parameters, or the model returns no tensor.
        DataError: tensors of the inputs differ in their number of samples.
        DivergenceError: the kernel is not finite.
        ShapeError: the outputs do not have samples first.
        UnsupportedError: half-precision parameters.

    Reference: Jacot, Gabriel & Hongler (2018); Novak, Sohl-Dickstein & Schoenholz (2022), structured derivatives.
    Departure: layers that cannot be factored fall back on explicit gradients without being named.

    Example:
        >>> import torch
        >>> net, x = nn.Linear(2, 1), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> empirical_ntk(net, x)                                    # x·x' + 1
        tensor([[2., 2.],
                [2., 6.]])
        >>> empirical_ntk(nn.Linear(2, 3), x, x[:1], outputs="full").shape
        torch.Size([2, 1, 3, 3])
    """
    data = [x1] if x2 is None else [x1, x2]
    gradients = OutputGradients(
        model, data, params, output=output, scales=scales, chunk=chunk, memory=memory, seed=seed
    )
    return gradients.kernel(x1, x2, outputs)
