"""The console script `prunetune sweep|train|report|schema …`, whose subcommands are the commands."""

from __future__ import annotations

import importlib
from typing import NoReturn

from prunetune.cli import process

_COMMANDS = {
    "sweep": "search a configuration per density",
    "train": "train one configuration at full budget",
    "report": "write a sweep's tables and figures",
    "schema": "print the JSON Schema of a sweep's file, for editors",
}


def main() -> NoReturn:
    """Run the console script's command, and exit with its exit code."""
    process.begin()
    from prunetune.cli import commands

    process.end(commands.run(_dispatch))


def _dispatch(arguments: list[str]) -> int:
    from prunetune.cli import commands
    from prunetune.errors import UserError, did_you_mean

    usage = "usage: prunetune COMMAND …\n\n" + "\n".join(
        f"  {name:<8}{meaning}" for name, meaning in _COMMANDS.items()
    )
    usage += "\n\nexample: prunetune sweep sweeps/digits.yaml search.trials_per_density=8"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return commands.EXIT_OK if arguments else commands.EXIT_WRONG_INPUT
    name, *rest = arguments
    if name not in _COMMANDS:
        raise UserError(f"{name!r}: unknown command{did_you_mean(name, _COMMANDS)}\n\n{usage}")
    return int(importlib.import_module(f"prunetune.{name}").main(rest))


if __name__ == "__main__":
    main()
