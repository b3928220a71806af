"""The benchmark of sensitivity to the learning rate: what it counts, keeps and concludes."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch):
    """The helper of the benchmark, with a task of its own that takes milliseconds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    lab = importlib.import_module("_sensitivity")
    tiny = lab.Task("tiny", "digits", (64,), lambda: nn.Linear(64, 10), 1)
    monkeypatch.setitem(lab.TASKS, "tiny", tiny)
    return lab


@pytest.fixture
def plateau(monkeypatch: pytest.MonkeyPatch):
    """What curves of accuracy are summed up by."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("_plateau")


def test_the_width_of_a_tent_is_the_closed_form(plateau) -> None:
    """A tent with flanks of slope 1 a point stays within h of its top over 2h points."""
    tent = [0.0, 1.0, 2.0, 3.0, 2.0, 1.0, 0.0]
    for h in (0.25, 1.0, 1.5):
        assert plateau.width(tent, 3.0 - h, spacing=1.0) == (pytest.approx(2 * h), False)
    assert plateau.width(tent, -1.0, spacing=0.5) == (3.0, True)
    assert plateau.width(tent, 3.5) == (0.0, False)


def test_of_two_stretches_the_longer_counts_and_their_lengths_are_not_added(plateau) -> None:
    assert plateau.width([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 0.5, spacing=1.0) == (2.0, False)
    assert plateau.width([0.0, 0.0, 1.0, 1.0, 1.0], 0.5, spacing=1.0) == (2.5, True)


def test_the_area_is_that_of_trapezia(plateau) -> None:
    curve = torch.linspace(0, 1, 11).square()
    assert plateau.area(curve.tolist()) == pytest.approx(float(torch.trapezoid(curve, dx=0.1)))


def test_the_summary_of_known_cells(plateau) -> None:
    heights = [[0.1, 0.3], [0.9, 0.9], [0.5, 0.7]]
    cells = [
        [
            {"accuracy": a, "key": {"rate": rate}, "extra_gradients": 2.0, "budget": 20, "end": "finished"}
            for a in row
        ]
        for rate, row in zip((0.1, 1.0, 10.0), heights, strict=True)
    ]
    found = plateau.summarise(cells, best_of_all=0.95)
    assert found.mean == pytest.approx([0.2, 0.9, 0.6]) and found.best_rate == 1.0
    # the two seeds have the areas .6 and .7
    assert found.area == pytest.approx(0.65) and found.area_error == pytest.approx(0.05)
    assert found.own == pytest.approx(0.5 * (0.02 / 0.7 + 0.02 / 0.3)) and found.of_all == 0.0
    assert found.extra == pytest.approx(0.1) and not found.failed


def test_a_hessian_product_costs_about_two_gradients(lab) -> None:
    """By the count of multiplications and additions, with which controllers are charged."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())])
    x, y = torch.randn(16, 32), torch.randint(0, 32, (16,))
    unit = 16 * lab.gradient_work(model, x, y)
    parameters = list(model.parameters())
    with lab.Work() as work:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        torch.autograd.grad(grads, parameters, [torch.ones_like(g) for g in grads])
    assert 1.8 < work.flops / unit < 3.2
    # closed form: forward and both halves of backward are 2·16·32² each, the first layer needs one half less
    assert unit == 2 * 16 * 32 * 32 * (6 * 3 - 1)


def test_what_a_controller_computes_shortens_its_run(lab) -> None:
    class Spender:
        def __init__(self, setting) -> None:
            self.setting, self.steps = setting, 0

        def step(self, loss: float) -> None:
            data = self.setting.data
            x, y = data.train_x[: lab.BATCH], data.train_y[: lab.BATCH]
            torch.autograd.grad(F.cross_entropy(self.setting.model(x), y), self.setting.params)

    def build(setting):
        return torch.optim.SGD(setting.params, lr=setting.rate), Spender(setting)

    free = lab.run_cell(lab.TASKS["tiny"], lab.METHODS["SGD"], 0.1, 0)
    dear = lab.run_cell(lab.TASKS["tiny"], lab.Method("controllers", build, extra=0.0), 0.1, 0)
    planned = lab.run_cell(lab.TASKS["tiny"], lab.Method("controllers", build, extra=1.0), 0.1, 0)
    assert free["budget"] == free["steps"] == 44 and free["extra_gradients"] == 0
    assert dear["steps"] == dear["extra_gradients"] == pytest.approx(22)
    assert planned["steps"] == 22 and dear["accuracy"] < free["accuracy"]


def test_larger_batches_make_fewer_steps_of_the_same_samples(lab) -> None:
    class Larger:
        def attach_batches(self, order) -> None:
            self.order = order
            order.batch_size = 64

        def step(self, loss: float) -> None:
            pass

    def build(setting):
        return torch.optim.SGD(setting.params, lr=setting.rate), Larger()

    cell = lab.run_cell(lab.TASKS["tiny"], lab.Method("controllers", build), 0.1, 0)
    assert cell["steps"] == 22 and cell["gradients"] == 44


def test_divergence_counts_as_chance_and_a_failure_is_told(lab) -> None:
    assert lab.run_cell(lab.TASKS["tiny"], lab.METHODS["SGD"], 1e38, 0)["accuracy"] == lab.CHANCE

    def broken(setting):
        raise RuntimeError("no such thing")

    cell = lab.run_cell(lab.TASKS["tiny"], lab.Method("controllers", broken), 0.1, 0)
    assert cell["end"] == "failed: RuntimeError: no such thing" and cell["accuracy"] == lab.CHANCE


def test_a_finished_cell_is_taken_from_the_folder_and_a_torn_one_is_made_again(lab, tmp_path: Path) -> None:
    first = lab.kept_cell(tmp_path, "tiny", "SGD", 0.1, 0, 0.1)
    path = next(tmp_path.rglob("*.json"))
    marked = first | {"accuracy": 0.123}
    path.write_text(json.dumps(marked))
    assert lab.kept_cell(tmp_path, "tiny", "SGD", 0.1, 0, 0.1)["accuracy"] == 0.123
    assert lab.kept_cell(tmp_path, "tiny", "SGD", 0.1, 0, 0.2)["accuracy"] != 0.123  # other settings
    path.write_text(json.dumps(first)[:40])
    assert lab.kept_cell(tmp_path, "tiny", "SGD", 0.1, 0, 0.1)["accuracy"] == first["accuracy"]


def test_the_table_and_the_figure_are_made_of_the_cells_that_are_there(lab, tmp_path: Path) -> None:
    from bolza.report import to_png

    script = importlib.import_module("controller_sensitivity")
    for name in ("SGD", "Adam"):
        for k, rate in enumerate(lab.METHODS[name].rates):
            place = tmp_path / "digits-mlp" / name
            place.mkdir(parents=True, exist_ok=True)
            cell = {
                "key": {"rate": rate, "share": 1.0},
                "accuracy": 0.9 if 2 < k < 9 else 0.1,
                "extra_gradients": 0.0,
                "budget": 352,
                "end": "finished",
            }
            (place / f"rate {rate:.3g} seed 0.json").write_text(json.dumps(cell))
    (tmp_path / "digits-mlp" / "Adam" / f"rate {1e-3:.3g} seed 0.json").unlink()
    found = script.collect(tmp_path, 1, 1.0)
    assert list(found["digits-mlp"]) == ["SGD"]  # a method that lacks a run waits
    assert "| SGD | 58.0 ± 0.0 | 90.0 | 0.0032 | 90.0 | 2.5 | 2.5 | 0 % |" in script.table(
        "digits-mlp", found["digits-mlp"]
    )
    assert "58.0 ± 0.0 · 2.5 · 2.5 | 58.0 |" in script.overview(found)
    assert to_png(script.figure(found), dpi=20)[1:4] == b"PNG"
