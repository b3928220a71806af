"""The page on choosing a start: its code runs, and its tables are what the library computes."""

import contextlib
import io
import re
from pathlib import Path

import torch

from bolza.core.errors import ArgumentError
from bolza.meanfield import critical_line, critical_weight_var, fixed_point, resolve_activation

PAGE = (Path(__file__).parents[2] / "docs" / "propagation.md").read_text(encoding="utf-8")


def numbers(label: str) -> list[str]:
    """Cells of the table row that starts with a label."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]


def test_every_code_block_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            exec(compile(block, "propagation.md", "exec"), names)
    assert len(blocks) == 8 and "ordered → critical" in out.getvalue()


def test_the_tables_are_computed() -> None:
    weights = [1 / 3, 1.0, 1.5, 1.7, 1.8, 2.0, 2.5, 4.0]
    xi = fixed_point("tanh", torch.tensor(weights, dtype=torch.float64), 0.05).xi_c.tolist()
    printed = numbers("ξ_c")
    assert printed.pop(4) == "∞" and printed == [f"{v:.1f}" for v in xi]
    keep = torch.tensor([0.99, 0.95, 0.9], dtype=torch.float64)
    dropped = fixed_point("tanh", 1.7609546, 0.05, keep_prob=keep).xi_c.tolist()
    assert numbers("ξ_c of tanh on the former critical line") == [f"{v:.1f}" for v in dropped]


def test_the_critical_variances_of_the_page() -> None:
    for label, name in (("tanh", "tanh"), ("erf", "erf"), ("ELU", "elu"), ("softsign", "softsign")):
        origin, with_bias, law = numbers(label)
        assert float(origin) == round(float(critical_weight_var(name)), 4)
        assert float(with_bias) == round(float(critical_weight_var(name, 0.05)), 4)
        line = critical_line(name, bias_var=0.05)
        kappa = 2 / float(line.weight_var * line.q * resolve_activation(name).curvature(line.q))
        assert law == f"{kappa:.1f}/l"
    for name in ("gelu", "silu", "mish", "softplus"):
        for bias in (0.0, 0.05):
            try:
                critical_weight_var(name, bias)
            except ArgumentError:
                continue
            raise AssertionError(f"{name} has a critical point at σ_b² = {bias}")
