"""Readings along a run, against what can be computed by hand."""

import copy

import pytest
import torch

from bolza.data import Dataset
from bolza.diagnosis.course import QUANTITIES, Course
from bolza.diagnosis.noise import Noise
from bolza.diagnosis.prescription import _critical
from bolza.diagnosis.problem import prepare
from bolza.diagnosis.record import Trial
from bolza.diagnosis.trial import did_not_help, findings
from bolza.models import mlp

F64 = torch.float64


def problem(samples: int = 24, **kwargs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=generator, dtype=F64)
    y = torch.randint(3, (samples,), generator=generator)
    torch.manual_seed(0)
    data = Dataset(x, y, x, y, task="classification", num_classes=3, name="toy")
    return prepare(mlp(depth=3, width=8, in_features=5, out_features=3).double(), data, **kwargs)


def reading(p, step: int = 0):
    course = Course(p, copy.deepcopy(p.pristine), batch_size=8, momentum=0.9)
    course.note(step, 100, 0.1)
    return {name: values[0] for name, values in course.curves.items()}


def per_sample(model, function, x, y):
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(function(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_what_is_left_of_the_hamiltonian_is_the_gradient_of_the_loss():
    p = problem()
    loss = p.loss(p.pristine(p.x), p.y)
    grads = torch.autograd.grad(loss, list(p.pristine.parameters()))
    expected = torch.cat([g.flatten() for g in grads]).norm()
    seen = reading(p)
    assert seen["stationarity"] == pytest.approx(float(expected), rel=1e-10)
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_signal_to_noise_is_that_of_the_unbiased_estimates():
    p = problem()
    g = per_sample(p.pristine, p.loss, p.x, p.y)
    trace = (g - g.mean(0)).square().sum() / (len(g) - 1)
    signal = g.mean(0).square().sum() - trace / len(g)
    seen = reading(p)
    population = trace * (len(g) - 1) / len(g)  # Σ is that of the data set: divided by N
    assert seen["signal_to_noise"] == pytest.approx(float(8 * signal / population), rel=1e-8)
    assert seen["temperature"] == pytest.approx(0.1 / (2 * 8 * 0.1))


def test_the_gram_condition_is_that_of_the_centred_gradients_of_one_output_direction():
    p = problem()
    generator = torch.Generator().manual_seed(p.seed)
    direction = torch.randn(3, generator=generator).double()
    g = per_sample(p.pristine, lambda out, _: (out * direction).sum(), p.x, p.y)
    values = torch.linalg.eigvalsh((g - g.mean(0)) @ (g - g.mean(0)).T)
    assert reading(p)["gram_condition"] == pytest.approx(float(values[-1] / values[1]), rel=1e-6)


def test_readings_are_taken_when_due_and_leave_the_run_alone():
    p = problem()
    model = copy.deepcopy(p.pristine)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    course = Course(p, model, batch_size=8, momentum=0.9, readings=3)
    state = torch.get_rng_state()
    for step in range(11):
        course.note(step, 10, 0.1)
    assert course.curves["step"] == [0, 5, 10]
    assert all(len(course.curves[name]) == 3 for name in QUANTITIES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(q.grad is None for q in model.parameters())


def trial(key, **metrics):
    return Trial(key, 0.1, 8, 10, "finished", 1.0, {"step": [0, 10]}, metrics, key == "after")


@pytest.mark.parametrize(
    "before, after, worse",
    [
        ({"test_accuracy": 0.95}, {"test_accuracy": 0.90}, True),
        ({"test_accuracy": 0.95}, {"test_accuracy": 0.94}, False),
        ({"test_r2": 0.88, "test_loss": 0.1}, {"test_r2": 0.10, "test_loss": 0.9}, True),
        ({"test_loss": 2.0}, {"test_loss": 1.0}, False),
        ({"test_loss": 1.0}, {"test_loss": 1.1}, True),
    ],
)
def test_a_prescription_that_did_not_help_is_not_praised(before, after, worse):
    p = problem()
    trials = {"before": trial("before", **before), "after": trial("after", **after)}
    assert did_not_help(trials) is worse
    found = next(f for f in findings(trials, p.dataset) if f.key == "training.after")
    assert ("keep your own setting" in found.text) is worse
    assert not (worse and found.verdict == "good")


@pytest.mark.parametrize("error, known", [(None, False), (480.0, False), (25.0, True)])
def test_a_critical_batch_that_is_not_known_decides_nothing(error, known):
    noise = Noise(1.0, 0.1, 0.01, 5.0, 0.5, [1.0], [], 250.0, error, 64)
    assert (_critical(noise) == 250.0) is known
