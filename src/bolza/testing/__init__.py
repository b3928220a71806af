"""Contracts that every method must pass, importable by anyone who writes one.

    from bolza.testing import check_optimizer

    def test_my_optimizer_is_one():
        check_optimizer(lambda params: MyOptimizer(params, lr=0.1))

A contract raises `ContractError`, an ``AssertionError`` that names the clause, what was seen and
what usually causes it.
"""

from bolza.testing.clauses import ContractError
from bolza.testing.controller import CONTROLLER_CLAUSES, check_controller
from bolza.testing.optimizer import OPTIMIZER_CLAUSES, check_optimizer
from bolza.testing.policy import check_policy
from bolza.testing.system import check_system

__all__ = [
    "CONTROLLER_CLAUSES",
    "OPTIMIZER_CLAUSES",
    "ContractError",
    "check_controller",
    "check_optimizer",
    "check_policy",
    "check_system",
]
