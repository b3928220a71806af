from bolza.core import Policy


class Decay:
    """lr ← lr·factor where the loss rose."""

    def init(self):
        return {"lr": 1.0, "last": float("inf")}

    def update(self, state, observation):
        lr = state["lr"] * (0.5 if observation["loss"] > state["last"] else 1.0)
        return {"lr": lr, "last": observation["loss"]}, {"lr": lr}


def test_a_pair_of_functions_is_a_policy():
    assert isinstance(Decay(), Policy)
    assert not isinstance(object(), Policy)


def test_a_policy_is_pure_so_that_its_state_can_be_stored_and_taken_up():
    law, state, actions = Decay(), Decay().init(), []
    for loss in (2.0, 1.0, 3.0):
        saved = dict(state)
        state, action = law.update(state, {"loss": loss})
        assert law.update(saved, {"loss": loss}) == (state, action)
        actions.append(action["lr"])
    assert actions == [1.0, 1.0, 0.5]
