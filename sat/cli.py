"""The `sat` command. The surprise: sub-commands load their module only when called, so `sat --help` is instant."""

import importlib
import subprocess
import sys

BENCHMARKS = {
    "step": "training step against a straightforward per-caption loop",
    "decode": "batched beam search against one image at a time",
    "features": "feature extraction against the bare network and a naive loop",
    "loader": "the reader against a raw sequential read and stock webdataset",
    "plan": "the sample order of 1e9 samples over 1,024 ranks",
}

USAGE = "usage: sat bench {" + "|".join(BENCHMARKS) + "} [--json FILE] [--help]"


def main() -> None:
    """Entry point of the console script `sat`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        print("\n".join(f"  bench {name:10} {what}" for name, what in BENCHMARKS.items()))
        return
    if arguments[0] != "bench" or len(arguments) < 2 or arguments[1] not in BENCHMARKS:
        raise SystemExit(f"error: unknown command {' '.join(arguments)!r}\n{USAGE}")
    if arguments[1] == "features":  # a program of another package
        sys.exit(subprocess.run([sys.executable, "-m", "preprocessing.bench_features", *arguments[2:]]).returncode)
    import typer

    sys.argv = [f"sat bench {arguments[1]}", *arguments[2:]]
    try:
        typer.run(importlib.import_module(f"sat.bench.{arguments[1]}").run)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
