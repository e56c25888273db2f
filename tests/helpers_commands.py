"""Commands as the documents show them, held against the programs that would take them: nothing is run."""

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from sat.cli import BENCHMARKS, PROGRAMS
from sat.config import load_config

ROOT = Path(__file__).parents[1]
STARTS = ("python", "sat", "accelerate", "bash", "sbatch", "mlflow")
PLACEHOLDERS = {
    "CONFIG": "configs/demo.yaml",
    "data/mine/config.yaml": "configs/demo.yaml",  # made by `sat prepare`
    "R": "0",
    "HOST": "127.0.0.1",
    "PORT": "29500",
    "HOST:PORT": "127.0.0.1:29500",
    "STRIPES": "2",
    "PROGRAM": "shard_images",
    "COMMAND": "train",
}
"""Words that stand for something in a document, and what to put there."""
OTHERS = {
    "pipx install pre-commit",
    "pre-commit install",
    "ruff format .",
    "ruff check --fix .",
    "curl --data-binary @photo.jpg http://127.0.0.1:8000/caption",
}
"""Commands of others, word by word."""


def blocks(text: str) -> Iterator[list[str]]:
    """The indented and the fenced blocks of a Markdown document."""
    block: list[str] = []
    fenced = False
    for line in [*text.splitlines(), "end"]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            block.append(line if fenced else line[4:])
            continue
        elif not line and block and not fenced:
            continue  # a blank line inside an indented block
        if block:
            yield block
        block = []


def header(path: Path) -> Iterator[str]:
    """The commands in the comment that opens a script or a YAML file; a variable shown there is one of the script's."""
    text = path.read_text()
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        shown = re.match(r"#\s{2,}(\S.*)", line)
        if shown and not line.startswith("#!"):
            command = without_remark(shown[1])
            if re.fullmatch(r"[A-Z_]+", command):
                assert f"${{{command}" in text, f"{path.name} knows no {command}"
            else:
                yield command


def docstring(path: Path) -> Iterator[str]:
    """The commands in a module's docstring."""
    for block in blocks(ast.get_docstring(ast.parse(path.read_text())) or ""):
        if block[0].split()[0] in STARTS:
            yield from map(without_remark, block)


def without_remark(line: str) -> str:
    """What is said beside a command stands three spaces or more to the right of it."""
    return re.split(r"\s{3,}", line.strip())[0]


def joined(lines: list[str]) -> list[str]:
    """Lines with those that end in a backslash continued."""
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line.strip()]


def check(line: str) -> None:
    """Raise AssertionError, ValueError or the parser's own error unless the command would be taken as it stands."""
    words = shlex.split(line, comments=True)
    variables = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variables.append(words.pop(0).split("=")[0])
    open_ended = bool(words) and words[-1].endswith("...")
    words = [PLACEHOLDERS.get(word, word) for word in words if not word.endswith("...")]
    assert words, f"no command: {line}"
    start = words[0]
    if start == "bash":
        check_script(words[1], words[2:], variables, open_ended)
    elif start == "sbatch":
        check_sbatch(words[1:])
    elif start == "accelerate":
        check_launch(words[1:])
    elif start == "python":
        assert words[1] == "-m", line
        check_module(words[2], words[3:], open_ended)
    elif start == "sat":
        check_sat(words[1:], open_ended)
    elif start == "mlflow":
        check_mlflow(words[1:])
    elif start == "torchrun":
        check_torchrun(words[1:])
    else:
        assert " ".join(words) in OTHERS, f"nobody checks this command: {line}"


def check_script(script: str, arguments: list[str], variables: list[str], open_ended: bool = False) -> None:
    """A shell script of ours: it exists, parses, knows the variables and takes the arguments."""
    text = (ROOT / script).read_text()
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    for variable in variables:
        assert f"${{{variable}" in text, f"{script} knows no {variable}"
    if script in ("launch/demo.sh", "launch/setup.sh", ".ci/run"):
        assert not arguments, f"{script} takes no arguments"
    elif script == "launch/flickr8k.sh":
        assert "=" not in arguments[0]
        check_overrides(arguments[1:])
    elif script == "tests/run.sh":
        check_tests(arguments)
    elif script == "slurm/preprocess.sh":
        assert arguments[0].isdecimal()
        check_module(f"preprocessing.{arguments[1]}", arguments[2:], open_ended)
    elif script == "slurm/on_all_nodes.sh":
        check_sat(arguments, open_ended=True)
    else:
        raise AssertionError(f"nobody checks {script}")


def check_tests(arguments: list[str]) -> None:
    words = iter(arguments)
    for word in words:
        if word == "-m":
            next(words)
        else:
            assert word == "--checks" or (ROOT / word).is_file(), word


def check_sbatch(words: list[str]) -> None:
    script = next(word for word in words if not word.startswith("--"))
    known = {"--nodes", "--gpus-per-node", "--cpus-per-task", "--time"}
    options, arguments = words[: words.index(script)], words[words.index(script) + 1 :]
    assert {option.split("=")[0] for option in options} <= known, options
    (command,) = re.findall(r'bash slurm/on_all_nodes\.sh (\S+) .*"\$@"', (ROOT / script).read_text())
    check_sat([command, *arguments])


def check_launch(words: list[str]) -> None:
    """`accelerate launch` by its own parser, the module's arguments by the module's."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    given = launch_command_parser().parse_args(words[1:])
    assert (ROOT / given.config_file).is_file() and given.module
    check_module(given.training_script, given.training_script_args)


def check_torchrun(words: list[str]) -> None:
    """`torchrun` by its own parser, the module's arguments by the module's."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.module
    check_module(given.training_script, given.training_script_args)


def check_module(module: str, arguments: list[str], open_ended: bool = False) -> None:
    """`python -m MODULE ARGUMENTS`."""
    if module in ("tests.chaos", "tests.preprocessing_chaos"):
        importlib.import_module(module).parser().parse_args(arguments)
        return
    assert any(module.startswith(package) for package in ("sat.", "preprocessing.")), module
    if module == "sat.cli":
        check_sat(arguments, open_ended)
    else:
        assert "__main__" in (ROOT / (module.replace(".", "/") + ".py")).read_text(), f"{module} is no program"
        check_program(importlib.import_module(module).main, arguments, open_ended)
    if module == "sat.train" and not open_ended:
        load_config(ROOT / arguments[0], arguments[1:])


def check_sat(words: list[str], open_ended: bool = False) -> None:
    """`sat COMMAND ARGUMENTS`."""
    if words[0] == "bench":
        module = BENCHMARKS[words[1]][0]
        name = "run" if module.startswith("sat.") else "main"
        check_program(getattr(importlib.import_module(module), name), words[2:], open_ended)
        return
    rest = iter(words[1:])
    arguments = []
    for word in rest:
        if word == "--launch":
            assert (ROOT / next(rest)).is_file()
        elif word in ("--processes", "--machines", "--machine"):
            assert next(rest).isdecimal()
        elif word == "--address":
            assert re.fullmatch(r"[^:]+:\d+", next(rest))
        else:
            arguments.append(word)
    check_module(PROGRAMS[words[0]][0], arguments, open_ended)


def check_program(main: Callable[..., object], arguments: list[str], open_ended: bool = False) -> None:
    """Arguments by the parser that the program's function gets from typer; `open_ended`: more would follow."""
    import typer

    application = typer.Typer(add_completion=False)
    application.command()(main)
    command = typer.main.get_command(application)
    if arguments != ["--help"]:
        command.make_context(main.__module__, list(arguments), resilient_parsing=open_ended)


def check_mlflow(words: list[str]) -> None:
    import click
    from mlflow.cli import cli

    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, f"mlflow has no command {words[0]}"
    command.make_context("mlflow", words[1:])


def check_overrides(words: list[str]) -> None:
    load_config(ROOT / "configs/coco_paper.yaml", words)


def check_python(source: str) -> None:
    """Python that imports from us: it parses and the names are there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
