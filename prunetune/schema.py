"""The command `python -m prunetune.schema`, which prints the JSON Schema of a sweep's file for editors."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

import json
from pathlib import Path

from prunetune.cli import commands
from prunetune.config.json_schema import sweep_schema
from prunetune.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = commands.parser(
        "schema",
        "Print the JSON Schema of a sweep's file. An editor with a YAML language server completes and checks "
        "files that begin with `# yaml-language-server: $schema=prunetune.schema.json`.",
        example="--output prunetune.schema.json",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there instead")
    given = parser.parse_args(arguments)
    text = json.dumps(sweep_schema(), indent=1, ensure_ascii=False) + "\n"
    if given.output is None:
        print(text, end="")
        return commands.EXIT_OK
    try:
        given.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {given.output}: cannot be written: {error.strerror}") from None
    return commands.EXIT_OK


if __name__ == "__main__":
    process.end(commands.run(main))
