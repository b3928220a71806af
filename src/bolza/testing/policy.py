"""The contract of a policy: a pure pair of functions whose state can be saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bolza.core import Policy
from bolza.testing.clauses import ContractError, identical, require

__all__ = ["check_policy"]


def check_policy(factory: Callable[[], Policy[Any]], observations: Sequence[Mapping[str, Any]]) -> None:
    """Check that a feedback law for hyper-parameters is pure, repeats, and can be resumed.

    Args:
        factory: makes a new policy.
        observations: at least two, as the law would see them in a run.

    Raises:
        ContractError: names the first clause that does not hold.

    Example:
        >>> class Decay:
        ...     def init(self):
        ...         return {"lr": 1.0}
        ...     def update(self, state, observation):
        ...         lr = 0.9 * state["lr"]
        ...         return {"lr": lr}, {"lr": lr}
        >>> check_policy(Decay, [{"loss": 2.0}, {"loss": 1.5}])
    """
    require(len(observations) > 1, "observations", "give at least two, so that resuming can be checked")
    policy = factory()
    require(
        isinstance(policy, Policy),
        "has_the_form",
        f"{type(policy).__name__} has no init() and update(state, observation)",
    )
    state = policy.init()
    require(identical(state, policy.init()), "init_repeats", "two calls of init() gave different states")
    saved, actions = [], []
    for seen in observations:
        saved.append(_round_trip(state))
        kept, kept_seen = copy.deepcopy(state), copy.deepcopy(seen)
        state, action = _update(policy, state, seen, kept, kept_seen)
        actions.append(action)

    other = factory()  # nothing may live in the object: a new policy continues from a saved state
    resumed = saved[len(saved) // 2]
    for seen, expected in zip(observations[len(saved) // 2 :], actions[len(saved) // 2 :], strict=True):
        resumed, action = other.update(resumed, seen)
        require(
            identical(action, expected),
            "resumes",
            f"from a saved state a new policy gave {action}, the one that was saved gave {expected}: "
            "keep everything that the law remembers in its state",
        )


def _update(
    policy: Policy[Any], state: Any, seen: Mapping[str, Any], kept: Any, kept_seen: Mapping[str, Any]
) -> tuple[Any, dict[str, float]]:
    result = policy.update(state, seen)
    require(
        isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict),
        "update_returns_state_and_action",
        f"update returned {result!r}: return (new state, action) with the action as a dict",
    )
    require(
        identical(state, kept) and identical(seen, kept_seen),
        "update_is_pure",
        "update changed the state or the observation it was given: return a new state",
    )
    again = policy.update(kept, seen)
    require(
        identical(again, result), "update_is_pure", "update gave two different answers to the same question"
    )
    for name, value in result[1].items():
        finite = isinstance(value, int | float) and value == value and abs(value) != float("inf")
        require(finite, "action_is_finite", f"the action sets {name} to {value!r}: give a finite number")
    return result


def _round_trip(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ContractError(
            "state_is_plain_data", f"the state holds more than numbers, tensors, dicts and tuples: {error}"
        ) from error
