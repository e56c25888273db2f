"""launch/demo.sh from an empty folder to its table of scores, as small as it gets; a second call reuses all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers_commands import blocks

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.end_to_end


def demo(environment: dict[str, str], out: Path) -> str:
    variables = environment | {"SCENES": "24", "EPOCHS": "1", "OUT": str(out)}
    command = ["bash", "launch/demo.sh"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_demonstration_runs_to_its_table_and_a_second_one_makes_nothing_anew(environment, tmp_path):
    first = demo(environment, tmp_path)
    assert "$ python -m preprocessing.synthetic" in first and "CIDEr" in first
    run = tmp_path / "runs/demo-scenes24-epochs1"
    scores = json.loads((run / "summary.json").read_text())["scores"]
    assert {"model", "blind", "most_frequent"} <= scores.keys()
    truth = json.loads((run / "summary.json").read_text())["truth"]
    assert truth.keys() == {"model", "blind", "reference"} and truth["reference"]["captions"] == 1
    page = (run / "report-test.html").read_text()
    assert page.split("All pictures")[-1].count("<article") == 8 and f"page       {run / 'report-test.html'}" in first
    made = files(tmp_path)
    assert any(name.startswith("weights/") for name in made) and any(name.endswith(".png") for name in made)

    second = demo(environment, tmp_path)
    assert "is up to date" in second and "reused" in second and "0 rendered now" in second
    assert second[second.index("$ python -m sat.summary") :] == first[first.index("$ python -m sat.summary") :]
    kept = {
        name: time for name, time in made.items() if Path(name).suffix in (".safetensors", ".tar", ".parquet", ".png")
    }
    assert kept and kept.items() <= files(tmp_path).items()

    (shown,) = [block for block in blocks((ROOT / "README.md").read_text()) if block[0].startswith("from sat.")]
    picture = next((tmp_path / "data/demo-scenes24/scenes/images/test").iterdir())
    names = {"runs/demo": run, '"weights"': f'"{tmp_path}/weights"', "photo.jpg": picture}
    program = "\n".join(shown)
    for name, here in names.items():
        assert name in program
        program = program.replace(name, str(here))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("['"), done.stdout + done.stderr
