import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.yang2017_residual import log_gain


def test_every_claim_holds_and_the_figure_can_be_drawn() -> None:
    result = get("yang2017_residual").run("small")
    assert result.holds, [row for row in result.rows if row.holds is not True]
    assert to_png(result.figures[0], dpi=40)[1:4] == b"PNG"


def test_the_log_gradient_of_tanh_grows_with_the_root_of_depth() -> None:
    """Not in proportion to depth: four times the blocks, about twice the logarithm."""
    gains = [float(log_gain(torch.ones(1, dtype=torch.float64), depth)) for depth in (100, 400)]
    assert 1.9 < gains[1] / gains[0] < 2.3
