"""Families of tasks."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.data import FewShot, Sinusoids, digit_tasks


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_sinusoid_task_is_one_sine_wave_in_both_of_its_sets():
    batch = Sinusoids(shots=5, queries=7, dtype=torch.float64).sample(200, seeded())
    x, y = (torch.cat(parts, 1) for parts in zip(*batch, strict=True))
    basis = torch.cat([torch.sin(x), -torch.cos(x)], 2)  # a sin(x − b) = a cos b sin x − a sin b cos x
    fit = torch.linalg.lstsq(basis, y).solution
    assert torch.allclose(basis @ fit, y, atol=1e-10)
    a, b = fit.norm(dim=1), torch.atan2(fit[:, 1], fit[:, 0])
    assert 0.1 <= float(a.min()) and float(a.max()) <= 5
    assert -1e-9 <= float(b.min()) and float(b.max()) <= math.pi + 1e-9
    assert abs(float(a.mean()) - 2.55) < 4 * 4.9 / math.sqrt(12 * 200)
    assert float(x.abs().max()) <= 5


def test_the_generator_decides_alone_and_noise_is_on_the_support_only():
    family = Sinusoids(noise=0.5)
    first, second = family.sample(3, seeded()), family.sample(3, seeded())
    assert torch.equal(first.support[1], second.support[1])
    state = torch.get_rng_state()
    family.sample(2, seeded())
    assert torch.equal(state, torch.get_rng_state())
    clean = Sinusoids().sample(2000, seeded())
    noisy = Sinusoids(noise=0.5).sample(2000, seeded())
    assert torch.equal(clean.query[1], noisy.query[1])
    spread = float((clean.support[1] - noisy.support[1]).std())
    assert abs(spread - 0.5) < 4 * 0.5 / math.sqrt(2 * 10000)


def test_few_shot_tasks_draw_classes_and_examples_without_replacement():
    y = torch.arange(5).repeat_interleave(torch.tensor([6, 9, 7, 6, 12]))
    family = FewShot(torch.arange(40), y[torch.randperm(40, generator=seeded(1))], 3, 2, 4)
    labels = family.y
    support, query = family.sample(50, seeded())
    examples = torch.cat([support[0], query[0]], 1)
    assert all(len(set(row.tolist())) == 18 for row in examples)
    classes = labels[support[0]].reshape(50, 3, 2)
    assert torch.equal(classes[..., :1].expand(-1, -1, 2), classes)
    assert torch.equal(labels[query[0]].reshape(50, 3, 4)[..., 0], classes[..., 0])
    assert all(len(set(row.tolist())) == 3 for row in classes[..., 0])
    assert torch.equal(support[1][0], torch.tensor([0, 0, 1, 1, 2, 2]))


def test_every_class_and_every_example_has_its_turn():
    y = torch.arange(4).repeat_interleave(torch.tensor([4, 5, 6, 9]))
    batch = FewShot(torch.arange(24), y, ways=2, shots=1, queries=2).sample(4000, seeded())
    counts = torch.bincount(y[batch.support[0]].flatten(), minlength=4)
    assert bool(((counts - 2000).abs() < 4 * math.sqrt(4000 * 0.25)).all())
    seen = torch.bincount(batch.support[0].flatten(), minlength=24)[15:]
    assert bool(((seen - 2000 / 9).abs() < 5 * math.sqrt(2000 / 9)).all())


def test_digit_tasks_keep_to_their_digits_and_turn_them():
    family = digit_tasks(5, 5, 15, classes=range(6), images=True)
    assert set(family.y.tolist()) == {d + 10 * r for d in range(6) for r in range(4)}
    plain = digit_tasks(4, 1, 5, classes=range(6, 10), rotations=False)
    assert plain.x.shape[1:] == (64,) and sorted(set(plain.y.tolist())) == [6, 7, 8, 9]
    turned = family.x[family.y == 10]
    upright = family.x[family.y == 0]
    assert torch.equal(torch.rot90(upright, 1, (2, 3)), turned)
    batch = family.sample(3, seeded())
    assert batch.support[0].shape == (3, 25, 1, 8, 8) and batch.query[1].shape == (3, 75)
    assert batch.to("cpu").support[0].shape == batch.support[0].shape


def test_families_that_cannot_be_are_refused_by_name():
    x, y = torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(ArgumentError, match="ways=3"):
        FewShot(x, y, ways=3, shots=1, queries=1)
    with pytest.raises(DataError, match="shots \\+ queries = 4"):
        FewShot(x, y, ways=2, shots=2, queries=2)
    with pytest.raises(ShapeError, match="integer"):
        FewShot(x, y.float(), ways=2, shots=1, queries=1)
    with pytest.raises(ArgumentError, match="classes"):
        digit_tasks(classes=[10])
    with pytest.raises(ArgumentError, match="shots=0"):
        Sinusoids(shots=0)
    with pytest.raises(ArgumentError, match="phase"):
        Sinusoids(phase=(1.0, 0.0))
    with pytest.raises(ArgumentError, match="noise"):
        Sinusoids(noise=-1.0)
    with pytest.raises(ArgumentError, match="tasks=0"):
        Sinusoids().sample(0)
