import pytest

from bolza.core import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("ShapeError", ValueError),
        ("DataError", ValueError),
        ("UnsupportedError", TypeError),
        ("ReportError", OSError),
        ("DivergenceError", ArithmeticError),
    ],
)
def test_an_error_is_caught_by_its_builtin_and_by_the_common_base(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, builtin) and issubclass(kind, errors.BolzaError)


@pytest.mark.parametrize("name", ["TraceError", "UserCodeError", "CheckpointError"])
def test_other_errors_have_the_common_base_only(name):
    assert issubclass(getattr(errors, name), errors.BolzaError)


def test_divergence_says_where_it_started():
    error = errors.DivergenceError("the loss is nan", step=7, layer="fc1")
    assert (str(error), error.step, error.layer) == ("the loss is nan", 7, "fc1")
    assert errors.DivergenceError("the loss is nan").step is None


def test_every_public_error_is_exported():
    assert all(hasattr(errors, name) for name in errors.__all__)
    assert issubclass(errors.ConvergenceWarning, UserWarning)
