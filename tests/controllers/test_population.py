"""Population descent: the rules, and a search that repeats, resumes and survives what goes wrong."""

import math
import os
import signal

import joblib
import pytest
import torch
from torch import nn

from bolza.controllers import LogPrior, PopDescent, selection_probabilities, validation_fitness
from bolza.controllers.population_member import Job, derived_seed, new_member, train_member
from bolza.core.errors import ArgumentError, CheckpointError, DivergenceError
from bolza.data import Dataset
from bolza.training import BatchOrder

PRIOR = {"lr": LogPrior(-2, 1)}


def blobs(classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 4, generator=generator)
    y = torch.arange(90) % classes
    x = centres[y] + torch.randn(90, 4, generator=generator)
    return Dataset(x[:60], y[:60], x[60:], y[60:])


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def search(make=net, data=None, hyper=PRIOR, **settings):
    settings = {"optimizer": momentum, "rounds": 4, "steps": 4, "batch_size": 8, "members": 4} | settings
    return PopDescent(make, data or blobs(), hyper=hyper, **settings)


def weights(run):
    return torch.cat([v.flatten().double() for v in run.model.state_dict().values()])


# --------------------------------------------------------------------------------------- the rules


def test_fitness_and_chances_are_those_of_the_paper():
    assert [validation_fitness(x) for x in (0.0, 0.5, 2.0)] == [1.0, 0.8, 0.5]
    assert validation_fitness(math.nan) == 0.0
    chances = selection_probabilities([validation_fitness(x) for x in (2.0, math.inf, 0.0)])
    assert chances.tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])
    with pytest.raises(ArgumentError, match="fitness="):
        validation_fitness(-0.1)
    with pytest.raises(DivergenceError, match="LogPrior"):
        selection_probabilities([0.0, 0.0])


def test_draws_are_lognormal_and_mutations_are_powers_of_two():
    generator = torch.Generator().manual_seed(0)
    prior = LogPrior(-4, 2)
    draws = torch.tensor([math.log10(prior.draw(generator)) for _ in range(4000)])
    assert abs(draws.mean() + 4) < 4 * 2 / 4000**0.5 and abs(draws.std() - 2) < 4 * 2 / 8000**0.5
    factors = torch.tensor([math.log2(prior.mutate(0.3, 1.5, generator) / 0.3) for _ in range(4000)])
    assert abs(factors.mean()) < 4 * 1.5 / 4000**0.5 and abs(factors.std() - 1.5) < 4 * 1.5 / 8000**0.5
    assert prior.mutate(0.3, 0.0, generator) == pytest.approx(0.3)


def test_bounds_hold_and_a_complement_stays_below_one():
    generator = torch.Generator().manual_seed(0)
    bounded = LogPrior(-2, 3, low=1e-3, high=0.1)
    values = [bounded.mutate(bounded.draw(generator), 5.0, generator) for _ in range(200)]
    assert min(values) == 1e-3 and max(values) == 0.1
    momenta = [LogPrior(-1, 1, complement=True).draw(generator) for _ in range(200)]
    assert 0 <= min(momenta) and max(momenta) < 1
    assert sum(m > 0.9 for m in momenta) == pytest.approx(100, abs=30)
    with pytest.raises(ArgumentError, match="spread=-1"):
        LogPrior(0, -1)


def test_a_child_is_its_parent_with_noise_on_every_weight_and_a_copy_of_the_optimizer():
    population = search(lambda: nn.Linear(200, 100), weight_noise=0.01, mutation=15.0)
    parent = new_member(population.job, 0, {"lr": 0.1})
    momenta = {"state": {0: {"momentum_buffer": torch.ones(100, 200)}}, "param_groups": []}
    parent["optimizer"] = momenta
    child = population._child(parent, 0.4, torch.Generator().manual_seed(0))
    noise = (child["model"]["weight"] - parent["model"]["weight"]).flatten()
    assert noise.std() == pytest.approx(0.004, rel=0.03) and noise.unique().numel() > 10_000
    assert abs(noise.mean()) < 4 * 0.004 / 20_000**0.5
    assert child["hyper"]["lr"] != 0.1
    copied = child["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(copied, torch.ones(100, 200))
    assert copied.data_ptr() != momenta["state"][0]["momentum_buffer"].data_ptr()
    same = population._child(parent, 0.0, torch.Generator())
    assert torch.equal(same["model"]["weight"], parent["model"]["weight"])
    assert same["hyper"]["lr"] == pytest.approx(0.1)


def test_a_weight_that_two_layers_share_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    population = search(Tied)
    child = population._child(new_member(population.job, 0, {"lr": 0.1}), 1.0, torch.Generator())
    assert torch.equal(child["model"]["one.weight"], child["model"]["two.weight"])


# ------------------------------------------------------------------------------------------ a round


def test_a_member_s_rounds_are_ordinary_training():
    data = blobs()
    job = Job(lambda: nn.Linear(4, 3), momentum, nn.functional.cross_entropy, (data.train_x, data.train_y),
              (data.test_x, data.test_y), 8, seed=5)  # fmt: skip
    member = new_member(job, 2, {"lr": 0.05})
    model = nn.Linear(4, 3)
    model.load_state_dict(member["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = BatchOrder(data.train_x, data.train_y, 8, derived_seed(5, 2, 1) % 2**31)
    for round_ in range(3):
        member, loss = train_member(job, member, 2, round_, steps=5)
        for _ in range(5):
            x, y = order.next()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert torch.allclose(member["model"]["weight"], model.weight, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            expected = nn.functional.cross_entropy(model(data.test_x), data.test_y)
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_hyper_parameters_go_to_every_group_in_their_ratios():
    def groups(model):
        weights, biases = (
            [p for p in model.parameters() if p.ndim > 1],
            [p for p in model.parameters() if p.ndim < 2],
        )
        return torch.optim.AdamW(
            [{"params": weights}, {"params": biases, "lr": 0.01}], lr=0.1, weight_decay=0.0
        )

    population = search(
        optimizer=groups, hyper={"lr": LogPrior(-3, 0), "weight_decay": LogPrior(-2, 0)}, rounds=1, members=1,
        replaced=0,
    )  # fmt: skip
    state = population._begin(None, False)
    ((member, _),) = [train_member(population.job, m, 0, 0, 2) for m in state["members"]]
    first, second = member["optimizer"]["param_groups"]
    assert (first["lr"], second["lr"]) == pytest.approx((1e-3, 1e-4))
    assert first["weight_decay"] == second["weight_decay"] == pytest.approx(0.01)


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.LBFGS, "rmsprop"])
def test_any_optimizer_will_do(optimizer):
    run = search(optimizer=optimizer, rounds=2, steps=2, members=2, replaced=1).run()
    assert run.status == "finished" and math.isfinite(run.test_loss)


# ----------------------------------------------------------------------------------------- a search


def test_a_search_repeats_from_its_seed_and_its_record_is_consistent():
    one, two = search(seed=3).run(), search(seed=3).run()
    assert torch.equal(weights(one), weights(two)) and one.hyper == two.hyper
    assert not torch.equal(weights(one), weights(search(seed=4).run()))
    assert one.validation_loss[-1][one.best] == min(one.validation_loss[-1])
    assert one.gradients == 4 * 4 * 4 and len(one.parents) == 4
    kept = one.parents[-1]
    assert kept == [0, 1, 2, 3]  # no child after the last round
    lineage = one.lineage()
    for r, (old, new) in enumerate(zip(lineage[:-1], lineage[1:], strict=True)):
        assert one.parents[r][new] == old
        if old == new:
            assert one.hyper["lr"][r][old] == one.hyper["lr"][r + 1][new]
    replaced = [sum(p != i for i, p in enumerate(parents)) for parents in one.parents[:-1]]
    assert max(replaced) <= 2


def test_without_replacement_it_is_a_random_search_whose_members_are_independent():
    few, many = search(replaced=0, members=2).run(), search(replaced=0, members=3).run()
    assert [row[:2] for row in many.validation_loss] == few.validation_loss
    assert few.parents == [[0, 1]] * 4


def test_a_search_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    whole = search(final_steps=3).run()
    for stop in (1, 3, 4):
        file = tmp_path / f"{stop}.safetensors"

        def interrupt(done, total, values, stop=stop):
            assert 0 < done <= total and math.isfinite(values["validation_loss"])
            if values["round"] == stop:
                os.kill(os.getpid(), signal.SIGINT)

        part = search(final_steps=3).run(checkpoint=file, progress=interrupt)
        assert part.status == "interrupted" and len(part.validation_loss) == stop
        resumed = search(final_steps=3).run(checkpoint=file, resume=True)
        assert torch.equal(weights(resumed), weights(whole))
        assert resumed.validation_loss == whole.validation_loss and resumed.parents == whole.parents
    again = search(final_steps=3).run(checkpoint=file, resume=True)
    assert torch.equal(weights(again), weights(whole)) and again.gradients == whole.gradients
    with pytest.raises(CheckpointError, match="exists"):
        search(final_steps=3).run(checkpoint=file)
    with pytest.raises(CheckpointError, match="seed"):
        search(final_steps=3, seed=1).run(checkpoint=file, resume=True)


def test_members_that_are_trained_in_parallel_come_out_the_same():
    def plain():
        return nn.Linear(4, 3)

    alone = search(plain).run()
    with joblib.parallel_config(backend="threading"):
        together = search(plain).run(jobs=2)
    assert torch.equal(weights(alone), weights(together)) and alone.parents == together.parents


def test_members_that_diverge_are_replaced_and_never_chosen():
    def steep(outputs, y):  # sound at small rates only
        return outputs.double().square().mean()

    run = search(
        lambda: nn.Linear(4, 3, bias=False), loss=steep, hyper={"lr": LogPrior(1, 1.5)}, rounds=5
    ).run()
    losses = run.validation_loss
    assert any(math.isinf(loss) or loss > 1e6 for loss in losses[0])
    for r, parents in enumerate(run.parents[:-1]):
        assert all(math.isfinite(losses[r][p]) for i, p in enumerate(parents) if p != i)
    with pytest.raises(DivergenceError):
        search(lambda: nn.Linear(4, 3), loss=lambda o, y: (o * math.nan).mean()).run()


def test_the_test_part_takes_no_part():
    data = blobs()
    other = Dataset(data.train_x, data.train_y, 100 * data.test_x, data.test_y)
    one, two = search(data=data).run(), search(data=other).run()
    assert torch.equal(weights(one), weights(two)) and one.test_loss != two.test_loss


def test_the_surroundings_stay_as_they_were():
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    handler = signal.getsignal(signal.SIGINT)
    search(rounds=2).run()
    assert torch.equal(torch.rand(2), expected) and signal.getsignal(signal.SIGINT) is handler


def test_what_makes_no_sense_is_refused(tmp_path):
    for settings, match in (
        ({"members": 0}, "members=0"),
        ({"replaced": 4}, "replaced=4"),
        ({"validation": 1.5}, "validation=1.5"),
        ({"validation": 1e-4}, "0 to select on"),
        ({"mutation": -1.0}, "mutation=-1"),
        ({"hyper": {"lr": 0.1}}, "LogPrior"),
        ({"make": torch.nn.Linear(64, 10)}, "make_model"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)])}, "one instance"),
    ):
        with pytest.raises(ArgumentError, match=match):
            search(**settings)
    with pytest.raises(ArgumentError, match="'rate'"):
        search(hyper={"rate": LogPrior(0, 1)}).run()
    with pytest.raises(ArgumentError, match="jobs=0"):
        search().run(jobs=0)
    with pytest.raises(ArgumentError, match="resume"):
        search().run(resume=True)
    with pytest.raises(ArgumentError, match="make_model"):
        search(make=lambda: 3).run()


def test_a_checkpoint_of_another_optimizer_or_other_networks_is_refused(tmp_path):
    path = tmp_path / "search.ckpt"
    search().run(checkpoint=path)
    for settings, match in (
        ({"optimizer": "adam"}, "optimizer"),
        ({"make": lambda: torch.nn.Linear(64, 10, bias=False)}, "other networks"),
    ):
        with pytest.raises(CheckpointError, match=match):
            search(**settings).run(checkpoint=path, resume=True)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_fitness_that_is_no_share_is_refused(bad):
    with pytest.raises(ArgumentError, match="fitness"):
        selection_probabilities([1.0, bad])
