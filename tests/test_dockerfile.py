"""launch/Dockerfile, held against what it must agree with: no image is built here."""

import re
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
