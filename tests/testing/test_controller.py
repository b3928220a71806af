"""The contract accepts the library's controllers and rejects each of a row of broken ones."""

import math

import pytest
import torch

from bolza.controllers import Controller, PolicyScheduler, StationarityAnnealing
from bolza.core.errors import DivergenceError
from bolza.testing import CONTROLLER_CLAUSES, ContractError, check_controller

SHORT = ["bounds_its_memory"]  # the one clause that takes a thousand steps


def test_a_policy_that_anneals_passes():
    check_controller(
        lambda optimizer: PolicyScheduler(optimizer, StationarityAnnealing(window=4, blocks=4)),
        steps=6,
        without=SHORT,
    )


class Right(Controller):
    """A law that scales updates by what it remembers of them, from which each mutant differs in one thing."""

    def __init__(self, optimizer):
        super().__init__(optimizer, keep_update=True)
        self.mean, self.speed = 0.0, []

    def measure(self):
        return float(sum(g.square().sum() for g in self.gradients()).sqrt())

    def gradients(self):
        return [p.grad for p in self.moving]

    def decide(self, observation):
        size = self.measure() + float(observation["loss"])
        if math.isfinite(size):
            self.mean = 0.8 * self.mean + 0.2 * size
        if not self.speed:
            self.speed = [torch.ones_like(p) for p in self.moving]
        for s in self.speed:
            s.mul_(0.99)
        self.scale_update_(self.moving, self.speed)
        return {"lr": float(self.optimizer.param_groups[0]["lr"]) / (1 + 0.001 * min(self.mean, 1.0))}

    def log(self):
        return {"mean": self.mean}

    def memory(self):
        return {"mean": self.mean, "speed": self.speed}

    def load_memory(self, memory):
        self.mean, self.speed = memory["mean"], memory["speed"]


class Measures(Right):
    """Looks at the network itself, properly."""

    def __init__(self, optimizer, model, loss, data):
        super().__init__(optimizer)
        self.model, self.loss, self.data = model, loss, data

    @torch.no_grad()
    def measure(self):
        modes = [layer.training for layer in self.model.modules()]
        self.model.eval()
        outputs = self.model(self.data.train_x)
        for layer, mode in zip(self.model.modules(), modes, strict=True):
            layer.training = mode
        return float(self.loss(outputs, self.data.train_y))


def test_a_law_that_scales_updates_passes():
    check_controller(Right, without=SHORT, steps=6)


def test_the_history_of_a_long_run_is_bounded():
    class Idle(Controller):
        def decide(self, observation):
            return {}

    check_controller(Idle, without=CONTROLLER_CLAUSES.keys() - SHORT)


def test_a_controller_that_takes_the_model_passes_and_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    check_controller(Measures, takes_model=True, without=SHORT, steps=6)
    assert torch.equal(before, torch.get_rng_state())


def test_a_law_that_raises_on_nan_and_names_the_step_passes():
    class Raises(Right):
        def measure(self):
            size = super().measure()
            if not math.isfinite(size) and self.moved:
                raise DivergenceError(f"the gradient is not finite at step {self.count}", step=self.count)
            return size

    check_controller(Raises, without=SHORT, steps=6)


class NoState(Right):
    state_dict = property()


class TakesNoLoss(Right):
    def step(self):
        return {}


class Unseeded(Right):
    def measure(self):
        draw = torch.Generator()
        draw.seed()
        return super().measure() + float(torch.rand((), generator=draw))


class WritesFloats(Right):
    def _write(self, key, value):
        for group in self.optimizer.param_groups:
            group[key] = value * float(group[key]) / float(self.optimizer.param_groups[0][key])


class ActsInFloat32(Right):
    def decide(self, observation):
        action = super().decide(observation)
        for p in self.moving:
            p.data = p.data.float()
        return action


class FirstGroupOnly(Right):
    def _write(self, key, value):
        group = self.optimizer.param_groups[0]
        group[key] = group[key].fill_(value) if isinstance(group[key], torch.Tensor) else value


class DecaysAll(Right):
    @torch.no_grad()
    def decide(self, observation):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        return super().decide(observation)


class LeavesTheMode(Measures):
    @torch.no_grad()
    def measure(self):
        self.model.eval()
        return float(self.loss(self.model(self.data.train_x), self.data.train_y))


class MovesStatistics(Measures):
    @torch.no_grad()
    def measure(self):
        with torch.random.fork_rng():
            return float(self.loss(self.model(self.data.train_x), self.data.train_y))


class DrawsGlobally(Right):
    def measure(self):
        return super().measure() + float(torch.rand(())) * 1e-9


class KeepsGradient(Right):
    """Looks at the last step's gradient through a reference to it."""

    last = None

    def gradients(self):
        now, self.last = self.last or super().gradients(), super().gradients()
        return now

    def memory(self):
        return {**super().memory(), "last": self.last}

    def load_memory(self, memory):
        super().load_memory(memory)
        self.last = memory["last"]


class RoundsTensors(Right):
    def decide(self, observation):
        loss = observation["loss"]
        return super().decide({"loss": loss.half() if isinstance(loss, torch.Tensor) else loss})


class LogsNan(Right):
    def log(self):
        return {"mean": math.nan if self.count < 5 else self.mean}


class LogsAtTimes(Right):
    def log(self):
        return {"mean": self.mean} if self.count % 2 else {}


class KeepsAll(Right):
    def memory(self):
        return {**super().memory(), "sizes": [0.0] * self.count}


class NeedsAnUpdate(Right):
    def step(self, **observation):
        self.moved = True
        return super().step(**observation)


class ActsWithoutUpdate(Right):
    @torch.no_grad()
    def step(self, **observation):
        for p in self.moving:
            p.mul_(0.999)
        return super().step(**observation)


class RemembersInfinity(Right):
    def step(self, **observation):
        if self.moving and not self.moved:
            self.mean = self.measure()
        return super().step(**observation)


class RemembersNan(Right):
    def decide(self, observation):
        action = super().decide(observation)
        self.mean += 0.0 * self.measure()
        return action


class HoldsOn(Right):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        optimizer.register_step_post_hook(lambda *_: self.mean)


class SavesAnObject(Right):
    def memory(self):
        return {**super().memory(), "owner": KeepsAll}


class SharesTensors(Right):
    def state_dict(self):
        return {**super().state_dict(), "memory": self.memory()}


class ForgetsPart(Right):
    def load_memory(self, memory):
        self.speed = memory["speed"]


class KeepsItBesides(Right):
    """What it depends on is not in its state."""

    def decide(self, observation):
        self.times = getattr(self, "times", 0) + 1
        action = super().decide(observation)
        return action if self.times % 5 else {}


MUTANTS = {
    NoState: "has_the_form",
    TakesNoLoss: "has_the_form",
    Unseeded: "repeats",
    WritesFloats: "fits_any_optimizer",
    ActsInFloat32: "fits_any_optimizer",
    FirstGroupOnly: "keeps_ratios",
    DecaysAll: "leaves_the_others_alone",
    LeavesTheMode: "leaves_the_run_alone",
    MovesStatistics: "leaves_the_run_alone",
    DrawsGlobally: "leaves_the_run_alone",
    KeepsGradient: "takes_either_way_of_clearing",
    RoundsTensors: "takes_a_loss_of_either_kind",
    LogsNan: "logs_finite_numbers",
    LogsAtTimes: "logs_finite_numbers",
    KeepsAll: "bounds_its_memory",
    NeedsAnUpdate: "survives_a_skipped_step",
    ActsWithoutUpdate: "survives_a_skipped_step",
    RemembersInfinity: "survives_a_skipped_step",
    RemembersNan: "keeps_nan_out",
    HoldsOn: "lets_go",
    SavesAnObject: "is_saved_whole",
    SharesTensors: "is_saved_whole",
    ForgetsPart: "is_saved_whole",
    KeepsItBesides: "resumes_bit_for_bit",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_controller_fails_on_the_clause_it_breaks(mutant):
    others = CONTROLLER_CLAUSES.keys() - {MUTANTS[mutant]}
    with pytest.raises(ContractError) as caught:
        check_controller(mutant, takes_model=issubclass(mutant, Measures), steps=8, without=others)
    assert caught.value.clause == MUTANTS[mutant]


def test_every_clause_has_a_mutant():
    assert set(MUTANTS.values()) == set(CONTROLLER_CLAUSES)


def test_a_clause_can_be_left_out_by_name_and_a_wrong_name_or_too_short_a_run_is_refused():
    with pytest.raises(ContractError):
        check_controller(FirstGroupOnly, without=SHORT, steps=6)
    with pytest.raises(ValueError, match="'ratios'"):
        check_controller(Right, without=["ratios"])
    with pytest.raises(ValueError, match="steps=2"):
        check_controller(Right, steps=2)
