"""Whatever the documents tell a reader to type is taken by the programs as it stands; what they say exists is there."""

import importlib
import re
import shlex

import pytest
import yaml

from tests.helpers_commands import ROOT, blocks, check, check_overrides, check_python, docstring, header, joined

DOCUMENTS = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md"]
HEADERS = sorted(
    [*ROOT.glob("configs/*.yaml"), *ROOT.glob("launch/*.*"), *ROOT.glob("slurm/*.sh"), ROOT / "tests/run.sh"]
)
MODULES = sorted([*ROOT.glob("sat/**/*.py"), *ROOT.glob("preprocessing/**/*.py")])
SETTING = re.compile(r"'?[a-z]+\.[a-z_]+=")


def kind(block: list[str]) -> str:
    if SETTING.match(block[0]):
        return "settings"
    if re.match(r"[a-z_]+/", block[0]):
        return "tree"
    if re.fullmatch(r"\w+,\w+", block[0]):
        return "table"
    return "python" if block[0].startswith(("from ", "import ")) else "commands"


def found() -> list[tuple[str, str]]:
    """(where, command) of every command that a document, a script's header or a docstring shows."""
    lines = []
    for path in DOCUMENTS:
        shown = [line for block in blocks(path.read_text()) if kind(block) == "commands" for line in joined(block)]
        lines += [(path.name, line) for line in shown]
    for path in HEADERS:
        lines += [(path.name, line) for line in joined(list(header(path)))]
    for path in MODULES:
        lines += [(str(path.relative_to(ROOT)), line) for line in joined(list(docstring(path)))]
    return lines


def blocks_of(wanted: str) -> list[list[str]]:
    return [block for path in DOCUMENTS for block in blocks(path.read_text()) if kind(block) == wanted]


@pytest.mark.parametrize(("where", "line"), found(), ids=lambda value: value.split("#")[0].strip()[:70])
def test_every_command_is_taken_as_it_stands(where, line):
    try:
        check(line)
    except SystemExit as refusal:  # an argparse parser
        pytest.fail(f"{where}: {line}: exit {refusal.code}")


def test_the_documents_show_commands_of_every_kind():
    words = {line.split()[0] for where, line in found() if where == "README.md"}
    assert {"bash", "python", "sat", "accelerate", "sbatch", "mlflow"} <= words
    assert blocks_of("settings") and blocks_of("tree") and blocks_of("python")
    assert {where for where, _ in found()} >= {path.name for path in HEADERS if path.suffix == ".yaml"}


def test_every_setting_shown_is_one():
    for block in blocks_of("settings"):
        for line in joined(block):
            check_overrides(shlex.split(line, comments=True))


def test_python_shown_imports_what_is_there():
    for block in blocks_of("python"):
        check_python("\n".join(block))


def test_the_tree_is_the_tree():
    """Every path in it exists, and every module of ours stands in it."""
    (block,) = blocks_of("tree")
    named: set[str] = set()
    folder: dict[int, str] = {}
    for line in block:
        depth = len(line) - len(line.lstrip())
        words = re.split(r"\s{2,}", line.strip())[0]
        above = "".join(folder[d] for d in sorted(folder) if d < depth)
        for word in words.split():
            assert (ROOT / above / word).exists(), f"{above}{word}"
            named.add(above + word)
        if words.endswith("/"):
            folder = {d: name for d, name in folder.items() if d < depth} | {depth: words}
    ours = {str(path.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py"}
    assert not ours - named, ours - named


def test_the_types_that_flow_are_there():
    rows = re.findall(r"^\| `(\w+)` \| `([\w./]+)\.py` \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) > 10
    for name, module in rows:
        assert isinstance(getattr(importlib.import_module(module.replace("/", ".")), name), type), (module, name)


def test_links_within_the_project_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_file_named_exists():
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:sat|preprocessing|tests|launch|configs|slurm)/[\w./]+)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_hooks_run_what_the_checks_run():
    run = (ROOT / "tests/run.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]  # nothing is fetched
    for hook in hooks[0]["hooks"]:
        assert hook["name"] in run and f"exec {hook['name']}" in hook["entry"] and hook["language"] == "system"
    assert "tests/run.sh --checks || exit" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "python -m preprocessing.shard_images --annotation a --images b --out c",
        "python -m preprocessing.shards --out c",
        "accelerate launch --config_file launch/none.yaml -m sat.train configs/demo.yaml",
        "accelerate launch --config_file launch/cpu.yaml -m sat.train configs/demo.yaml train.epoch=1",
        "accelerate launch --config_file launch/cpu.yaml -m sat.train configs/none.yaml",
        "sat bench steps",
        "sat evaluate runs/demo --splits test",
        "sbatch --nodes=1 slurm/none.sh runs/demo",
        "bash launch/demo.sh --fast",
        "SPEED=2 bash launch/demo.sh",
        "mlflow ui --backend sqlite:///x",
        "curl https://example.org",
    ],
)
def test_a_command_that_no_program_takes_is_found(line):
    with pytest.raises((Exception, SystemExit)):  # whatever the program's own parser raises
        check(line)


def test_blocks_are_found_indented_and_fenced():
    text = "a\n\n    bash x\n    bash y \\\n      z\n\nb\n```\nsat c\n```\n"
    assert [joined(block) for block in blocks(text)] == [["bash x", "bash y z"], ["sat c"]]
