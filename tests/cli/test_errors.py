"""One sentence, the right exit code, a traceback only on request."""

import errno

import pytest
import typer

from bolza.cli._errors import reporting, user_code, verb
from bolza.ops.errors import ArgumentError, UserCodeError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ArgumentError("lr=-1 must be positive"), 2, "error: lr=-1 must be positive"),
        (KeyboardInterrupt(), 130, "stopped: interrupted"),
        (ZeroDivisionError("by 0"), 1, "ZeroDivisionError: by 0"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_error_becomes_one_sentence_and_an_exit_code(error, code, words, capsys):
    with pytest.raises(typer.Exit) as end, reporting(debug=False):
        raise error
    text = capsys.readouterr().err
    assert end.value.exit_code == code
    assert words in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1


def test_debug_adds_the_traceback(capsys):
    with pytest.raises(typer.Exit), reporting(debug=True):
        raise ArgumentError("lr=-1 must be positive")
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "error: lr=-1 must be positive" in text


def test_exits_pass_through():
    with pytest.raises(typer.Exit) as end, reporting(debug=False):
        raise typer.Exit(3)
    assert end.value.exit_code == 3


def test_user_code_names_the_thing_the_exception_and_the_line():
    with pytest.raises(UserCodeError) as error, user_code("the model factory net:make"):
        {}["absent"]
    text = str(error.value)
    assert text.startswith("the model factory net:make raised KeyError: 'absent' (")
    assert "test_errors.py, line " in text
    assert isinstance(error.value.__cause__, KeyError)


def test_user_code_that_calls_exit_does_not_end_the_program():
    with pytest.raises(UserCodeError, match="SystemExit"), user_code("the data loader d:load"):
        raise SystemExit(0)


def test_a_verb_gets_the_option_debug_once():
    def plain(count: int = 1) -> int:
        """Do it.

        A long
        sentence.
        """
        return count

    guarded = verb(plain)
    assert guarded(count=3, debug=True) == 3
    assert guarded.__doc__ == "Do it.\n\nA long sentence."
