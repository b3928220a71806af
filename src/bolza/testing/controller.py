"""The contract of a controller: it can be worn over any optimizer, saved, resumed and taken off again."""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import BolzaError, CheckpointError
from bolza.testing.clauses import ContractError, identical, require
from bolza.testing.controlled_run import (
    LONGEST,
    OPTIMIZERS,
    ControlledRun,
    finite,
    hooks,
    leaves,
    remembered,
    through_file,
)
from bolza.training import load_tree, save_tree

__all__ = ["CONTROLLER_CLAUSES", "check_controller"]

Factory = Callable[..., Any]
Make = Callable[..., ControlledRun]


# ------------------------------------------------------------------------------------ the clauses


def _has_the_form(make: Make, steps: int) -> None:
    case = make()
    missing = [n for n in ("step", "state_dict", "load_state_dict") if not hasattr(case.controller, n)]
    require(
        not missing,
        "has_the_form",
        f"{type(case.controller).__name__} lacks {', '.join(missing)}: derive from bolza.controllers.Controller",
    )
    for _ in range(steps):
        try:
            action = case.step()
        except TypeError as error:
            raise ContractError(
                "has_the_form", f"step(loss=…) raised {error}: take what the loop observes as keywords"
            ) from error
        plain = action is None or (isinstance(action, Mapping) and all(map(finite, leaves(action))))
        require(plain, "has_the_form", f"step() returned {action!r}: return what was changed, as a dict")


def _repeats(make: Make, steps: int) -> None:
    one, two = make(), make()
    for case in (one, two):
        torch.manual_seed(1)
        case.steps(steps)
    require(
        identical(one.all(), two.all()),
        "repeats",
        "two runs with the same seed differ: draw from a generator that is seeded, and keep nothing outside "
        "the controller",
    )


def _fits_any_optimizer(make: Make, steps: int) -> None:
    for name, optimizer in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.float64):
            case = make(optimizer, dtype=dtype)
            held, kinds = case.optimizer.param_groups[0]["lr"], _kinds(case)
            where = f"over {name} in {dtype}, after {steps} steps,"
            try:
                case.steps(steps)
            except Exception as error:
                raise ContractError("fits_any_optimizer", f"{where} the run raised {error!r}") from error
            for key, value in case.values().items():
                require(
                    bool(value.isfinite().all()),
                    "fits_any_optimizer",
                    f"{where} {key} is not finite: bound the action",
                )
            require(
                _kinds(case) == kinds,
                "fits_any_optimizer",
                f"{where} the parameters have other dtypes: act in the dtype of each parameter",
            )
            lr = case.optimizer.param_groups[0]["lr"]
            require(
                math.isfinite(float(lr)) and float(lr) >= 0,
                "fits_any_optimizer",
                f"{where} lr is {float(lr)}: it must be finite and not negative",
            )
            require(
                (lr is held) if isinstance(held, Tensor) else isinstance(lr, float | int),
                "fits_any_optimizer",
                f"{where} lr, which was a {type(held).__name__}, is another {type(lr).__name__}: fill a tensor in "
                "place, since a compiled step holds on to it, and write a float over a float",
            )


def _kinds(case: ControlledRun) -> list[Any]:
    return [(n, id(p), p.dtype, p.requires_grad) for n, p in case.net.named_parameters()]


def _keeps_ratios(make: Make, steps: int) -> None:
    case = make(groups=True)
    case.steps(steps)
    first, second = (float(group["lr"]) for group in case.optimizer.param_groups)
    require(
        math.isclose(second, 0.5 * first, rel_tol=1e-6, abs_tol=1e-30),
        "keeps_ratios",
        f"two groups with the rates 1 : 0.5 ended at {first:.6g} : {second:.6g}: scale all groups alike; a law that "
        "gives each group its own rate may leave this clause out",
    )


def _leaves_the_others_alone(make: Make, steps: int) -> None:
    case = make()
    before = case.values()
    case.steps(steps)
    after = case.values()
    moved = [n for n in ("unused", "first.bias") if not identical(before[n], after[n])]
    require(
        not moved,
        "leaves_the_others_alone",
        f"{moved} have no gradient (unused or frozen) but were changed: act on parameters whose .grad is not None",
    )
    given = [
        n for n, p in case.net.named_parameters() if n in ("unused", "first.bias") and p.grad is not None
    ]
    require(
        not given,
        "leaves_the_others_alone",
        f"{given} were given a gradient: measure with torch.autograd.grad, which writes none",
    )


def _leaves_the_run_alone(make: Make, steps: int) -> None:
    case = make()
    for _ in range(steps):
        loss = case.backward()
        case.optimizer.step()
        before, random = _surroundings(case), torch.get_rng_state()
        case.controller.step(loss=loss.item())
        after = _surroundings(case)
        changed = [name for name in before if not identical(before[name], after[name])]
        require(
            not changed,
            "leaves_the_run_alone",
            f"step() changed the {' and the '.join(changed)}: put back what a measurement touches",
        )
        require(
            torch.equal(random, torch.get_rng_state()),
            "leaves_the_run_alone",
            "step() drew from the global random generator, so that the run is not the one without it: "
            "draw from a generator of your own, and run the model under torch.random.fork_rng()",
        )


def _surroundings(case: ControlledRun) -> dict[str, Any]:
    return {
        "gradients": [None if p.grad is None else p.grad.clone() for p in case.net.parameters()],
        "mode of a layer": [layer.training for layer in case.net.modules()],
        "running statistics": [buffer.clone() for buffer in case.net.buffers()],
        "requires_grad of a parameter": [p.requires_grad for p in case.net.parameters()],
    }


def _takes_either_way_of_clearing(make: Make, steps: int) -> None:
    runs = []
    for way in (True, False):
        case = make(set_to_none=way)
        case.steps(steps)
        runs.append(case.all())
    require(
        identical(*runs),
        "takes_either_way_of_clearing",
        "zero_grad(set_to_none=False) leads to another run than set_to_none=True: keep no reference to .grad "
        "over the step, copy it",
    )


def _takes_a_loss_of_either_kind(make: Make, steps: int) -> None:
    runs = []
    for kind in (Tensor.item, Tensor.clone):
        case = make(loss_as=kind)
        case.steps(steps)
        runs.append(case.all())
    require(
        identical(*runs),
        "takes_a_loss_of_either_kind",
        "step(loss=tensor) and step(loss=float) lead to different runs: convert the loss with float()",
    )


def _logs_finite_numbers(make: Make, steps: int) -> None:
    case = make()
    if not hasattr(case.controller, "log"):
        return
    names = None
    for step in range(steps):
        case.step()
        log = case.controller.log()
        bad = [f"{k}={v!r}" for k, v in log.items() if type(v) is not float or not math.isfinite(v)]
        require(
            not bad,
            "logs_finite_numbers",
            f"log() at step {step + 1} gave {', '.join(bad)}: give finite floats, from the first step on",
        )
        require(
            names is None or names == list(log),
            "logs_finite_numbers",
            f"log() had the keys {names}, then {list(log)}: give the same ones in the same order at every step",
        )
        names = list(log)


def _bounds_its_memory(make: Make, steps: int) -> None:
    case = make(OPTIMIZERS["SGD"])
    case.backward()
    for _ in range(LONGEST + 80):  # the run goes nowhere: only its length matters
        case.optimizer.step()
        case.controller.step(loss=1.0)
    longest = max(
        (len(v) for v in leaves(case.controller.state_dict()) if isinstance(v, list | tuple)), default=0
    )
    require(
        longest <= LONGEST,
        "bounds_its_memory",
        f"after {LONGEST + 80} steps a list in state_dict() has {longest} entries: keep running sums, or thin the "
        "record as bolza.core.History does",
    )


def _survives_a_skipped_step(make: Make, steps: int) -> None:
    """A gradient scaler leaves out the update of a step whose gradient overflowed."""
    case = make()
    _step_without_update(case, 1.0)  # before the first update there is
    case.steps(steps // 2)
    loss = case.backward()
    for p in case.net.parameters():
        if p.grad is not None:
            p.grad.fill_(math.inf)
    before = case.values()
    _step_without_update(case, loss.item())
    require(
        identical(before, case.values()),
        "survives_a_skipped_step",
        "step() without an update before it changed the parameters: a gradient scaler leaves updates out; look "
        "whether there was one",
    )
    require(
        all(map(finite, leaves(remembered(case.controller.state_dict())))),
        "survives_a_skipped_step",
        "an infinite gradient, whose update was left out, is in the state: look at gradients of steps that were made",
    )
    case.steps(steps // 2)
    require(
        all(bool(v.isfinite().all()) for v in case.values().values()),
        "survives_a_skipped_step",
        "after a step that was left out, the run does not stay finite",
    )


def _step_without_update(case: ControlledRun, loss: float) -> None:
    try:
        case.controller.step(loss=loss)
    except Exception as error:
        raise ContractError(
            "survives_a_skipped_step",
            f"step() without an update before it raised {error!r}: a gradient scaler leaves some out",
        ) from error


def _keeps_nan_out(make: Make, steps: int) -> None:
    case = make()
    case.steps(steps // 2)
    for _ in range(steps // 2):
        case.backward()
        for p in case.net.parameters():
            if p.grad is not None:
                p.grad.fill_(math.nan)
        case.optimizer.step()
        try:
            case.controller.step(loss=math.nan)
        except BolzaError as error:
            require(
                str(steps // 2) in str(error) or str(steps // 2 + 1) in str(error),
                "keeps_nan_out",
                f"a gradient that is NaN raises {error!r}, which does not name the step, {steps // 2}",
            )
            break
    bad = all(map(finite, leaves(remembered(case.controller.state_dict()))))
    require(
        bad,
        "keeps_nan_out",
        "a gradient that is NaN got into state_dict(): raise bolza.core.errors.DivergenceError naming the step, or "
        "leave the measurement out",
    )
    require(
        all(map(finite, leaves(case.settings()))),
        "keeps_nan_out",
        f"a gradient that is NaN got into the parameter groups: {case.settings()}",
    )


def _lets_go(make: Make, steps: int) -> None:
    case = make()
    case.steps(2)
    case.controller = None
    gc.collect()
    left = hooks(case) - case.hooks
    require(
        left <= 0,
        "lets_go",
        f"{left} hooks of a controller that was deleted are still there: let hooks hold it by a weakref.ref, and "
        "remove them with weakref.finalize",
    )
    case = make()
    if not hasattr(case.controller, "remove"):
        return
    case.controller.remove()
    left = hooks(case) - case.hooks
    require(left <= 0, "lets_go", f"after remove() {left} hooks are still there")


def _is_saved_whole(make: Make, steps: int) -> None:
    case = make()
    case.steps(steps)
    clause = "is_saved_whole"
    state = case.controller.state_dict()
    loaded = through_file(state, clause)
    require(
        identical(state, loaded), clause, "state_dict() comes back from torch.load with other values or types"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "state")
        try:
            save_tree(state, file)
        except CheckpointError as error:
            raise ContractError(clause, f"state_dict() does not fit into a checkpoint: {error}") from error
        tree = load_tree(file)
    require(
        identical(state, tree), clause, "state_dict() comes back from load_tree with other values or types"
    )
    fresh = make(weights=1)
    fresh.controller.load_state_dict(loaded)
    require(
        identical(fresh.controller.state_dict(), case.controller.state_dict()),
        clause,
        "a new controller that loaded a state gives another state_dict(): restore all that is saved",
    )
    kept = through_file(state, clause)
    case.steps(2)
    require(
        identical(state, kept),
        clause,
        "state_dict() changes while the run goes on: hand out copies of tensors",
    )
    require(
        identical(fresh.controller.state_dict(), kept) and identical(loaded, kept),
        clause,
        "load_state_dict() shares tensors with the dict that it was given: copy them",
    )


def _resumes_bit_for_bit(make: Make, steps: int) -> None:
    for options in ({}, {"groups": True}):
        whole = make(**options)
        whole.steps(steps // 2)
        saved = through_file(
            {
                "net": whole.net.state_dict(),
                "optimizer": whole.optimizer.state_dict(),
                "controller": whole.controller.state_dict(),
                "order": whole.order.state_dict(),
                "random": torch.get_rng_state(),
            },
            "resumes_bit_for_bit",
        )
        whole.steps(steps)
        resumed = make(weights=1, **options)  # what is measured before loading must not count
        resumed.net.load_state_dict(saved["net"])
        resumed.optimizer.load_state_dict(saved["optimizer"])
        resumed.controller.load_state_dict(saved["controller"])
        resumed.order.load_state_dict(saved["order"])
        torch.set_rng_state(saved["random"])
        resumed.steps(steps)
        was, now = whole.all(), resumed.all()
        apart = [name for name in was if not identical(was[name], now[name])]
        require(
            not apart,
            "resumes_bit_for_bit",
            f"a run restored from its state_dict()s goes on with other {' and '.join(apart)} than the run that was "
            "saved: keep all that a decision depends on in the state, and look up optimizer.param_groups anew, "
            "since loading replaces them",
        )


CONTROLLER_CLAUSES: dict[str, Callable[[Make, int], None]] = {
    "has_the_form": _has_the_form,
    "repeats": _repeats,
    "fits_any_optimizer": _fits_any_optimizer,
    "keeps_ratios": _keeps_ratios,
    "leaves_the_others_alone": _leaves_the_others_alone,
    "leaves_the_run_alone": _leaves_the_run_alone,
    "takes_either_way_of_clearing": _takes_either_way_of_clearing,
    "takes_a_loss_of_either_kind": _takes_a_loss_of_either_kind,
    "logs_finite_numbers": _logs_finite_numbers,
    "bounds_its_memory": _bounds_its_memory,
    "survives_a_skipped_step": _survives_a_skipped_step,
    "keeps_nan_out": _keeps_nan_out,
    "lets_go": _lets_go,
    "is_saved_whole": _is_saved_whole,
    "resumes_bit_for_bit": _resumes_bit_for_bit,
}
"""The clauses by name, in the order in which `check_controller` runs them."""


def check_controller(
    factory: Factory, *, takes_model: bool = False, steps: int = 12, without: Iterable[str] = ()
) -> None:
    """Check that a controller can be worn over any optimizer, saved, resumed bit for bit and taken off.

    Runs every clause of `CONTROLLER_CLAUSES` on a network of 126 parameters with batch normalisation, dropout,
    and a shared, a frozen and an unused parameter, in batches of 8 from 32 samples. The global random state is
    put back afterwards.

    Args:
        factory: called with the optimizer, returns a new controller; give it windows that end within ``steps``.
        takes_model: call ``factory(optimizer, model, loss, data)`` instead, for controllers that measure the
            network: ``loss`` is (outputs, targets) → scalar, ``data`` a :class:`bolza.data.Dataset`.
        steps: length of a run; at least 4.
        without: clauses to leave out, each for a reason that belongs beside the call.

    Raises:
        ContractError: names the first clause that does not hold.
        ValueError: ``without`` names no clause, or ``steps`` is less than 4.

    Example:
        >>> from bolza.controllers import PolicyScheduler, StationarityAnnealing
        >>> anneals = lambda optimizer: PolicyScheduler(optimizer, StationarityAnnealing(window=4, blocks=4))
        >>> check_controller(anneals, steps=4, without=["bounds_its_memory"])  # the clause of a thousand steps
    """
    without = set(without)
    unknown = sorted(without - CONTROLLER_CLAUSES.keys())
    if unknown:
        raise ValueError(f"without={unknown} names no clause: choose from {list(CONTROLLER_CLAUSES)}")
    if steps < 4:
        raise ValueError(f"steps={steps} must be at least 4, so that a run can be saved in its middle")

    def make(*arguments: Any, **options: Any) -> ControlledRun:
        return ControlledRun(factory, takes_model, *arguments, **options)

    state = torch.get_rng_state()
    try:
        for name, clause in CONTROLLER_CLAUSES.items():
            if name not in without:
                clause(make, steps)
    finally:
        torch.set_rng_state(state)
