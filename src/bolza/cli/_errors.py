"""How a verb ends: one clear sentence, the right exit code, and a traceback only when it is asked for.

===== ==============================================================================
code  meaning
===== ==============================================================================
0     done
1     an unexpected error: a bug, in this library or in code that it called
2     bad input: the sentence names the thing and the remedy
130   Ctrl-C: the sentence says what was kept
===== ==============================================================================
"""

from __future__ import annotations

import errno
import functools
import inspect
import io
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from bolza.ops.errors import BolzaError, UserCodeError

__all__ = ["reporting", "say", "tolerant_streams", "user_code", "verb"]

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130

Debug = Annotated[
    bool, typer.Option("--debug", help="On an error, show the whole traceback.", rich_help_panel="Help")
]


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option ``--debug`` and let its errors end as one sentence and an exit code."""
    signature = inspect.signature(function, eval_str=True)
    has_debug = "debug" in signature.parameters

    @functools.wraps(function)
    def guarded(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        if has_debug:
            kwargs["debug"] = debug
        with reporting(debug), _plain_warnings(debug):
            return function(*args, **kwargs)

    if not has_debug:
        option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        signature = signature.replace(parameters=[*signature.parameters.values(), option])
    guarded.__signature__ = signature  # type: ignore[attr-defined]
    guarded.__doc__ = _reflow(inspect.getdoc(function) or "")
    return guarded


def _reflow(doc: str) -> str:
    r"""Join the lines of each paragraph, so that help is wrapped by the terminal; a block after ``\b`` stays."""
    paragraphs = [p.replace(r"\b", "\b", 1) if p.startswith(r"\b") else p for p in doc.split("\n\n")]
    return "\n\n".join(p if p.startswith("\b") else " ".join(p.split("\n")) for p in paragraphs)


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn what the body raises into a sentence on stderr and an exit code; see the module."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        _end(error, "interrupted before there was a result; no report was written.", INTERRUPTED, debug)
    except BolzaError as error:
        _end(error, _with_place(error), BAD_INPUT, debug)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has left (| head)
            sys.stdout = open(os.devnull, "w")
            raise typer.Exit(UNEXPECTED) from error
        _end(error, _unexpected(error), UNEXPECTED, debug)
    except Exception as error:
        if _out_of_memory(error):
            sentence = (
                "there is not enough memory: make the network, the batch or the number of samples smaller."
            )
            _end(error, sentence, BAD_INPUT, debug)
        _end(error, _unexpected(error), UNEXPECTED, debug)


@contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Show a warning as one sentence, without the line of the library that raised it."""
    kept = warnings.formatwarning
    if not debug:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = kept


def tolerant_streams() -> None:
    """Show a replacement for characters that the terminal's encoding lacks, rather than fail over a σ."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Raise what the user's code raises as a `UserCodeError` that says where.

    Args:
        what: the thing that runs, as the user named it: ``"the model factory my_net:make"``.

    Raises:
        UserCodeError: names ``what``, the exception, and the file and line.
    """
    try:
        yield
    except (BolzaError, typer.Exit, typer.Abort):
        raise
    except (Exception, SystemExit) as error:
        where = _where(error.__traceback__)
        if not where and not isinstance(error, SyntaxError):  # which names its own file and line
            where = _last_line(error.__traceback__)
        text = str(error).strip().split("\n")[0]
        raise UserCodeError(
            f"{what} raised {type(error).__name__}{': ' + text if text else ''}{f' ({where})' if where else ''}: "
            "correct it there, or run again with --debug for the whole traceback."
        ) from error


def say(sentence: str, *, style: str = "bold red", label: str = "error") -> None:
    """Print one sentence on stderr, wrapped at words by the terminal and never inside a box."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{label}: ", style), sentence))


def _end(error: BaseException, sentence: str, code: int, debug: bool) -> None:
    if debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    say(sentence, label="stopped" if code == INTERRUPTED else "error")
    raise typer.Exit(code) from error


def _with_place(error: BolzaError) -> str:
    """What the error says and, where code of the user's is behind it, the line there."""
    cause = error.__cause__ if isinstance(error, UserCodeError) else None
    place = _where(cause.__traceback__) if cause is not None else ""
    return f"{error} ({place})" if place and place not in str(error) else str(error)


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("allocate memory", "out of memory", "not enough memory"))
    )


def _unexpected(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    named = f"{type(error).__name__}{': ' + text if text else ''}"
    where = _where(error.__traceback__)
    if where:
        return (
            f"your code raised {named} ({where}): correct it there, or run again with --debug to see it all."
        )
    return f"unexpected {named}: run again with --debug and report what it shows."


def _where(trace: TracebackType | None) -> str:
    """Place of the innermost line of the user's own code, or nothing if none took part."""
    library = [Path(__file__).resolve().parents[1], *map(Path, _library_folders())]
    for frame in reversed(traceback.extract_tb(trace)):
        file = Path(frame.filename)
        if file.is_file() and not any(file.resolve().is_relative_to(folder) for folder in library):
            return f"{_short(file)}, line {frame.lineno}"
    return ""


def _library_folders() -> list[str]:
    """Folders of the standard library and of installed packages, where no user writes code."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {str(Path(sysconfig.get_path(name)).resolve()) for name in names}
    return [*folders, str(Path(sys.prefix).resolve() / "bin")]


def _last_line(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f"{_short(Path(frames[-1].filename))}, line {frames[-1].lineno}" if frames else "no line known"


def _short(file: Path) -> str:
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
