"""Self-healing: exact rows, and that the study reports what control does and does not give."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chen2024_self_healing import BUDGETS, Budget


def test_the_study_runs_and_says_what_an_adversary_who_knows_can_do(monkeypatch):
    monkeypatch.setitem(
        BUDGETS, "small", Budget(seeds=1, epochs=4, hard_epochs=1, attack_steps=1, text_steps=2, samples=60)
    )
    result = get("chen2024_self_healing").run("small")
    assert all(row.holds for row in result.rows[:7])
    claims = [row.claim for row in result.rows]
    assert len(set(claims)) == len(claims)
    through = claims.index("digits: gain under an attack through the control")
    assert claims[through - 1] == "digits: gain under an attack that does not know of the control"
    gained = {row.claim: row.measured for row in result.rows}
    assert gained[claims[through]] <= gained[claims[through - 1]]
    assert sum(claim.startswith("networks trained against an adversary") for claim in claims) == 2
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
