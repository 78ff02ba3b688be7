"""The command `python -m prunetune.report RUN …`, which makes tables and figures from sweeps' results."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

from pathlib import Path

from prunetune.cli import commands
from prunetune.errors import UserError
from prunetune.records import report as reporting
from prunetune.store import Store


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = commands.parser(
        "report",
        "Write a sweep's tables and figures into RUN/report/. Of several sweeps: print one table "
        "that compares them, a row each, over seeds.",
        example="runs/digits",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a sweep's folder, such as runs/digits")
    parser.add_argument("--output", type=Path, help="of several sweeps: write the table to this file")
    given = parser.parse_args(arguments)
    if len(given.runs) == 1:
        return _one(given.runs[0].rstrip("/"))
    frames = {}
    for location in given.runs:
        frame = reporting.read_results(Store(location.rstrip("/")))
        if frame is None:
            raise _no_results(location)
        frames[_name(location)] = frame
    table = reporting.comparison(frames)
    print(table, end="")
    if given.output is not None:
        try:
            given.output.write_text(table, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {given.output}: cannot be written: {error.strerror}") from None
    return commands.EXIT_OK


def _one(location: str) -> int:
    store = Store(location)
    written = reporting.write_report(store, _name(location))
    if not written:
        raise _no_results(location)
    print((store.read_file("report/summary.md") or b"").decode())
    for path in written:
        print(path)
    return commands.EXIT_OK


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _no_results(location: str) -> UserError:
    return UserError(
        f"command line: RUN = {location!r}: holds no results.parquet; a sweep writes it when it ends"
    )


if __name__ == "__main__":
    process.end(commands.run(main))
