"""Phase diagrams of what is not a smooth function."""

import math

import pytest
import torch
from torch import Tensor

from bolza.report import to_png
from bolza.studies._phase import PhaseMap, phase_document, profile


def noisy(h: Tensor) -> Tensor:
    return torch.tanh(h) + 0.1 * torch.randn_like(h)


def test_a_noisy_activation_has_a_diagram_on_a_coarser_grid() -> None:
    phase = PhaseMap.compute(noisy, (1.0, 2.5), (0.02, 0.2), points=24)
    assert phase.xi_c.shape == (4, 6) and torch.isfinite(phase.xi_c).all()
    line = phase.line[phase.line.isfinite()]
    assert len(line) and ((line > 1.2) & (line < 2.6)).all()
    assert to_png(phase.figure(), dpi=40).startswith(b"\x89PNG")


def test_a_function_with_kinks_takes_half_the_columns_and_one_that_jumps_has_no_line() -> None:
    assert PhaseMap.compute("hardtanh", (0.5, 1.0), (0.0, 0.1), points=12).xi_c.shape == (4, 6)
    jumping = PhaseMap.compute(torch.sign, (0.5, 1.0), (0.05, 0.1), points=12)
    assert jumping.line.isnan().all() and torch.isinf(jumping.chi_1).all()
    document, record = phase_document("hardshrink", 0.05, (0.5, 1.0), (0.02, 0.1), points=8)
    assert "where it jumps" in document.summary and math.isnan(record["critical_weight_var"])


def test_the_table_of_tanh_has_the_critical_row() -> None:
    rows = profile("tanh", 0.05, (0.5, 4.0)).rows
    assert [row[0] for row in rows if row[1].value == "critical"] == ["1.760955"]
    with pytest.raises(Exception, match="weight_var_range"):
        PhaseMap.compute("tanh", (2.0, 1.0), (0.0, 0.1))
