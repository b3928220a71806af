r"""Population descent: members train, the worst become mutated copies of others.

    round:  every member: gradient steps;  f_i = 2/(2 + validation loss_i)
            the worst M ← copies of parents drawn with P ∝ f:
                θ ← θ + s N(0, σ²),   h ← h · 2^{N(0, (γ s)²)},   s = 1 − f_parent
            (none after the last round)

The mutation dies out as losses fall: what is left is a schedule of the learning rate that nobody wrote, read off the
ancestors of the winner.

Reference: Pomalapally, El Mabsout & Mancuso (2023), *Population Descent: A Natural-Selection Based Hyper-Parameter
Tuning Framework*, arXiv:2310.14671. Departures from the released program: the mutated learning rate is that of the
optimizer (there it multiplies the loss, to which Adam is blind); noise is drawn for every weight (there one number for
all); the optimizer's state is copied with the weights (there parent and child share one optimizer); selection sees the
validation part only, and the result is told on a third one.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bolza.controllers.log_prior import LogPrior
from bolza.controllers.population_member import (
    Job,
    Member,
    evaluate,
    new_member,
    train_member,
)
from bolza.core.errors import ArgumentError, CheckpointError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.data import hold_out
from bolza.training import InterruptGuard, default_loss, load_tree, save_tree
from bolza.training.checkpoint import check_writable, discard_partial

if TYPE_CHECKING:
    from bolza.data import Dataset

__all__ = ["PopDescent", "PopulationRun", "selection_probabilities", "validation_fitness"]

REFERENCE = Reference(
    "pomalapally2023population",
    "Pomalapally, Abhinav and El Mabsout, Bassel and Mancuso, Renato",
    "Population Descent: A Natural-Selection Based Hyper-Parameter Tuning Framework",
    2023,
    arxiv="2310.14671",
)

Progress = Callable[[int, int, Mapping[str, float]], object]


@cites(REFERENCE)
def validation_fitness(loss: float) -> float:
    """Fitness of a member: f = 2/(2 + loss), 1 for a loss of 0 and 0 for one that is not finite.

    Args:
        loss: validation loss, not negative.

    Returns:
        f in [0, 1].

    Raises:
        ArgumentError: the loss is negative.

    Example:
        >>> validation_fitness(0.0), validation_fitness(2.0), validation_fitness(math.inf)
        (1.0, 0.5, 0.0)
    """
    if loss < 0:
        raise ArgumentError(
            f"loss={loss} is negative, where 2/(2 + loss) is no fitness: give PopDescent(fitness=)"
        )
    return 2 / (2 + loss) if math.isfinite(loss) else 0.0


def selection_probabilities(fitness: Sequence[float]) -> Tensor:
    """Probability of each member to be a parent, P_i = f_i / Σ f.

    Args:
        fitness: f of each member, not negative.

    Returns:
        Float64 tensor.

    Raises:
        ArgumentError: a fitness is negative or not finite.
        DivergenceError: no member is fit.

    Example:
        >>> selection_probabilities([3.0, 1.0, 0.0])
        tensor([0.7500, 0.2500, 0.0000], dtype=torch.float64)
    """
    values = torch.tensor(list(fitness), dtype=torch.float64)
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ArgumentError(
            f"fitness={values.tolist()} must be finite and not negative: it is a share of the chances"
        )
    if not bool((values > 0).any()):
        raise DivergenceError(
            "no member of the population has a finite validation loss: lower the learning rates of the prior, or "
            "bound them with LogPrior(..., high=)"
        )
    return values / values.sum()


@dataclass(frozen=True)
class PopulationRun:
    """What a population did.

    Attributes:
        status: ``"finished"`` or ``"interrupted"``.
        model: the member of the lowest validation loss after the last round.
        best: its number.
        validation_loss: ``rounds × members``, after each round.
        hyper: by name, ``rounds × members``: the values of each round.
        parents: ``rounds × members``: whose copy trained in the slot after this round; the slot's own number if kept.
        test_loss: loss of ``model`` on the test part, which took no part in anything; nan without one.
        test_accuracy: share of right answers there.
        gradients: gradients computed, all members together.
        seconds: time taken, earlier parts of a resumed run included.
    """

    status: str
    model: nn.Module = field(repr=False)
    best: int
    validation_loss: list[list[float]]
    hyper: dict[str, list[list[float]]]
    parents: list[list[int]]
    test_loss: float
    test_accuracy: float
    gradients: int
    seconds: float

    def lineage(self, member: int | None = None) -> list[int]:
        """Slots of the ancestors of a member of the last round, first round first; of the best one by default."""
        slot = self.best if member is None else member
        slots = [slot]
        for parents in reversed(self.parents[: len(self.validation_loss) - 1]):
            slot = parents[slot]
            slots.append(slot)
        return slots[::-1]

    def schedule(self, name: str, member: int | None = None) -> list[float]:
        """The values of a hyper-parameter along :meth:`lineage`: the schedule that selection found."""
        return [self.hyper[name][r][slot] for r, slot in enumerate(self.lineage(member))]


@cites(REFERENCE)
class PopDescent:
    r"""Train a population whose worst members become mutated copies of good ones: learning rates without a search.

    Args:
        make_model: makes one network; called under a seed of its own for every member.
        data: a :class:`bolza.data.Dataset`; its test part is looked at once, at the end.
        hyper: prior of each hyper-parameter by its name in the optimizer's groups.
        optimizer: name, class or function of the parameters, see :func:`bolza.training.make_optimizer`.
        loss: (outputs, targets) → mean over samples, not negative; by the task where it is left out.
        members: size N of the population.
        replaced: how many of the worst are replaced, M; 0 is a random search.
        rounds: rounds of local training.
        steps: gradient steps of each member in a round.
        final_steps: steps of everyone after the last selection, beyond ``rounds``.
        batch_size: samples a step.
        mutation: γ, scale of the mutation of hyper-parameters.
        weight_noise: σ, scale of the mutation of weights.
        validation: share of the training samples that selection looks at, or a pair (x, y) of its own.
        fitness: loss → f in [0, 1].
        seed: of everything.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: Pomalapally et al. (2023); defaults and algorithm are theirs, departures in the module's text.

    Example:
        >>> from bolza.data import digits
        >>> prior = {"lr": LogPrior(-2, 1)}
        >>> search = PopDescent(
        ...     lambda: nn.Linear(64, 10), digits(), hyper=prior, members=3, replaced=1, rounds=3, steps=8
        ... )
        >>> run = search.run()
        >>> run.gradients, len(run.schedule("lr")), run.test_accuracy > 0.7
        (72, 3, True)
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        data: Dataset,
        *,
        hyper: Mapping[str, LogPrior],
        optimizer: Any = "sgd",
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        members: int = 5,
        replaced: int = 2,
        rounds: int = 50,
        steps: int = 128,
        final_steps: int = 0,
        batch_size: int = 64,
        mutation: float = 15.0,
        weight_noise: float = 0.01,
        validation: float | tuple[Tensor, Tensor] = 0.2,
        fitness: Callable[[float], float] = validation_fitness,
        seed: int = 0,
    ) -> None:
        if isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                "optimizer is one instance: give its class or a function, each member makes its own"
            )
        for name, value, least in (
            ("members", members, 1),
            ("rounds", rounds, 1),
            ("steps", steps, 1),
            ("final_steps", final_steps, 0),
            ("batch_size", batch_size, 1),
            ("replaced", replaced, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name}={value!r} must be a whole number, at least {least}")
        if isinstance(make_model, nn.Module) or not callable(make_model):
            raise ArgumentError(
                "make_model is no function: give one that makes a network, as lambda: nn.Linear(64, 10)"
            )
        for name, prior in hyper.items():
            if not isinstance(prior, LogPrior):
                raise ArgumentError(
                    f"hyper[{name!r}]={prior!r} is no prior: give a LogPrior, as LogPrior(-2, 1)"
                )
        if replaced >= members and replaced:
            raise ArgumentError(f"replaced={replaced} must be below members={members}: someone has to stay")
        if not (mutation >= 0 and weight_noise >= 0):
            raise ArgumentError(f"mutation={mutation} and weight_noise={weight_noise} must not be negative")
        train, held = _parts(data, validation, seed)
        self.job = Job(make_model, optimizer, loss or default_loss(data.task), train, held, batch_size, seed)
        self.test = (data.test_x, data.test_y)
        self.hyper, self.fitness = dict(hyper), fitness
        self.members, self.replaced, self.rounds, self.steps = members, replaced, rounds, steps
        self.final_steps, self.mutation, self.weight_noise, self.seed = (
            final_steps,
            mutation,
            weight_noise,
            seed,
        )

    def run(
        self,
        *,
        jobs: int = 1,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> PopulationRun:
        """Train the population.

        Repeats from its seed, with any number of jobs too where PyTorch has one thread (``torch.set_num_threads(1)``;
        processes share the cores, and threads change the order of sums). Ctrl-C ends it after the member in progress,
        with the last whole round in hand, and a run that goes on from its checkpoint ends as one that never stopped.

        Args:
            jobs: processes, through joblib; -1 uses every core. The data travel to each of them once a round. Networks
                on a GPU are trained one after another.
            checkpoint: file that is rewritten after every round; must not exist unless ``resume``.
            resume: go on from ``checkpoint``.
            progress: called with (gradients done, gradients in all, ``{"round", "validation_loss"}``).

        Returns:
            PopulationRun.

        Raises:
            ArgumentError: ``jobs`` is 0, a name in ``hyper`` is not known, or there is nothing to resume from.
            CheckpointError: the file exists, is damaged, or is that of another search.
            DivergenceError: no member is left with a finite loss.
        """
        if jobs == 0 or jobs < -1:
            raise ArgumentError(f"jobs={jobs} must be a number of processes, or -1 for all cores")
        state = self._begin(checkpoint, resume)
        if any(isinstance(v, Tensor) and v.is_cuda for v in state["members"][0]["model"].values()):
            jobs = 1  # one device
        started, before = time.perf_counter(), state["seconds"]
        status = "finished"
        phases = [self.steps] * self.rounds + [self.final_steps] * bool(self.final_steps)
        total = sum(phases) * self.members
        with InterruptGuard() as guard, _Pool(jobs, self.job) as pool:
            try:
                while state["round"] < len(phases) and not guard.requested:
                    trained = pool.train(state, phases[state["round"]], guard)
                    if trained is None:
                        break
                    self._end_round(state, trained)
                    state["seconds"] = before + time.perf_counter() - started
                    if checkpoint is not None:
                        save_tree(state, checkpoint)
                    if progress is not None:
                        best = min(state["validation_loss"][-1])
                        done = sum(phases[: state["round"]]) * self.members
                        progress(done, total, {"round": state["round"], "validation_loss": best})
            except KeyboardInterrupt:
                pass
        if state["round"] < len(phases):
            status = "interrupted"
        return self._result(state, status, sum(phases[: state["round"]]) * self.members)

    # ------------------------------------------------------------------------------- the rounds

    def _begin(self, checkpoint: Any, resume: bool) -> dict[str, Any]:
        if resume and checkpoint is None:
            raise ArgumentError("resume=True needs the file to go on from: pass checkpoint=")
        if checkpoint is not None:
            check_writable(checkpoint)
            discard_partial(checkpoint)
            if os.path.exists(checkpoint) and not resume:
                raise CheckpointError(
                    f"the checkpoint {str(checkpoint)!r} exists: pass resume=True to go on from it, or name "
                    "another file"
                )
        if resume:
            state = load_tree(checkpoint)
            found = state.get("settings", {}) if isinstance(state, dict) else {}
            wrong = [name for name, value in self._settings().items() if found.get(name) != value]
            if wrong:
                raise CheckpointError(
                    f"{str(checkpoint)!r} belongs to another search: it differs in {', '.join(wrong)}"
                )
            try:
                self.job.model(state["members"][0]["model"])
            except RuntimeError as error:
                raise CheckpointError(
                    f"{str(checkpoint)!r} belongs to a search of other networks: {error}"
                ) from error
            return dict(state)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [{n: prior.draw(generator) for n, prior in self.hyper.items()} for _ in range(self.members)]
        return {
            "settings": self._settings(),
            "round": 0,
            "members": [new_member(self.job, i, hyper) for i, hyper in enumerate(drawn)],
            "generator": generator.get_state(),
            "validation_loss": [],
            "hyper": {name: [] for name in self.hyper},
            "parents": [],
            "seconds": 0.0,
        }

    def _settings(self) -> dict[str, Any]:
        names = ("members", "replaced", "rounds", "steps", "final_steps", "mutation", "weight_noise", "seed")
        priors = {name: repr(prior) for name, prior in self.hyper.items()}
        parts, optimizer = (*self.job.train, *self.job.validation), self.job.optimizer
        shapes = [[*part.shape, float(part.double().sum())] for part in parts]
        return {n: getattr(self, n) for n in names} | {
            "hyper": priors,
            "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__qualname__", ""),
            "batch_size": self.job.batch_size,
            "data": shapes,
        }

    def _end_round(self, state: dict[str, Any], trained: list[tuple[Member, float]]) -> None:
        """Record what was reached, then let the best have offspring, unless this was the last round."""
        members = [member for member, _ in trained]
        losses = [loss for _, loss in trained]
        state["validation_loss"].append(losses)
        for name in self.hyper:
            state["hyper"][name].append([member["hyper"][name] for member in members])
        state["round"] += 1
        generator = torch.Generator()
        generator.set_state(state["generator"])
        parents = list(range(self.members))
        if self.replaced and state["round"] < self.rounds:
            parents = self._replace(members, losses, generator)
        state["members"], state["parents"] = members, [*state["parents"], parents]
        state["generator"] = generator.get_state()

    def _replace(self, members: list[Member], losses: list[float], generator: torch.Generator) -> list[int]:
        fitness = [float(self.fitness(loss)) for loss in losses]
        chances = selection_probabilities(fitness)
        drawn = torch.multinomial(chances, self.replaced, replacement=True, generator=generator).tolist()
        worst = sorted(range(self.members), key=lambda i: (fitness[i], -i))[: self.replaced]
        children = [self._child(members[parent], 1 - fitness[parent], generator) for parent in drawn]
        parents = list(range(self.members))
        for slot, parent, child in zip(worst, drawn, children, strict=True):
            parents[slot] = parent
            members[slot] = child | {"order": members[slot]["order"]}
        return parents

    @torch.no_grad()
    def _child(self, parent: Member, strength: float, generator: torch.Generator) -> Member:
        strength = min(max(strength, 0.0), 1.0)
        model = self.job.model(parent["model"])
        for p in model.parameters():  # a weight that two layers share is moved once
            if p.requires_grad:
                noise = torch.randn(p.shape, dtype=torch.float32, generator=generator)
                p.add_(noise.to(p), alpha=strength * self.weight_noise)
        hyper = {
            name: prior.mutate(parent["hyper"][name], self.mutation * strength, generator)
            for name, prior in self.hyper.items()
        }
        return copy.deepcopy(parent) | {"model": copy.deepcopy(model.state_dict()), "hyper": hyper}

    def _result(self, state: dict[str, Any], status: str, gradients: int) -> PopulationRun:
        losses = state["validation_loss"][-1] if state["validation_loss"] else [math.inf] * self.members
        best = min(range(self.members), key=losses.__getitem__)
        # the best member is never replaced, so that after an interruption its slot still holds what was measured
        model = self.job.model(state["members"][best]["model"])
        test = evaluate(self.job, model, self.test) if len(self.test[1]) else (math.nan, math.nan)
        return PopulationRun(
            status=status,
            model=model,
            best=best,
            validation_loss=state["validation_loss"],
            hyper=state["hyper"],
            parents=state["parents"],
            test_loss=test[0],
            test_accuracy=test[1],
            gradients=gradients,
            seconds=state["seconds"],
        )


class _Pool:
    """Trains the members of a round, here or in processes that stay for the whole run."""

    def __init__(self, jobs: int, job: Job) -> None:
        self.job = job
        self.parallel: Any = None
        if jobs != 1:
            from joblib import Parallel

            self.parallel = Parallel(n_jobs=jobs)

    def __enter__(self) -> _Pool:
        if self.parallel is not None:
            self.parallel.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.parallel is not None:
            self.parallel.__exit__(*error)

    def train(
        self, state: dict[str, Any], steps: int, guard: InterruptGuard
    ) -> list[tuple[Member, float]] | None:
        round_, members = state["round"], state["members"]
        if self.parallel is not None:
            from joblib import delayed

            work = delayed(_in_a_process)
            return list(self.parallel(work(self.job, m, i, round_, steps) for i, m in enumerate(members)))
        trained = []
        for i, member in enumerate(members):
            if guard.requested:
                return None
            trained.append(train_member(self.job, member, i, round_, steps))
        return trained


def _in_a_process(*task: Any) -> tuple[Member, float]:
    """Leave Ctrl-C to the parent."""
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return train_member(*task)


def _parts(
    data: Dataset, validation: float | tuple[Tensor, Tensor], seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = data.train_x, data.train_y
    if isinstance(validation, tuple):
        if not len(validation[1]):
            raise ArgumentError("validation holds no samples: selection needs some")
        return (x, y), validation
    if not 0 < validation < 1:
        raise ArgumentError(f"validation={validation} must be a share between 0 and 1, or a pair (x, y)")
    kept, held = hold_out(y, validation, seed, data.task == "classification")
    if not len(held) or not len(kept):
        raise ArgumentError(
            f"validation={validation} leaves {len(kept)} samples to learn from and {len(held)} to select on: give "
            "a pair (x, y)"
        )
    return (x[kept], y[kept]), (x[held], y[held])
