import pytest

from bolza.studies import get, liu2021_ddpnopt


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(liu2021_ddpnopt.BUDGETS, "small", {"epochs": 1, "seeds": 2, "rates": (1.5,)})
        yield get("liu2021_ddpnopt").run()


def test_every_identity_holds(result):
    identities = result.rows[:4]
    assert all(row.holds for row in identities), [row.claim for row in identities if not row.holds]


def test_at_a_rate_far_too_large_only_damped_feedback_learns(result):
    accuracy = result.facts
    for seed in range(2):
        assert accuracy["damped at 1.5"][seed] > 2 * accuracy["descent at 1.5"][seed]
        assert accuracy["paper at 1.5"][seed] < 0.3
    assert len(result.figures) == 1
