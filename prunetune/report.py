"""`python -m prunetune.report RUN`: tables and figures of a sweep, from its `results.parquet`."""

from __future__ import annotations

import argparse

from prunetune import commands
from prunetune.errors import UserError
from prunetune.store import Store
from prunetune.tuning import reporting


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prunetune.report", description="Write a sweep's tables and figures into RUN/report/."
    )
    parser.add_argument("run", metavar="RUN", help="a sweep's folder, such as runs/digits, or its URI")
    given = parser.parse_args(arguments)
    location = given.run.rstrip("/")
    store = Store(location)
    written = reporting.write_report(store, location.rpartition("/")[2])
    if not written:
        raise UserError(
            f"command line: RUN = {given.run!r}: holds no results.parquet; a sweep writes it when it ends"
        )
    summary = store.read_file("report/summary.md")
    print((summary or b"").decode())
    for path in written:
        print(path)
    return commands.EXIT_OK


if __name__ == "__main__":
    commands.run(main)
