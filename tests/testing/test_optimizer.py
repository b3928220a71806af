"""The contract accepts torch's own optimizers and rejects each of a row of broken ones."""

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer

from bolza.testing import OPTIMIZER_CLAUSES, ContractError, check_optimizer


@pytest.mark.parametrize(
    "factory",
    [
        lambda params: SGD(params, lr=0.1),
        lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda params: Adam(params, lr=0.01),
        lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, lr=0.001),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "rmsprop"],
)
def test_optimizers_of_torch_pass(factory):
    check_optimizer(factory)


class Plain(Optimizer):
    """A right optimizer, from which each mutant differs in one thing."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def loss_of(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group)
        return loss

    def move(self, p, group):
        p.sub_(group["lr"] * p.grad)


class TakesModel(Plain):
    def __init__(self, model, lr=0.1):
        self.model = model
        super().__init__([p for p in model.parameters() if p.requires_grad], lr)


class Noisy(Plain):
    """Draws from torch's global generator, which the clauses seed: allowed."""

    def move(self, p, group):
        p.sub_(group["lr"] * (p.grad + 1e-3 * torch.randn_like(p)))


def test_an_optimizer_that_takes_the_model_passes():
    check_optimizer(TakesModel, takes_model=True)


def test_an_optimizer_that_draws_from_the_global_generator_passes_and_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    check_optimizer(Noisy)
    assert torch.equal(before, torch.get_rng_state())


class NotAnOptimizer:
    def __init__(self, params):
        self.params = list(params)

    def zero_grad(self, set_to_none=True):
        pass

    def step(self, closure=None):
        pass


class Ascends(Plain):
    def move(self, p, group):
        p.add_(group["lr"] * p.grad)


class Unseeded(Plain):
    def move(self, p, group):
        draw = torch.Generator()
        draw.seed()
        p.sub_(group["lr"] * (p.grad + 0.01 * torch.randn(p.shape, generator=draw, dtype=p.dtype)))


class DecaysUnused(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.1 * group["lr"])
        return loss


class Unshares(TakesModel):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.model.again.weight = torch.nn.Parameter(self.model.again.weight.clone())
        return loss


class Casts(Plain):
    def move(self, p, group):
        p.data = (p - group["lr"] * p.grad).float()


class ChangesGradients(Plain):
    def move(self, p, group):
        p.grad.add_(p, alpha=1e-3)
        super().move(p, group)


class IgnoresClosure(Plain):
    def loss_of(self, closure):
        return None


class ForgetsLoss(Plain):
    def loss_of(self, closure):
        super().loss_of(closure)


class ClosureWithoutGradients(Plain):
    def loss_of(self, closure):
        return None if closure is None else closure()


class FrozenRate(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.lr = lr

    def move(self, p, group):
        p.sub_(self.lr * p.grad)


class FirstGroupOnly(Plain):
    def move(self, p, group):
        p.sub_(self.param_groups[0]["lr"] * p.grad)


class ForgetsMomentum(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.buffers = {}

    def move(self, p, group):
        self.buffers[p] = 0.5 * self.buffers.get(p, torch.zeros_like(p)) + p.grad
        p.sub_(group["lr"] * self.buffers[p])


class ForgetsGenerator(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.draw = torch.Generator().manual_seed(3)

    def move(self, p, group):
        noise = torch.randn(p.shape, generator=self.draw, dtype=p.dtype)
        p.sub_(group["lr"] * (p.grad + 0.01 * noise))


class SavesAnObject(Plain):
    def move(self, p, group):
        self.state[p]["owner"] = ForgetsLoss
        super().move(p, group)


class LastPassOnly(Plain):
    """Uses what the last backward pass brought, not what has been accumulated."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.last = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    p.register_hook(lambda g, p=p: self.last.__setitem__(p, g.clone()))

    def move(self, p, group):
        p.sub_(group["lr"] * self.last.get(p, p.grad))


MUTANTS = {
    NotAnOptimizer: "is_an_optimizer",
    Ascends: "descends",
    Unseeded: "repeats",
    DecaysUnused: "skips_parameters_without_gradient",
    Unshares: "keeps_shared_parameters",
    Casts: "keeps_dtype_and_identity",
    ChangesGradients: "leaves_gradients_alone",
    IgnoresClosure: "accepts_a_closure",
    ForgetsLoss: "accepts_a_closure",
    ClosureWithoutGradients: "accepts_a_closure",
    FrozenRate: "follows_a_scheduler",
    FirstGroupOnly: "respects_groups",
    ForgetsMomentum: "resumes_bit_for_bit",
    ForgetsGenerator: "resumes_bit_for_bit",
    SavesAnObject: "resumes_bit_for_bit",
    LastPassOnly: "accumulates_gradients",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_optimizer_fails_on_the_clause_it_breaks(mutant):
    with pytest.raises(ContractError) as caught:
        check_optimizer(mutant, takes_model=issubclass(mutant, TakesModel))
    assert caught.value.clause == MUTANTS[mutant]


def test_every_clause_has_a_mutant():
    assert set(MUTANTS.values()) == set(OPTIMIZER_CLAUSES)


def test_a_clause_can_be_left_out_by_name_and_a_wrong_name_is_refused():
    check_optimizer(Ascends, without=["descends"])
    with pytest.raises(ValueError, match="'ascends'"):
        check_optimizer(Plain, without=["ascends"])
