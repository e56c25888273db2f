"""launch/Dockerfile, held against what it must agree with: no image is built here."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

from tests.helpers_commands import ROOT

TEXT = (ROOT / "launch/Dockerfile").read_text()
INSTRUCTIONS = [
    (words[0], words[1])
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines()
    if line and not line.startswith("#") and (words := line.split(maxsplit=1))
]
SETUP = (ROOT / "launch/setup.sh").read_text()


def of(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_environment_is_made_by_the_set_up_script_and_by_nothing_else():
    assert [command for command in of("RUN") if "setup.sh" in command] == ["bash launch/setup.sh"]
    assert not re.search(r"\b(pip|conda|uv) install\b|curl|wget", "\n".join(of("RUN")))
    assert "SAT_VENV=/opt/venv PATH=/opt/venv/bin:$PATH" in of("ENV")[0]
    assert "${SAT_VENV:-" in SETUP


def test_the_base_has_the_cuda_of_the_constraints_and_a_python_that_set_up_takes():
    (base,) = of("FROM")
    version, system = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-runtime-ubuntu([\d.]+)", base).groups()
    assert pinned("nvidia-cuda-runtime").startswith(f"{version}.")
    python = {"24.04": "python3.12"}[system]
    assert python in re.search(r"for name in (.*); do", SETUP)[1].split()


def test_system_packages_are_those_that_set_up_and_ci_name():
    wanted = re.search(r"packages=\((.*)\)", (ROOT / ".ci/run").read_text())[1].split()
    (installed,) = [command for command in of("RUN") if "apt-get" in command]
    assert "g++" in wanted and "g++" in installed.split()
    assert "apt-get install python3-venv" in SETUP and "python3-venv" in installed.split()


def test_all_that_set_up_and_the_package_read_is_copied_and_not_ignored():
    copied = {source for words in of("COPY") for source in words.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    read = set(re.findall(r"\$root/(\w[\w.]*)", SETUP)) | packages | {project["project"]["readme"]}
    assert read <= copied and all((ROOT / name).exists() for name in copied)
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_through
    last = max(place for place, (name, _) in enumerate(INSTRUCTIONS) if name == "COPY")
    assert last < INSTRUCTIONS.index(("RUN", "bash launch/setup.sh"))


def test_each_instruction_is_well_formed_and_what_it_brings_is_fixed():
    """What hadolint says of a Dockerfile, and what a shell says of its commands."""
    assert {name for name, _ in INSTRUCTIONS} == {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    assert INSTRUCTIONS[0][0] == "FROM" and re.fullmatch(r"[^:@]+:(?!latest)[\w.-]+", INSTRUCTIONS[0][1])
    for command in of("RUN"):
        assert subprocess.run(["sh", "-n", "-c", command], capture_output=True).stderr == b""
        for install in re.findall("apt-get install[^&;]*", command):
            assert {"-y", "--no-install-recommends"} <= set(install.split())
            assert command.startswith("apt-get update && ") and command.endswith("rm -rf /var/lib/apt/lists/*")
    assert all(os.path.isabs(folder) for folder in of("WORKDIR"))
    assert all(re.fullmatch(r"\w+=\S*", word) for words in of("ENV") for word in words.split())
    assert [json.loads(command) for command in of("CMD")] == [["sat", "--help"]]


def test_what_is_copied_is_a_whole_project_and_its_programs_write_nothing_into_it(tmp_path):
    """Built, compiled and called as the image's is, without the packages that it brings."""
    image = tmp_path / "sat"
    image.mkdir()
    for *sources, to in (words.split() for words in of("COPY")):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, image / to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, image / to)
    here = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    here |= {"PYTHONPATH": str(image), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "install", *alone, "--target", str(tmp_path / "venv"), "--editable", str(image))
    (compiling,) = [command.partition(";")[0].split() for command in of("RUN") if "compileall" in command]
    assert compiling[0] == "python" and compiling[-1] == of("WORKDIR")[0]
    run(*compiling[1:-2], str(image))
    before = sorted(image.rglob("*"))
    assert run("-c", "import sat.cli; print(sat.cli.__file__)").strip() == str(image / "sat/cli.py")
    (command,) = [json.loads(words) for words in of("CMD")]
    assert "train" in run("-m", "sat.cli", *command[1:])
    assert sorted(image.rglob("*")) == before
