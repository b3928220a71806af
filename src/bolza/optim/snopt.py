r"""A second-order optimizer for continuous-depth networks (Liu, Chen & Theodorou, 2021).

For ẋ = F(t, x, θ) with loss Φ(x(T)), the second derivatives obey backward equations as the gradient does. To first
order in the dynamics, and for Φ_xx = Σᵢ yᵢ yᵢᵀ, they stay a sum of outer products:

    qᵢ(T) = yᵢ,  q̇ᵢ = −F_xᵀ qᵢ        rᵢ(T) = 0,  ṙᵢ = −F_θᵀ qᵢ        Q_uu = Σ rᵢ rᵢᵀ,  Q_ux = Σ rᵢ qᵢᵀ

(`second_order_adjoint`). For training, each layer inside F is called at every evaluation of the field, and its block
of Q_uu is taken as a Kronecker product of what enters the calls and what comes back to them,

    A = E[a aᵀ],   G = E[ĝ ĝᵀ],   ĝ = batch · ∂J/∂(layer output)
    A = U_a E_a U_aᵀ,   G = U_g E_g U_gᵀ,   m = calls · (E_g ⊗ E_a)

over samples, places and calls; a has a 1 appended for the bias. In every iteration

    q = U_gᵀ ∇W U_a,   m ← α m + (1 − α) batch · q²,   d = U_g [q / (m + ε)] U_aᵀ

and d takes the place of the gradient in descent with momentum (`SNOpt`).

Reference: Liu, Chen & Theodorou (2021), *Second-Order Neural ODE Optimizer*, arXiv:2109.14158.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core import cites
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.optim.recorded import check_number, unwrapped
from bolza.optim.second_order import REFERENCE
from bolza.optim.sites import Field, Hook, Site, counter, counts, precision, sites_of, watcher
from bolza.systems.patched import Patched

__all__ = ["SNOpt", "eigenbasis", "preconditioned"]


def eigenbasis(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """Eigenvectors and eigenvalues of a Kronecker factor; a vector is a diagonal factor, with no rotation.

    Args:
        factor: symmetric matrix ``(n, n)``, or its diagonal ``(n,)``.

    Returns:
        ``(vectors, values)``, values at least zero; vectors are ``None`` for a diagonal.

    Example:
        >>> eigenbasis(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[1]
        tensor([1., 2.])
    """
    if factor.ndim == 1:
        return None, factor.clamp(min=0)
    values, vectors = torch.linalg.eigh(factor)
    return vectors, values.clamp(min=0)


def preconditioned(
    grad: Tensor, left: Tensor | None, right: Tensor | None, m: Tensor, batch: float, alpha: float, eps: float
) -> tuple[Tensor, Tensor]:
    r"""One iteration of the preconditioner, d = U_g [q / (m + ε)] U_aᵀ with q = U_gᵀ ∇W U_a.

    Args:
        grad: gradient of the mean loss, shape ``(out, in)``, or any shape if both rotations are ``None``.
        left: U_g, shape ``(out, out)``; ``None`` for no rotation.
        right: U_a, shape ``(in, in)``; ``None`` for no rotation.
        m: second moment in the rotated coordinates, the shape of ``grad``.
        batch: number of samples in the mean.
        alpha: share of the old second moment, in [0, 1].
        eps: least curvature.

    Returns:
        ``(d, m)``: what replaces the gradient, and the new second moment.

    Example:
        >>> g = torch.tensor([[3.0]])
        >>> preconditioned(g, None, None, torch.zeros(1, 1), batch=1, alpha=0.0, eps=1.0)
        (tensor([[0.3000]]), tensor([[9.]]))
    """
    q = grad if left is None else left.mT @ grad
    q = q if right is None else q @ right
    m = alpha * m + ((1 - alpha) * batch) * q.square()
    d = q / (m + eps)
    d = d if left is None else left @ d
    return (d if right is None else d @ right.mT), m


@cites(REFERENCE)
class SNOpt(torch.optim.Optimizer):
    r"""Second-order training of continuous-depth networks by Kronecker factors of the backward solve.

        W ← W − lr · v,   v ← momentum · v + U_g [q / (m + ε)] U_aᵀ + weight_decay · W

    with the letters of :mod:`bolza.optim.snopt`. Every Linear, Conv1d and Conv2d layer is preconditioned, inside a
    continuous-depth block or outside; a layer that is called several times in a pass (at every evaluation of a field)
    has one pair of factors for all calls. Inputs and signals are summed up while the ordinary ``backward()`` runs and
    are not kept, so that a block with a constant-memory adjoint keeps its constant memory. Gradients are not touched,
    in refresh iterations neither.

    Other parameters (scales of norms, embeddings, grouped convolutions, recurrent cells, layers whose own ``forward``
    is not called) use the same rule without a rotation.

    With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` without ``scaler.unscale_(optimizer)`` before it.

    A block that solves the adjoint equation backwards (``block.gradient == "adjoint"``, of length ``block.horizon``)
    has signals per unit of time; they are multiplied by the horizon over the number of evaluations. To have a module
    of your own treated so, give it these two attributes.

    Args:
        model: the network, or a DistributedDataParallel around it: factors are then those of the global batch.
        lr: step size η.
        momentum: of the step, as in ``torch.optim.SGD``.
        alpha: share of the old second moment in the new one.
        eps: least curvature ε; in units of squared signals, so that it suits losses that are means over the batch.
        refresh: iterations between two computations of factors and eigenvectors, from the first one on; ``None`` for
            never: ordinary descent.
        weight_decay: λ of an L2 term, which is not preconditioned.
        largest: a side of a weight matrix longer than this has a diagonal factor, without eigenvectors.
        params: parameters or groups; by default all that require gradients.

    Raises:
        ArgumentError: an argument makes no sense.
        UnsupportedError: the model hides its layers; in ``step``: the passes that the gradients came from were not
            seen.
        DivergenceError: in ``step``: the factors of a layer are not finite.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2109.14158, §3. Departures: factors are those of the discrete
    solve that made the gradient, all its evaluations, rather than of samples at fixed times; there is no square root,
    as in the paper; all layers are preconditioned by default.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = SNOpt(net, lr=0.02)
        >>> net(torch.ones(4, 2)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[net[0].weight]["basis_in"].shape
        torch.Size([3, 3])
    """

    _step_supports_amp_scaling = True  # a GradScaler hands its scale over
    _scale = 1.0

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        momentum: float = 0.0,
        alpha: float = 0.75,
        eps: float = 0.05,
        refresh: int | None = 100,
        weight_decay: float = 0.0,
        *,
        largest: int = 1024,
        params: Any = None,
    ) -> None:
        self.module, self.group = unwrapped(model)
        check_number("lr", lr)
        check_number("momentum", momentum, high=1.0)
        check_number("alpha", alpha, high=1.0)
        check_number("eps", eps, open_low=True)
        check_number("weight_decay", weight_decay)
        check_number("largest", largest)
        if refresh is not None and (not isinstance(refresh, int) or refresh < 1):
            raise ArgumentError(
                f"refresh is {refresh!r}: it must be a positive integer, or None for plain descent"
            )
        own = [p for p in self.module.parameters() if p.requires_grad]
        if not own:
            raise ArgumentError("model has no parameter that requires a gradient: there is nothing to train")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "refresh": refresh,
            "weight_decay": weight_decay,
        }
        super().__init__(own if params is None else list(params), defaults)
        self._largest = largest
        self._watch()

    # -- what is noted while the network runs

    def _watch(self) -> None:
        self._sites = sites_of(self.module, self._largest)
        self._seen: list[int] = []  # samples of each pass that a backward followed
        self._refreshing: set[int] | None = None  # weights whose factors are due; None where it is to be seen
        self._handles: list[Any] = []
        me = weakref.ref(self)
        root = self.module

        def passed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            optimizer = me()
            if optimizer is None or module is not root or not counts():
                return
            result = next((t for t in _tensors(output) if t.requires_grad), None)
            given = next((t for t in _tensors((args, kwargs)) if t.ndim > 0), None)
            if result is not None and given is not None:
                seen, count = optimizer._seen, [len(given)]
                # counted when a backward comes, once
                result.register_hook(lambda _: seen.append(count.pop()) if count else None)

        self._handles.append(root.register_forward_hook(Hook(passed), with_kwargs=True))

        def due(p: Tensor) -> bool:
            return (optimizer := me()) is not None and optimizer._due(p)

        for site in self._sites:
            for layer in site.layers:
                self._handles.append(layer.register_forward_hook(Hook(watcher(due, site, layer))))
        for watched in self._fields():
            self._handles.append(watched.module.register_forward_hook(Hook(counter(watched))))

        def cleared(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if (optimizer := me()) is not None:
                optimizer._forget()
            return original(*args, **kwargs)

        self._patched = Patched(root, "zero_grad", cleared)

    def _fields(self) -> list[Field]:
        return list(
            {id(site.inside): site.inside for site in self._sites if site.inside is not None}.values()
        )

    def _forget(self) -> None:
        self._refreshing = None
        self._seen.clear()
        for site in self._sites:
            site.clear()
        for watched in self._fields():
            watched.evaluations = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the passes that they came from."""
        self._forget()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take all hooks off the network; the optimizer cannot step any more."""
        for handle in self._handles:
            handle.remove()
        self._patched.undo()
        self._handles = []

    def _due(self, p: Tensor) -> bool:
        """Whether the next step computes the factors of a weight anew."""
        if self._refreshing is None:
            self._refreshing = {
                id(p)
                for group in self.param_groups
                if group["refresh"] is not None
                for p in group["params"]
                if self.state.get(p, {}).get("step", 0) % group["refresh"] == 0
            }
        return id(p) in self._refreshing

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state_dict)
        self._forget()

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients and passes since the last ``zero_grad``.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        if not self._unscale(group_of):
            self._forget()
            return loss
        if all(p.grad is None for p in group_of):
            return loss
        for p in group_of:
            if p.grad is not None and (p.grad.is_sparse or p.is_complex()):
                kind = "a sparse gradient" if p.grad.is_sparse else "complex entries"
                raise UnsupportedError(
                    f"a parameter of shape {tuple(p.shape)} has {kind}, for which there is no second moment: "
                    "set sparse=False, or leave it to another optimizer with params="
                )
        batch = self._batch(any(group["refresh"] is not None for group in self.param_groups))
        done = set()
        for site in self._sites:
            w = site.weight
            if w.grad is None or w not in group_of or group_of[w]["refresh"] is None:
                continue
            members = [p for p in (w, site.bias) if p is not None]
            for p, d in zip(members, self._direction(site, batch, group_of[w]), strict=True):
                if p in group_of and p.grad is not None:
                    self._move(p, d, group_of[p])
            done.update(members)
        for p, group in group_of.items():
            if p.grad is not None and p not in done:
                self._move(p, self._plain(p, batch, group), group)
        self._forget()
        return loss

    def _unscale(self, group_of: dict[Tensor, Any]) -> bool:
        """Divide gradients by the scale of the loss; whether they are finite."""
        self._scale, found = 1.0, getattr(self, "found_inf", None)
        if found is None:  # there is no GradScaler at work
            return True
        if float(found):
            return False
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            self._scale = float(scale)
            for p in group_of:
                if p.grad is not None:
                    p.grad.div_(self._scale)
        elif any(self._due(p) for p in group_of):
            raise UnsupportedError(
                "the gradients were unscaled before scaler.step(optimizer), which leaves the signals of the layers "
                "scaled by a number that is no longer known: leave scaler.unscale_(optimizer) out, and clip to "
                "max_norm * scaler.get_scale(); or use bfloat16, which needs no GradScaler"
            )
        return True

    def _batch(self, needed: bool) -> float:
        """Samples behind the gradients, over all processes."""
        batch = float(sum(self._seen))
        if self.group is not None:
            total = torch.tensor(batch, device=self.param_groups[0]["params"][0].device)
            torch.distributed.all_reduce(total, group=self.group)
            batch = float(total)
        if needed and batch == 0:
            raise UnsupportedError(
                "there are gradients, but no pass of the network was seen: call the module itself (not "
                "functional_call or one of its layers) with a batch and have it return tensors, then backward(), "
                "then step(), and do not clear gradients through another object than the network or the optimizer"
            )
        return batch

    def _direction(self, site: Site, batch: float, group: dict[str, Any]) -> list[Tensor]:
        """What replaces the gradients of a weight and of its bias."""
        w, bias = site.weight, site.bias
        state = self.state[w]
        grad = w.grad.flatten(1)  # type: ignore[union-attr]
        if bias is not None:
            last = torch.zeros_like(bias) if bias.grad is None else bias.grad
            grad = torch.cat([grad, last[:, None]], 1)
        grad = grad.to(precision(w))
        if self._due(w):
            self._refresh(site, state, batch, grad)
        d, state["m"] = preconditioned(
            grad,
            state.get("basis_out"),
            state.get("basis_in"),
            state["m"],
            batch,
            group["alpha"],
            group["eps"],
        )
        state["step"] = state.get("step", 0) + 1
        into = w[0].numel()
        d = d.to(w.dtype)
        return [d[:, :into].reshape(w.shape), *([d[:, into]] if bias is not None else [])]

    def _refresh(self, site: Site, state: dict[str, Any], batch: float, grad: Tensor) -> None:
        """Factors and eigenvectors from the sums of the passes since the last step."""
        sums, rows = site.sums, float(site.rows)
        if self.group is not None:
            sums, rows = self._reduced(site, grad, rows)
        if rows == 0:  # not called as a layer: no rotation, or the one that there is
            state.setdefault("m", batch * grad.square())
            return
        A, G = sums[0] / rows, sums[1] * ((batch / self._scale) ** 2 / rows)
        if site.inside is not None:
            G = G * site.inside.per_evaluation(len(self._seen)) ** 2
        if not (A.isfinite().all() and G.isfinite().all()):
            raise DivergenceError(
                f"inputs or signals of {site.name!r} are not finite at step {state.get('step', 0)}: "
                "lower the learning rate, or skip the batch by zero_grad()",
                step=state.get("step", 0),
                layer=site.name,
            )
        (right, e_a), (left, e_g) = eigenbasis(A), eigenbasis(G)
        for key, basis in (("basis_in", right), ("basis_out", left)):
            if basis is not None:
                state[key] = basis
        state["m"] = (rows / batch) * torch.outer(e_g, e_a)

    def _reduced(self, site: Site, grad: Tensor, rows: float) -> tuple[list[Tensor], float]:
        """The sums over all processes; signals are of the mean over each one's own samples."""
        count = torch.tensor(rows, device=grad.device)
        torch.distributed.all_reduce(count, group=self.group)
        out, into = grad.shape
        shapes = [(n,) if long else (n, n) for n, long in zip((into, out), site.diagonal, strict=True)]
        sums = site.sums or [grad.new_zeros(shape) for shape in shapes]
        # the mean over processes of mean losses: a signal of the mean over all samples is a part of the local one
        sums[1] = sums[1] / torch.distributed.get_world_size(self.group) ** 2
        for total in sums:
            torch.distributed.all_reduce(total, group=self.group)
        return sums, float(count)

    def _plain(self, p: Tensor, batch: float, group: dict[str, Any]) -> Tensor:
        """The rule without a rotation, or the gradient itself where there is no preconditioning."""
        grad = p.grad
        assert grad is not None
        if group["refresh"] is None:
            return grad
        state = self.state[p]
        if self._due(p):
            state["m"] = batch * grad.square()
        d, state["m"] = preconditioned(grad, None, None, state["m"], batch, group["alpha"], group["eps"])
        state["step"] = state.get("step", 0) + 1
        return d

    def _move(self, p: Tensor, d: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            d = d.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            state = self.state[p]
            if "momentum_buffer" in state:
                d = state["momentum_buffer"].mul_(group["momentum"]).add_(d)
            else:
                d = state["momentum_buffer"] = d.clone()
        p.add_(d, alpha=-group["lr"])

    def __getstate__(self) -> dict[str, Any]:  # hooks stay behind
        names = ("module", "group", "_largest")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "module" in state:  # a copy, and no state_dict
            self._watch()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
