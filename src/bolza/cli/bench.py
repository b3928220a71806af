"""``bolza bench``: run the benchmark scripts of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolza.ops.errors import ArgumentError

__all__ = ["bench"]


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Which scripts, such as meanfield; all by default."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write what was measured to benchmarks/records/NAME.json.")
    ] = False,
) -> None:
    """Time the library against what you would use instead (needs a checkout of the repository).

    [dim]Example:[/dim]  bolza bench meanfield --record
    """
    import os
    import subprocess
    import sys

    from bolza.cli._load import near

    folder = _folder()
    scripts = {file.stem: file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")}
    for name in names or ():
        if name not in scripts:
            raise ArgumentError(
                f"benchmark {name!r} is not in {folder}{near(name, scripts) or '; there are ' + ', '.join(scripts)}"
            )
    environment = dict(os.environ)
    if record:
        environment["BENCH_RECORDS"] = str(folder / "records")
    failed = []
    for name in names or scripts:
        typer.secho(f"\n{name}", bold=True)
        if subprocess.run([sys.executable, str(scripts[name])], env=environment, check=False).returncode:
            failed.append(name)
    if failed:
        raise ArgumentError(
            f"these benchmarks stopped with an error: {', '.join(failed)}; what they said is above."
        )


def _folder() -> Path:
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "benchmarks").is_dir() and (root / "src" / "bolza").is_dir():
            return root / "benchmarks"
    raise ArgumentError(
        "the benchmark scripts are not part of the installed package: run 'bolza bench' in a checkout of the "
        "repository, in the folder that holds benchmarks/."
    )
