import pytest
import torch
from torch import Tensor, nn

from bolza.meanfield import Step, moment_map, propagate
from bolza.meanfield.layers.function_maps import function_name, relabel
from bolza.meanfield.layers.moment_maps import Call, Missing
from bolza.meanfield.layers.moments import measure
from bolza.meanfield.layers.norm_maps import BatchStatistics


def test_batch_normalisation_of_a_gaussian_kernel_is_exact_for_small_batches() -> None:
    """Against 200,000 sampled units; their spread gives the error."""
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kernel = a @ a.T / 6 + 0.1 * torch.eye(6, dtype=torch.float64)
    norm = BatchStatistics(kernel, 1e-3)
    exact, inverse = norm.forward(), norm.inverse()
    g = torch.Generator().manual_seed(4)
    h = torch.linalg.cholesky(kernel) @ torch.randn(6, 200_000, dtype=torch.float64, generator=g)
    var = h.var(0, unbiased=False)
    y = (h - h.mean(0)) / (var + 1e-3).sqrt()
    assert torch.allclose(y @ y.T / y.shape[1], exact, atol=0.02)
    sampled = 1 / (var + 1e-3)
    assert abs(float(sampled.mean()) - inverse) < 4 * float(sampled.std()) / y.shape[1] ** 0.5


@pytest.mark.parametrize(
    "move",
    [
        lambda t: t.flatten(1), lambda t: t.flatten(2).transpose(1, 2), lambda t: t.permute(0, 2, 3, 1),
        lambda t: t[:, :, 0], lambda t: t[:, :, 1:, 1], lambda t: t.reshape(3, 5, 4), lambda t: t.unsqueeze(1)[:, 0],
        lambda t: t.flip(0)[0:2],
    ],
)  # fmt: skip
def test_moving_numbers_moves_the_kernel(move) -> None:  # type: ignore[no-untyped-def]
    value = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    m = measure(value, 1)
    moved = move(value)
    step = relabel(Call("move", (m,), (), {}, moved), move)
    assert isinstance(step, Step)
    direct = measure(moved, step.out.unit_dim)
    assert torch.allclose(step.out.kernel, direct.kernel) and torch.allclose(step.out.mean, direct.mean)
    assert (step.out.lead, step.out.units) == (direct.lead, direct.units)
    # gradients: independent from unit to unit, alike for all of them; summed over what one unit can bring
    leaf = value.clone().requires_grad_(True)
    out = move(leaf)
    items = step.out.kernel.shape[-1]
    upstream = torch.eye(items, dtype=torch.float64) + 0.5  # its kernel
    total = torch.zeros_like(m.kernel)
    for column in torch.linalg.cholesky(upstream).T:
        for unit in range(step.out.units):
            g = torch.zeros(*step.out.lead, step.out.units, dtype=torch.float64)
            g[..., unit] = column.reshape(step.out.lead)
            (grad,) = torch.autograd.grad(out, leaf, g.movedim(-1, step.out.unit_dim), retain_graph=True)
            total += measure(grad, 1).kernel
    (back,) = step.backward(upstream[None])
    assert torch.allclose(back, total)


def test_a_reshape_that_splits_the_units_is_left_to_measurement() -> None:
    m = measure(torch.randn(3, 6), 1)
    missing = relabel(Call("view", (m,), (), {}, torch.zeros(3, 2, 3)), lambda t: t.view(3, 2, 3))
    assert isinstance(missing, Missing) and not missing.layer


def test_all_spellings_of_a_function_have_one_name() -> None:
    spellings = (torch.relu, nn.functional.relu, "relu", "relu_", torch.ops.aten.relu.default)
    assert {function_name(f) for f in spellings} == {"relu"}
    assert {function_name(f) for f in (torch.add, "__add__", "__radd__", torch.ops.aten.add.Tensor)} == {
        "add"
    }


def test_a_user_adds_a_map_for_a_layer_of_ones_own() -> None:
    class Twice(nn.PReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    @moment_map.register
    def _(layer: Twice, call: Call) -> Step:
        m = call.inputs[0]
        return Step(m.with_(kernel=4 * m.kernel, mean=2 * m.mean), lambda g: [4 * g])

    Twice.__module__ = "torch.nn"  # so that tracing takes it as one layer
    model = nn.Sequential(nn.Linear(5, 200), Twice(), nn.Linear(200, 100))
    rows = propagate(model, torch.randn(4, 5)).layers
    assert [r.source for r in rows] == ["theory"] * 3
    assert rows[1].q_theory == pytest.approx(4 * rows[0].q_theory)
    assert rows[0].grad_theory == pytest.approx(4 * rows[1].grad_theory)
