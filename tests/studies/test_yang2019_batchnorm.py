import math

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.yang2019_batchnorm import rate


def test_every_claim_holds_and_the_figure_can_be_drawn() -> None:
    result = get("yang2019_batchnorm").run("small")
    assert result.holds, [row for row in result.rows if row.holds is not True]
    assert to_png(result.figures[0], dpi=40)[1:4] == b"PNG"


def test_rates_are_the_paper_s() -> None:
    assert rate(8, relu=False) == pytest.approx(1.2, rel=1e-5)
    assert 2 * rate(256, relu=True) - rate(128, relu=True) == pytest.approx(math.pi / (math.pi - 1), rel=1e-3)
