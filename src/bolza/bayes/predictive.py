r"""What a network with many weights says: the mean over them, and how far they disagree.

    p(y|x) = (1/S) Σ_s p(y|x, θ_s)

    H[p(y|x)]  =  (1/S) Σ_s H[p(y|x, θ_s)]  +  I
    total         in the data: classes overlap   among the weights: more data would help

Reference: Gal (2016), *Uncertainty in Deep Learning*, §3.3; Kendall & Gal (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bolza.bayes.trace import Trace, samples_of
from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.ops.replay import frozen_statistics

__all__ = ["Prediction", "predict"]

Kind = Literal["classification", "regression"]
_TOGETHER = 2**18  # weights times samples that are worth a vectorised pass; beyond, a pass each is as fast


@dataclass(frozen=True)
class Prediction:
    """What the sampled networks say of a batch.

    Attributes:
        mean: the mean over the weights: of the probabilities for classes, ``(n, classes)``, else of the outputs.
        spread: standard deviation over the weights, of the same shape.
        outputs: what each of them said, ``(draws, n, …)``, if it was asked for.
        total: entropy of the mean, in nats, ``(n,)``; for classes only.
        aleatoric: mean of the entropies: what is left when the weights are known.
        mutual_information: the difference: what the weights disagree on.
    """

    mean: Tensor
    spread: Tensor
    outputs: Tensor | None = None
    total: Tensor | None = None
    aleatoric: Tensor | None = None
    mutual_information: Tensor | None = None


def predict(
    model: nn.Module,
    samples: Trace | Mapping[str, Tensor] | Iterable[Trace],
    x: Any,
    *,
    kind: Kind = "classification",
    keep: bool = False,
    batch_size: int | None = None,
    vectorise: bool | None = None,
) -> Prediction:
    r"""Mean and spread over sampled weights, and for classes the entropies: p(y|x) = mean_s p(y|x, θ_s).

    The network runs in evaluation mode, with the running statistics of each sample where the trace kept them, and is
    left as it was.

    Args:
        model: the network; weights that the samples do not name are its own.
        samples: a trace, the traces of several chains, or a dict of stacked weights ``(draws, *shape)``.
        x: inputs, samples first: a tensor, a tuple of positional or a dict of keyword arguments.
        kind: ``"classification"``: outputs are logits ``(n, classes)``, and probabilities are averaged;
            ``"regression"``: outputs are averaged as they are, and the spread is that of the mean function only: add
            the variance of the observations.
        keep: return what each sample said.
        batch_size: inputs at a time; all by default.
        vectorise: run all sampled networks in one pass; by default where they are small, and the network allows it.

    Returns:
        Prediction.

    Raises:
        ArgumentError: the kind is unknown, or a sample has a name that the model does not have.
        ShapeError: there is no sample, or logits are not ``(n, classes)``.
        DataError: an output is not finite.

    Reference: Gal (2016), §3.3.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> weights = {"weight": torch.tensor([[[20.0], [-20.0]], [[-20.0], [20.0]]])}       # two that disagree
        >>> found = predict(net, weights, torch.tensor([[1.0], [0.0]]))
        >>> found.mean[0], found.mutual_information
        (tensor([0.5000, 0.5000]), tensor([0.6931, 0.0000]))
    """
    if kind not in ("classification", "regression"):
        raise ArgumentError(f"kind is {kind!r}: choose 'classification' or 'regression'")
    weights = samples_of(samples)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise ArgumentError(f"samples name {unknown}, which the model does not have")
    weights = {name: value.to(own[name]) for name, value in weights.items()}
    modes = {module: module.training for module in model.modules()}
    parts = []
    try:
        model.eval()
        with torch.no_grad(), frozen_statistics(model):
            for piece in _pieces(x, batch_size):
                outputs = _outputs(model, weights, piece, vectorise)
                if not bool(torch.isfinite(outputs).all()):
                    raise DataError("an output is not finite: a sample of the weights or an input is broken")
                parts.append(_read(outputs, kind, keep))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _joined(parts)


def _read(outputs: Tensor, kind: Kind, keep: bool) -> Prediction:
    """Moments, and entropies, over the first dimension."""
    kept = outputs if keep else None
    if kind == "regression":
        spread = outputs.std(0) if len(outputs) > 1 else torch.zeros_like(outputs[0])
        return Prediction(outputs.mean(0), spread, kept)
    if outputs.dim() != 3 or outputs.shape[-1] < 2:
        raise ShapeError(
            f"each network has outputs of shape {tuple(outputs.shape[1:])}: classification needs logits "
            "(n, classes) of at least 2 classes (for one logit z of a binary label those are 0 and z); for numbers "
            "pass kind='regression'"
        )
    log_p = outputs.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    total = torch.special.entr(mean).sum(-1)
    aleatoric = -(p * log_p).sum(-1).mean(0)
    spread = p.std(0) if len(p) > 1 else torch.zeros_like(mean)
    return Prediction(mean, spread, kept, total, aleatoric, (total - aleatoric).clamp_min(0))


def _outputs(model: nn.Module, weights: dict[str, Tensor], x: Any, vectorise: bool | None) -> Tensor:
    """What each sampled network says, ``(draws, n, …)``."""
    args, kwargs = (), {}
    if isinstance(x, Mapping):
        kwargs = dict(x)
    else:
        args = x if isinstance(x, tuple) else (x,)

    def one(at: dict[str, Tensor]) -> Tensor:
        out = functional_call(model, at, args, kwargs)
        if not isinstance(out, Tensor):
            raise ShapeError(
                f"the network returns a {type(out).__name__}, not a tensor: wrap it in a module whose forward returns "
                "the logits, or the numbers, alone"
            )
        return out

    draws = len(next(iter(weights.values())))
    if vectorise is None:
        # the fused kernel of evaluation mode has no batching rule: it would run one network at a time, and warn
        fused = any(
            isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) for m in model.modules()
        )
        vectorise = (
            not fused and sum(value[0].numel() for value in weights.values()) <= _TOGETHER and draws > 1
        )
        if vectorise:
            try:
                return _together(one, weights)
            except (
                RuntimeError
            ):  # a layer without a batching rule: recurrent kernels, values read from tensors
                vectorise = False
    if vectorise:
        return _together(one, weights)
    return torch.stack([one({name: value[s] for name, value in weights.items()}) for s in range(draws)])


def _together(one: Callable[[dict[str, Tensor]], Tensor], weights: dict[str, Tensor]) -> Tensor:
    size = sum(value[0].numel() for value in weights.values())
    found: Tensor = vmap(one, chunk_size=max(1, 16 * _TOGETHER // max(1, size)))(weights)
    return found


def _pieces(x: Any, batch_size: int | None) -> Iterable[Any]:
    if batch_size is None:
        return [x]
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}: it must be positive, or None")
    whole = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple) else [x]
    n = len(whole[0])
    cuts = [slice(i, i + batch_size) for i in range(0, max(n, 1), batch_size)]
    if isinstance(x, Mapping):
        return [{name: value[cut] for name, value in x.items()} for cut in cuts]
    if isinstance(x, tuple):
        return [tuple(value[cut] for value in x) for cut in cuts]
    return [x[cut] for cut in cuts]


def _joined(parts: list[Prediction]) -> Prediction:
    if len(parts) == 1:
        return parts[0]

    def cat(name: str, dim: int = 0) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim)

    return Prediction(
        cat("mean"),
        cat("spread"),
        cat("outputs", 1),
        cat("total"),
        cat("aleatoric"),
        cat("mutual_information"),
    )
