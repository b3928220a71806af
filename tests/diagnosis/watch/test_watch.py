import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bolza
from bolza.core.errors import ArgumentError, CheckpointError, DataError
from bolza.data import digits
from bolza.diagnosis.watch.looks import Looks
from bolza.diagnosis.watch.probes import Sharpness
from bolza.diagnosis.watch.series import Series
from bolza.ops.stable_law import stable_noise

DATA = digits()


class Mean(nn.Module):
    """½‖w − x‖² over samples x: a quadratic whose Hessian is the identity, and noise that does not change."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.w - x


def half_square(out, _):
    return 0.5 * out.square().sum(1).mean()


def on_quadratic(steps, *, size=4, lr=0.1, inject=None, make=None, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    x, model = torch.randn(256, size, generator=generator), Mean(size)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr) if make is None else make(model.parameters())
    watch = bolza.Watch(
        model,
        half_square,
        (x, torch.zeros(256)),
        optimizer,
        batch_size=8,
        samples=32,
        **({"every": 400} | settings),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss = half_square(model(x[torch.randint(256, (8,), generator=generator)]), None)
        if not torch.isfinite(loss):
            break
        loss.backward()
        if inject is not None:
            model.w.grad += inject(model.w.shape, generator)
        optimizer.step()
        watch.step(loss=loss)
    return watch


def kinds(watch):
    return [event.kind for event in watch.events]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 10))


def watching(model, **settings):
    return lambda optimizer, steps: bolza.Watch(
        model, None, DATA, optimizer, **({"batch_size": 32} | settings)
    )


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ------------------------------------------------------------------------------------ it only reads


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "ddpnopt"])
def test_a_run_that_is_watched_is_the_run_that_is_not_bit_for_bit(optimizer):
    ends, draws = [], []
    for callback in (None, watching):
        torch.manual_seed(1)
        model = net()
        made = None if callback is None else callback(model, every=4, samples=16)
        bolza.training.train(
            model, DATA, optimizer=optimizer, lr=0.05, steps=12, batch_size=32, seed=3, callback=made
        )
        ends.append(model)
        draws.append(torch.rand(3))
    assert equal(*ends) and torch.equal(*draws)


def test_a_reading_leaves_gradients_buffers_mode_and_random_state_as_they_are():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = bolza.Watch(model, None, DATA, optimizer, batch_size=32, samples=32)
    F.cross_entropy(model(DATA.train_x[:32]), DATA.train_y[:32]).backward()
    before = copy.deepcopy([model.state_dict(), [p.grad for p in model.parameters()]])
    versions, state = [p._version for p in model.parameters()], torch.get_rng_state()
    watch.step()
    watch.measure()
    now = [model.state_dict(), [p.grad for p in model.parameters()]]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), now[0].values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[1], now[1], strict=True))
    assert versions == [p._version for p in model.parameters()] and torch.equal(state, torch.get_rng_state())
    assert model.training and set(watch.record().readings) >= {"sharpness", "noise"}
    assert not {"sharpness", "noise"} & set(watch.record().unavailable)


# -------------------------------------------------------------------------------- what it reads is right


def test_sharpness_noise_and_temperature_of_a_quadratic_are_the_known_ones():
    watch = on_quadratic(8, size=6, lr=0.2, every=8)
    record = watch.record()
    sharp, noise = record.readings["sharpness"][-1], record.readings["noise"][-1]
    assert sharp["value"] == pytest.approx(1, abs=1e-5) and sharp["bound"] == pytest.approx(10)
    assert sharp["fraction"] == pytest.approx(0.1, abs=1e-6)
    x, _ = watch._batch
    assert noise["trace"] == pytest.approx(float(x.var(0, unbiased=False).sum()), rel=1e-5)
    assert noise["temperature"] == pytest.approx(0.2 / 16)
    assert noise["excess_loss"] == pytest.approx(0.2 * noise["trace"] / (4 * 8))  # (lr/4B) tr Σ


def test_the_sharpness_of_a_network_is_the_largest_eigenvalue_of_its_dense_hessian_once_it_is_followed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watch = bolza.Watch(model, F.mse_loss, (x, y), optimizer, samples=40)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        watch.step()
    for _ in range(4):
        watch.measure()
    params = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params])

    def objective(theta):
        parts = theta.split([p.numel() for p in params])
        named = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, named, (x,)), y)

    hessian = torch.func.hessian(objective)(flat)
    root = torch.cat(
        [
            (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5)).sqrt().add(1e-8).rsqrt().reshape(-1)
            for p in params
        ]
    )
    preconditioned = torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1] / (1 - 0.9**5)
    reading = watch.record().readings["sharpness"][-1]
    assert reading["value"] == pytest.approx(float(preconditioned), rel=2e-2)
    assert reading["fraction"] == pytest.approx(reading["value"] * 1e-3 * 0.1 / 3.8, rel=1e-9)


# ------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("lr", [2.3, 3.2])
def test_a_rate_above_the_limit_is_called_unstable_before_the_run_diverges(lr):
    watch = on_quadratic(2000, lr=lr, every=64)
    event = watch.events[0]
    assert event.kind == "unstable" and event.lasts and event.step <= 24
    assert watch.count > 1.8 * event.step  # it diverged only later
    assert "stationary" not in kinds(watch)


def test_at_the_limit_with_a_level_loss_the_rate_to_stay_below_is_told_and_a_rising_loss_makes_it_unstable():
    for rise, kind in ((0.0, "edge"), (0.1, "unstable")):
        watch = on_quadratic(1, lr=1.8)
        for i in range(24):
            watch._recent.append(1.0 + rise * i)
        watch._judge_sharpness(Sharpness(1.2, 0.01, 1.08, 0.01, 1.11), 1.8, "2/lr")
        (event,) = watch.events
        assert event.kind == kind and "1.7" in event.remedy and event.value == 1.08  # 1.8/1.08
        watch._judge_sharpness(Sharpness(0.5, 0.01, 0.45, 0.01, 1.11), 1.8, "2/lr")
        assert watch.events[0].until == watch.count


def test_at_rest_on_a_quadratic_the_run_is_stationary_and_nothing_else_is_said():
    watch = on_quadratic(700, every=400)
    assert kinds(watch)[-1] == "stationary" and watch.record().lasting("stationary") is not None
    assert not {"unstable", "edge", "heavy-tailed", "loops"} & set(kinds(watch))
    assert watch.record().readings["drift"][-1]["limit"] == pytest.approx(2.445, abs=1e-3)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_at_rest_both_sides_of_the_identity_agree_and_have_the_value_of_the_quadratic(mu):
    """On ½‖w − x‖² with noise s² both are E‖w − x̄‖² = η s² (1 + μ)/((1 − μ)(2(1 + μ) − η))."""
    lr, samples = 0.2, 8
    watch = on_quadratic(
        420, size=200, lr=lr, make=lambda p: torch.optim.SGD(p, lr=lr, momentum=mu), every=400
    )
    record = watch.record()
    sides = record.readings["drift"][-1]["balance"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 200, generator=generator)
    noise = float(x.var(0, unbiased=False).sum()) / samples
    variance = lr * noise * (1 + mu) / ((1 - mu) * (2 * (1 + mu) - lr))  # E‖w − mean‖²
    # E[θ·∇f] = E‖w − mean‖², plus mean·E(w − mean), which is 0
    assert sides["gain"] == pytest.approx(variance, abs=5 * sides["gain_error"])
    assert sides["noise"] == pytest.approx(variance, abs=5 * sides["noise_error"])
    assert sides["noise_error"] < 0.05 * variance
    assert "(lr/2)(1+μ)‖v‖²" in str(record)


def test_an_optimizer_with_another_identity_is_not_given_the_one_of_gradient_descent():
    watch = on_quadratic(400, make=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), every=400)
    assert watch.record().readings["drift"][-1]["balance"] is None


def test_stable_noise_is_called_heavy_tailed_and_gaussian_noise_of_its_size_is_not():
    def heavy(shape, generator):
        return 2 * stable_noise(shape, 1.3, generator=generator)

    def gaussian(shape, generator):
        return 2 * math.sqrt(2) * torch.randn(shape, generator=generator)

    found = on_quadratic(900, size=100, inject=heavy)
    event = next(e for e in found.events if e.kind == "heavy-tailed")
    assert abs(event.value - 1.3) < 4 * event.error and event.error < 0.2
    assert "heavy-tailed" not in kinds(on_quadratic(450, size=100, inject=gaussian))


def synthetic(rows, columns):
    series = Series(columns)
    for step, row in enumerate(rows, 1):
        series.add(step, (float(row[0]), 0.1), row[1:])
    return series


def test_false_alarms_of_tails_and_loops_stay_within_their_level_on_gaussian_runs():
    """Sixty runs at rest, of memory 5, with noise of finite variance; the level is 0.05 for each kind."""
    generator = torch.Generator().manual_seed(0)
    alarms, at_rest, runs, steps = {"heavy-tailed": 0, "loops": 0}, 0, 60, 640
    columns = ["loss", "lr", "parameter_norm2", "gradient_norm2", "x0", "x1", *(f"g{i}" for i in range(12))]
    theta, path = torch.randn(runs, 2, generator=generator), []
    for _ in range(steps):
        theta = 0.8 * theta + 0.6 * torch.randn(runs, 2, generator=generator)
        path.append(theta)
    positions = torch.stack(path, 1)
    gradients = torch.randn(runs, steps, 12, generator=generator) * torch.logspace(-2, 2, 12)
    square = positions.square().sum(-1, keepdim=True)
    for i in range(runs):
        row = torch.cat([square[i], square[i], square[i], positions[i], gradients[i]], 1)
        series, looks = synthetic(row, columns), Looks(level=0.05)
        found = looks.take(series, steps, 0)
        at_rest += found.events["stationary"] is not None
        for kind in alarms:
            alarms[kind] += found.events[kind] is not None
    assert max(alarms.values()) <= 6  # a binomial of 60 and 0.025 exceeds it once in a thousand
    assert at_rest >= 49  # one of 60 and 0.95 falls below it once in a thousand


def test_a_run_that_goes_round_is_said_to_move_in_loops_with_its_period():
    generator = torch.Generator().manual_seed(0)
    turn = torch.tensor([[math.cos(0.2), -math.sin(0.2)], [math.sin(0.2), math.cos(0.2)]])
    x, rows = torch.zeros(2), []
    for _ in range(2000):
        x = 0.95 * turn @ x + torch.randn(2, generator=generator)
        rows.append(torch.cat([x.square().sum().repeat(3), x]))
    columns = ["loss", "lr", "parameter_norm2", "gradient_norm2", "x0", "x1"]
    found = Looks(0.01).take(synthetic(torch.stack(rows), columns), 2000, 0)
    event = found.events["loops"]
    assert event is not None and abs(event.value - 0.2) < 5 * event.error + 0.02


# --------------------------------------------------------------------------------- budget and state


def test_watching_stays_within_its_budget_by_the_clock_it_is_given():
    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 1e-5  # so much for each look at it
            return self.now

    clock = Clock()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = bolza.Watch(model, None, DATA, optimizer, batch_size=32, samples=16, clock=clock, budget=0.1)
    probe = watch._take_sharpness

    def slow():
        clock.now += 0.01
        probe()

    watch._take_sharpness = slow
    watch._take_noise = lambda: setattr(clock, "now", clock.now + 0.05)
    for _ in range(2200):
        clock.now += 1e-3
        watch.step(loss=1.0)
    costs = watch.record().costs
    assert 0.03 < costs["share"] <= 0.1 and costs["runs"]["sharpness"] >= 2 and costs["runs"]["noise"] >= 1


def test_a_first_reading_that_costs_much_more_than_a_step_is_paid_before_it_is_taken(monkeypatch):
    now, probe = [0.0], "bolza.diagnosis.watch.probes.Probe.try_out"
    monkeypatch.setattr(probe, lambda *_: {"sharpness": 0.2, "noise": 0.1})
    watch = on_quadratic(0, clock=lambda: now[0], every=None)
    costs = {"sharpness": 0.2, "noise": 0.1}
    for name, cost in costs.items():
        setattr(watch, f"_take_{name}", lambda cost=cost: now.__setitem__(0, now[0] + cost))
    worst, runs = 0.0, watch._budget.runs
    for _ in range(2200):
        now[0] += 2e-3
        watch.step(loss=1.0)
        worst = max(worst, watch._budget.share_spent)
    # twelve steps and 0.03 s would have passed as a guess
    assert worst <= 0.07 and runs["noise"] >= 1 and runs["sharpness"] >= 1


def test_a_reading_that_cannot_be_had_leaves_its_turn_to_the_other():
    now = [0.0]
    watch = on_quadratic(0, clock=lambda: now[0], every=None)

    def fails():
        raise RuntimeError("no second derivative")

    watch._take_sharpness = fails
    watch._take_noise = lambda: now.__setitem__(0, now[0] + 0.01)
    for _ in range(700):
        now[0] += 2e-3
        watch.step(loss=1.0)
    assert watch._budget.runs["noise"] > 2 and watch._failures == {"sharpness": 2}


def test_a_vague_sharpness_is_no_edge_of_stability():
    watch = on_quadratic(1, lr=1.8)
    watch._judge_sharpness(Sharpness(1.1, 1.0, 0.98, 0.9, 1.11), 1.8, "2/lr")
    assert not watch.events


def test_a_run_goes_on_being_watched_where_it_was_stopped(tmp_path):
    file, watches = tmp_path / "run.ckpt", []

    def callback(model):
        def make(optimizer, steps):
            watches.append(bolza.Watch(model, None, DATA, optimizer, batch_size=32, every=10, samples=16))
            return watches[-1]

        return make

    whole = net()
    bolza.training.train(whole, DATA, lr=0.05, steps=40, callback=callback(whole))
    for steps in (20, 40):
        part = net()
        bolza.training.train(
            part, DATA, lr=0.05, steps=steps, callback=callback(part), checkpoint=file, resume=steps == 40
        )
    one, _, two = (watch.record() for watch in watches)
    assert equal(whole, part) and one.curves == two.curves
    assert one.readings["noise"] == two.readings["noise"] and one.steps == two.steps == 40
    for a, b in zip(one.readings["sharpness"], two.readings["sharpness"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-5)


def test_a_state_of_another_network_is_refused():
    state = on_quadratic(5, size=4).state_dict()
    with pytest.raises(CheckpointError, match="4 parameters, and this one has 5"):
        on_quadratic(1, size=5).load_state_dict(state)


def test_an_interrupt_within_a_reading_leaves_a_watch_that_can_go_on():
    watch = on_quadratic(10)
    real = watch._take_noise

    def interrupted():
        raise KeyboardInterrupt

    watch._take_noise = interrupted
    with pytest.raises(KeyboardInterrupt):
        watch.measure()
    watch._take_noise = real
    watch.step(loss=1.0)
    watch.measure()
    assert watch.record().steps == 11 and len(watch.record().readings["noise"]) == 1


# --------------------------------------------------------------------------------------- at the borders


def test_what_does_not_apply_is_said_and_the_rest_is_told():
    watch = on_quadratic(10, make=lambda p: torch.optim.Adagrad(p, lr=0.1), every=5)
    record = watch.record()
    assert "Adagrad is not known" in record.unavailable["stability limit"]
    assert record.readings["sharpness"][-1]["value"] == pytest.approx(1, abs=1e-4)
    model = nn.Linear(64, 10)
    model.lock = (i for i in range(3))  # cannot be copied
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = bolza.Watch(model, None, DATA, optimizer)
    F.cross_entropy(model(DATA.train_x[:8]), DATA.train_y[:8]).backward()
    optimizer.step()
    watch.step()
    watch.measure()
    missing = watch.record().unavailable
    assert "cannot be copied" in missing["sharpness"] and "batch_size=" in missing["temperature"]
    assert watch.record().curves["parameter_norm"][0] > 0


def step_of(model, x, y, loss=F.cross_entropy, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = bolza.Watch(model, loss, (x, y), optimizer, samples=16, **settings)
    loss(model(x), y).backward()
    optimizer.step()
    watch.step()
    watch.measure()
    return watch.record()


def test_sparse_and_complex_gradients_are_noted():
    x, y = torch.arange(12).view(6, 2), torch.zeros(6, dtype=torch.long)
    record = step_of(nn.EmbeddingBag(12, 10, sparse=True), x, y)
    assert record.curves["gradient_norm"][0] > 0
    x, y = torch.randn(6, 3, dtype=torch.cfloat), torch.zeros(6, 2)
    record = step_of(
        nn.Linear(3, 2, dtype=torch.cfloat), x, y, lambda out, target: (out - target).abs().square().mean()
    )
    assert (
        record.curves["parameter_norm"][0] > 0
        and "real and imaginary parts" in record.unavailable["sharpness"]
    )


def test_a_network_in_half_precision_is_probed_in_single_precision_and_stays_as_it_is():
    model = net().eval()
    twin = copy.deepcopy(model).bfloat16()
    x, y = DATA.train_x[:32], DATA.train_y[:32]
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
    one, two = step_of(model, x, y), step_of(twin, x.bfloat16(), y)
    values = [record.readings["sharpness"][-1]["value"] for record in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=0.05)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_the_sum_over_samples_is_refused_because_its_sharpness_is_that_of_another_batch():
    record = step_of(net(), DATA.train_x[:8], DATA.train_y[:8], nn.CrossEntropyLoss(reduction="sum"))
    assert "sum over samples" in record.unavailable["sharpness"] and not record.readings["sharpness"]


def test_a_loss_that_is_not_one_number_is_refused_at_its_step():
    watch = on_quadratic(1)
    for loss, words in ((torch.ones(3), "of the shape \\(3,\\)"), ("a", "a str")):
        with pytest.raises(ArgumentError, match=f"loss is {words}"):
            watch.step(loss=loss)


def test_the_record_is_written_shown_and_drawn(tmp_path):
    watch = on_quadratic(60, lr=3.5, every=8)
    record = watch.record()
    stored = json.loads(watch.save(tmp_path / "w.json").read_text())
    assert stored["schema"] == "bolza.watch/1" and stored["events"][0]["kind"] == "unstable"
    assert stored["costs"]["share"] > 0 and "unstable" in stored["summary"]
    page = record.to_html(tmp_path / "w.html").read_text()
    assert "<svg" in page and "Lower the learning rate" in page
    text = str(watch)
    assert "What it cost" in text and "unstable" in text and "of training" in text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": 3}, ArgumentError, "model is a int"),
        ({"optimizer": None}, ArgumentError, "optimizer is a NoneType"),
        ({"data": None}, ArgumentError, "data is None"),
        ({"loss": None, "data": (torch.zeros(4, 2), torch.zeros(4))}, ArgumentError, "loss is None"),
        (
            {"loss": F.mse_loss, "data": (torch.zeros(1, 2), torch.zeros(1))},
            DataError,
            "fewer than two samples",
        ),
        ({"every": 0}, ArgumentError, "every=0"),
        ({"samples": 1}, ArgumentError, "samples=1"),
        ({"level": 1.0}, ArgumentError, "level=1.0"),
        ({"budget": -1}, ArgumentError, "budget=-1"),
        ({"model": nn.LazyLinear(3)}, ArgumentError, "without a value yet"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
            ArgumentError,
            "trains no parameter",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, words):
    model = nn.Linear(64, 10)
    given = {
        "model": model,
        "loss": None,
        "data": DATA,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    with pytest.raises(error, match=words):
        bolza.Watch(**(given | change))


def test_the_temperature_follows_batches_that_change_size():
    class Batches:
        batch_size = 8

    batches, model, x = Batches(), Mean(4), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = bolza.Watch(model, half_square, (x, torch.zeros(64)), optimizer, samples=32, every=1000)
    watch.attach_batches(batches)
    seen = []
    for batches.batch_size in (8, 32):
        half_square(model(x), None).backward()
        optimizer.step()
        watch.step()
        watch.measure()
        seen.append(watch.record().readings["noise"][-1]["temperature"])
    assert seen[0] == pytest.approx(0.1 / 16) and seen[0] == pytest.approx(4 * seen[1])
