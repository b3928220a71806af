"""A document with one of everything."""

import pytest

from bolza.report import Cell, Document, Figure, Section, Table, Text, Tile, Tiles, log_axis, role


def _draw(fig):
    left, right = fig.subplots(1, 2)
    left.errorbar(
        range(1, 6),
        [10.0**-i for i in range(5)],
        yerr=[0.3 * 10.0**-i for i in range(5)],
        fmt="o",
        label="measured",
    )
    log_axis(left)
    left.set_xlabel("layer")
    left.legend()
    right.plot([1, 2, 3], [0.1, 0.5, 0.9], color=role("second"))
    right.set_title("Correlation")


@pytest.fixture
def document():
    """Text, tiles, a table with verdicts, a long table and two figures of one name."""
    figure, twin = (
        Figure("Signal & gradient", _draw, "Seen.", alt='It "falls".', sketch="q ▁▂▃") for _ in range(2)
    )
    return Document(
        "A <report>",
        "The signal dies after five layers.",
        [
            Tiles([Tile("Phase", "ordered", "χ₁ = 0.333", "bad"), Tile("Depth", "5 layers")]),
            Section(
                "Can it get through?",
                [
                    Table(
                        "Findings",
                        ["", "finding", "value", "what it says"],
                        [
                            [
                                Cell("", "bad"),
                                "χ₁",
                                0.3333,
                                Cell("Each layer shrinks it. " * 4, note="→ remedy"),
                            ],
                            [Cell("", "good"), "ξ", None, "ok"],
                        ],
                    ),
                    figure,
                    twin,
                    Text("A caveat.", tone="warn"),
                ],
                lead="No.",
            ),
            Table("Long", ["layer", "q"], [[i, 0.5**i] for i in range(30)], fold=5),
        ],
        footer="seed 0",
    )
