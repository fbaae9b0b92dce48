"""The config reference and the JSON schema, generated from the dataclasses behind `train.RunConfig`.

    python -m tools.schema --markdown docs/config.md          the page for people
    python -m tools.schema --json salamander.schema.json      for editors: Taplo and VS Code's Even Better TOML read it
    python -m tools.schema --markdown docs/config.md --check  1 if the file is not what would be written

`-` as FILE prints. An editor applies the schema to a TOML whose first line is `#:schema path/to/salamander.schema.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from runtime.config import json_schema, markdown


def main(argv: list[str] | None = None, cls: type | None = None) -> int:
    """Writes or checks the files; `cls` is the config class, by default train.RunConfig. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", metavar="FILE", help="config reference")
    parser.add_argument("--json", metavar="FILE", help="JSON schema")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    args = parser.parse_args(argv)
    if not (args.markdown or args.json):
        parser.error("nothing to do: give --markdown FILE or --json FILE")
    if cls is None:
        from train import RunConfig as cls

    pages = {args.markdown: markdown, args.json: lambda c: json.dumps(json_schema(c), indent=1) + "\n"}
    try:
        stale = [name for name, make in pages.items() if name and not settle(name, make(cls), args.check)]
    except OSError as error:
        parser.error(str(error))
    for name in stale:
        print(f"{name} is not up to date; run the same command without --check", file=sys.stderr)
    return 1 if stale else 0


def settle(name: str, text: str, check: bool) -> bool:
    """Writes `text` to the file, or with `check` says whether it is there already."""
    path = Path(name)
    if check:
        return path.is_file() and path.read_text(encoding="utf-8") == text
    if name == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
