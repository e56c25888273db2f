"""The command `sat`, and how every program of it says what went wrong: in one sentence, once.

`sat --help` is instant: a sub-command's module is loaded when it is called. `run_program` runs one program. What a user
or a file can cause is `error: ...` on standard error and exit status 1; a wrong option has exit status 2; 75 says that
nobody is to blame and the same command is to be started again. Of the ranks of a launch only the first that fails
speaks, all end at once, and nobody waits for a rank that is gone.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sat.credentials import shown
from sat.stopping import START_AGAIN, StartAgain

PROGRAMS = {
    "prepare": ("preprocessing.prepare", "pictures and captions of any layout, ready to train on"),
    "lint": (
        "preprocessing.lint",
        "what the splits of data share that would flatter a model: pictures, captions, words",
    ),
    "train": ("sat.train", "train the captioner of a configuration, or go on with it"),
    "evaluate": ("sat.evaluate", "score a trained model on a split"),
    "score": ("preprocessing.score", "score anybody's captions, without a model"),
    "compare": ("sat.compare", "whether one run is better than another, and on which pictures"),
    "caption": ("sat.caption", "caption picture files, with pictures of the attention"),
    "draw": ("sat.draw", "pictures of the attention over a split's pictures"),
    "report": ("sat.report.report", "one HTML page of scores, curves and captioned pictures, of one run or several"),
    "serve": ("sat.serve", "answer pictures with captions over HTTP: a page, and JSON"),
    "sync": ("sat.tracking.mlflow", "bring a run's metrics and artifacts to MLflow"),
    "doctor": ("sat.doctor.examine", "what would stop a long run, found before it starts, and how to mend it"),
    "summary": ("sat.summary", "the table of a run's scores"),
}
"""Sub-command -> the module whose `main` it calls, and what it does."""

BENCHMARKS = {
    "step": ("sat.bench.step", "training step against a straightforward per-caption loop"),
    "train": ("sat.bench.train", "the real loop against its bare step, on one process and on two"),
    "decode": ("sat.bench.decode", "batched beam search against one image at a time"),
    "features": ("preprocessing.bench_features", "feature extraction against the bare network and a naive loop"),
    "loader": ("sat.bench.loader", "the reader against a raw sequential read and stock webdataset"),
    "reads": ("sat.bench.reads", "bytes, runs and mixing of an epoch over disk and HTTP, by 1, 4 and 8 ranks"),
    "metrics": ("sat.bench.metrics", "the metrics against pycocoevalcap's own, to the last bit"),
    "plan": ("sat.bench.plan", "the sample order of 1e9 samples over 1,024 ranks"),
}
"""Benchmark -> the module whose `run` measures it (one of another package runs as a process), and what it compares."""

LAUNCHED = ("train", "evaluate", "doctor")
"""Programs that run on several processes; `--launch FILE` starts these."""

USAGE = """usage: sat COMMAND [OPTIONS]      sat COMMAND --help shows the options

{programs}
{benchmarks}

  sat train --launch launch/cpu.yaml [--processes N] CONFIG ... runs on the processes that an accelerate configuration
  describes, as `accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG ...` does, but an error is one
  sentence and signals reach every process. So do evaluate and doctor. On many machines start it on each, with
  --machines M --machine R --address HOST:PORT: how many, which of them this is (from 0), where machine 0 is to be
  reached; N is then over all."""

OTHER_MACHINE_WAITS_S = 10.0
"""A rank without sight of rank 0 leaves it this long to speak and to have everybody ended."""


def main() -> None:
    """Entry point of `sat` and `python -m sat.cli`."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help") or (command == "bench" and not set(arguments[:1]) - {"-h", "--help"}):
        print(_usage())
    elif command in LAUNCHED and any(word.split("=")[0] == "--launch" for word in arguments):
        run_program(lambda: _launch(command, arguments), [], f"sat {command}")
    elif command in PROGRAMS:
        program = importlib.import_module(PROGRAMS[command][0]).main
        more = "--launch FILE [--processes N] runs it on several processes; see sat --help." * (command in LAUNCHED)
        run_program(program, arguments, f"sat {command}", more)
    elif command == "bench" and arguments[0] in BENCHMARKS:
        _benchmark(arguments[0], arguments[1:])
    else:
        known = BENCHMARKS if command == "bench" else [*PROGRAMS, "bench"]
        name = " ".join([command, *arguments[:1]]) if command == "bench" else command
        _say(f"there is no command {name!r}; choose one of {', '.join(known)} (sat --help)")
        sys.exit(2)


def run_program(
    program: Callable[..., object], arguments: Sequence[str] | None = None, name: str = "", more: str = ""
) -> None:
    """Run a function as a typer program, by default with this process's arguments; returns when it has succeeded.

    ValueError and OSError end it with one sentence and exit status 1, a wrong option with exit status 2, `StartAgain`
    with 75. `name` is how the program is called, `more` stands at the end of its `--help`.
    """
    import typer

    application = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    application.command(epilog=more or None)(program)
    command = typer.main.get_command(application)
    name = name or f"python -m {program.__module__ if program.__module__ != '__main__' else _module_name()}"
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command.main(given, prog_name=name, standalone_mode=False)
    except (ValueError, OSError) as error:
        _end(_sentence(error), 1)
    except StartAgain as error:
        _end(_sentence(error), START_AGAIN)
    except KeyboardInterrupt:
        _end("", 130)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, for a wrong option
            _end(f"{error.format_message()} (see {name} --help)", error.exit_code)
        if not _launched():
            raise
        _end(traceback.format_exc(), 1, prefix="")
    if isinstance(status, int) and status:
        sys.exit(status)


# ------------------------------------------------------------------ sub-commands


def _usage() -> str:
    programs = "\n".join(f"  sat {name:15} {what}" for name, (_, what) in PROGRAMS.items())
    benchmarks = "\n".join(f"  sat bench {name:9} {what}" for name, (_, what) in BENCHMARKS.items())
    return USAGE.format(programs=programs, benchmarks=benchmarks)


def _benchmark(name: str, arguments: list[str]) -> None:
    module = BENCHMARKS[name][0]
    if module.startswith("sat."):
        run_program(importlib.import_module(module).run, arguments, f"sat bench {name}")
        return
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, *arguments]
    sys.exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode)


def _launch(command: str, arguments: list[str]) -> int:
    """Take the launcher's options out of the arguments and start the ranks; their exit status."""
    rest, taken = [], {"--launch": "", "--processes": "0", "--machines": "1", "--machine": "0", "--address": ""}
    words = iter(arguments)
    for word in words:
        option, _, value = word.partition("=")
        if option in taken:
            taken[option] = value or next(words, "")
        else:
            rest.append(word)
    if not Path(taken["--launch"]).is_file():
        raise ValueError(f"no launcher configuration {taken['--launch']!r}; the shipped ones are in launch/")
    for option in ("--processes", "--machines", "--machine"):
        if not taken[option].isdecimal():
            raise ValueError(f"{option} is {taken[option]!r}; it must be a whole number")
    launcher = importlib.import_module("sat.engine.launcher")
    machines = None
    if taken["--address"]:
        host, _, port = taken["--address"].rpartition(":")
        if not (host and port.isdecimal() and int(taken["--machine"]) < int(taken["--machines"])):
            raise ValueError(
                "several machines need --machines N, --machine R from 0 to N-1, and --address HOST:PORT of machine 0; "
                f"given were {taken['--machines']}, {taken['--machine']} and {taken['--address']!r}"
            )
        machines = launcher.Machines(int(taken["--machines"]), int(taken["--machine"]), host.strip("[]"), int(port))
    elif taken["--machines"] != "1":
        raise ValueError(f"--machines {taken['--machines']} needs --address HOST:PORT of machine 0")
    status = launcher.launch(Path(taken["--launch"]), PROGRAMS[command][0], rest, int(taken["--processes"]), machines)
    assert isinstance(status, int)
    return status


# ------------------------------------------------------------------ errors


def _sentence(error: Exception) -> str:
    """What is said of an error, in one line; a system call's names its file first."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return shown(" ".join(text.split())) or type(error).__name__


def _say(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _end(words: str, status: int, prefix: str = "error: ") -> NoReturn:
    """Say it, unless another rank of this launch has spoken, and end this process."""
    if not _launched():
        if words:
            print(f"{prefix}{words}", file=sys.stderr, flush=True)
        sys.exit(status)
    if _is_first_to_fail(words) and words:
        print(f"{prefix}{words}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)  # now: its peers must see that it is gone, and a gloo thread could hold up a proper exit


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ


def _is_first_to_fail(words: str) -> bool:
    """Whether this rank speaks: the first to fail on its machine, where rank 0 is or nobody ends us for its failure.

    torch's launcher gives each rank a file of its own for an error, all in one folder made for this launch. What is
    written to it the launcher shows at the end of its own report.
    """
    first = os.environ.get("GROUP_RANK", "0") == "0"
    if mine := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": words, "extraInfo": {"py_callstack": words, "timestamp": str(int(time.time()))}}
        try:
            with open(Path(mine).parents[1] / "failed", "x"):
                Path(mine).write_text(json.dumps({"message": report}))
        except FileExistsError:
            return False
        except OSError:
            pass  # better said twice than not at all
    else:
        first = os.environ.get("RANK", "0") == "0"
    if not first:
        time.sleep(OTHER_MACHINE_WAITS_S)
        print(f"rank {os.environ.get('RANK')} on {socket.gethostname()}:", end=" ", file=sys.stderr)
    return True


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


if __name__ == "__main__":
    main()
