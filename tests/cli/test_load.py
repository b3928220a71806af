"""Objects named on the command line."""

import sys

import pytest

from bolza.cli._load import call, is_path, load, near
from bolza.ops.errors import ArgumentError, UserCodeError


def test_a_module_of_the_working_folder_is_found(home):
    assert load("user_code:net", "model").__name__ == "net"
    assert str(home) in sys.path


def test_a_file_is_found_by_its_path(home):
    assert load("./user_code.py:net", "model").__name__ == "net"


def test_dotted_names_and_objects_that_are_not_called(home):
    assert load("user_code:nn.Linear", "model").__name__ == "Linear"
    assert call("math:tau", "data") == pytest.approx(6.283185307)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("user_code:", "'pkg.module:name'"),
        (":net", "'pkg.module:name'"),
        ("user_cod:net", "no module 'user_cod'"),
        ("user_cod:net", "did you mean user_code?"),
        ("user_code:nett", "no name 'nett'; did you mean net?"),
        ("user_code:zzzzzz", "no name 'zzzzzz'; it has"),
        ("torch.nnn:Linear", "no module 'torch.nnn'"),
        ("absent.py:net", "no file 'absent.py'"),
        ("a..b:net", "no module 'a'"),
    ],
)
def test_what_cannot_be_found_is_named_with_the_remedy(home, spec, words):
    with pytest.raises(ArgumentError) as error:
        load(spec, "model")
    assert words in str(error.value)


def test_a_module_that_raises_on_import_is_user_code(home):
    (home / "broken_user_code.py").write_text("import torch\nimport not_a_package_of_anyone\n")
    with pytest.raises(UserCodeError, match=r"not_a_package_of_anyone.*broken_user_code.py, line 2"):
        load("broken_user_code:net", "model")


def test_a_factory_that_raises_is_user_code(home):
    with pytest.raises(UserCodeError, match=r"the model user_code:raises raised RuntimeError: no such file"):
        call("user_code:raises", "model")


def test_near_offers_at_most_three_names():
    assert near("a", ["zzz"]) == ""
    assert near("sdg", ["sgd", "adam"]) == "; did you mean sgd?"
    assert is_path("a:b") and not is_path("mlp")


def test_a_file_that_is_no_python_is_named_with_its_line_once(home):
    (home / "broken.py").write_text("def net(:\n")
    with pytest.raises(UserCodeError, match=r"SyntaxError: invalid syntax \(broken.py, line 1\): correct it"):
        load("broken:net", "model")
