"""Fetch a checkpoint ahead of time: the built-in model or a Hub id.

    python -m scripts.download [CKPT] [--json]

Prints where the files lie. A later `generate.py --checkpoint CKPT` then needs no network.
"""

import sys

import cli
from checkpoint import DEFAULT_CHECKPOINT, locate


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.download", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default=DEFAULT_CHECKPOINT, metavar="CKPT")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a path")
    options = parser.parse_args(arguments)
    if options.checkpoint.startswith("random:"):
        raise ValueError(f"{options.checkpoint} has nothing to fetch; give a Hub id or {DEFAULT_CHECKPOINT}")
    path = locate(options.checkpoint).resolve()
    if options.json:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files if file.is_file())
        cli.print_json({"checkpoint": options.checkpoint, "path": str(path), "bytes": size})
    else:
        print(path)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
