import torch

from bolza.ops.roots import bracketed_root


def test_many_roots_at_once_to_rounding() -> None:
    k = torch.arange(1, 200, dtype=torch.float64)
    root = bracketed_root(lambda x, i: x**3 - k[i], torch.zeros_like(k), k + 1)
    assert ((root / k ** (1 / 3) - 1).abs() < 1e-14).all()


def test_a_root_at_an_end_is_returned() -> None:
    low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert bracketed_root(lambda x, i: x, low, high) == 0
    assert bracketed_root(lambda x, i: 1 - x, low, high) == 1


def test_a_flat_root_of_high_order_is_found() -> None:
    low, high = torch.tensor([-1.0, 0.1]).double(), torch.tensor([3.0, 2.0]).double()
    root = bracketed_root(lambda x, i: (x - 1) ** 5, low, high)
    assert ((root - 1).abs() < 1e-2).all()


def test_solved_functions_are_not_asked_again() -> None:
    asked = []
    k = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def f(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        asked.append(len(i))
        return torch.where(i == 0, x - 0.5, torch.exp(x) - k[i])

    bracketed_root(f, torch.zeros(2).double(), torch.ones(2).double())
    assert asked[-1] == 1
