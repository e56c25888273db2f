"""`sat doctor` on two real processes: one table, one exit status, whatever a single rank meets."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat.config import load_config, save_config
from sat.doctor.rows import FAILED, OK, WARNING, Row
from tests.helpers_launch import start
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

ROOT = Path(__file__).parents[1]
CPUS = ["--config_file", "launch/cpu.yaml", "--num_processes", 2]

PROGRAM = '''
"""The checks of `sat doctor` twice: the last rank sees other data and none, then it fails alone in a step."""
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from sat.cli import run_program
from sat.config import load_config
from sat.doctor import examine, steps

last, plain = os.environ["RANK"] == "1", steps.take_step

def take_step(config, learner, batches, step, run, meter):
    if last and step == 2:
        raise RuntimeError("out of memory")
    return plain(config, learner, batches, step, run, meter)

def main(config: Path, other: Path, out: Path) -> None:
    examine.check_metrics = lambda names: []
    steps.seconds_to_score = lambda images, names: 0.0
    engine, found = examine.form_group("fp32", 60)
    for name, settings in {"no_data": [f"data.features={out}/none"], "fails": [f"data.features={other}"]}.items():
        given = load_config(config, settings if last else [])
        found += examine.examine(given, engine, True, 0.0, print)
        if engine.processes.is_main:
            (out / f"{name}.json").write_text(json.dumps([asdict(row) for row in found]))
        steps.take_step = take_step
    examine.end(engine, engine.processes, 1)

if __name__ == "__main__":
    run_program(main)
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("launched")
    make_feature_dataset(root / "data", {"train": 24, "val": 6})
    config = load_config(None, [*SMALL, *with_tokenizer(root), f"train.run_dir={root}/run", "train.epochs=3"])
    save_config(config, root / "config.yaml")
    return root


def run(root: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{root}", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_print_one_table_and_end_with_its_exit_status(root):
    given = ["--launch", "launch/cpu.yaml", root / "config.yaml", "train.global_batch=3", "train.accumulation_steps=2"]
    done = run(root, "-m", "sat.cli", "doctor", *given, "--json", root / "doctor.json")
    document = json.loads((root / "doctor.json").read_text())
    rows = [Row(**row) for row in document["rows"]]
    assert [row.check for row in rows if row.state == FAILED] == ["batch"], done.stdout + done.stderr
    assert (done.returncode, document["ranks"], document["verdict"]) == (1, 2, FAILED)
    by_name = {row.check: row for row in rows}
    assert {"METEOR", "CIDEr", "exchange", "steps", "whole run"} <= by_name.keys()
    assert by_name["METEOR"].state == OK and "0.321712" in by_name["METEOR"].found
    assert by_name["exchange"].values["gigabytes_per_s"] > 0
    lines = done.stdout.splitlines()
    assert sum(line.startswith(("ok ", "warning ", "failed ")) for line in lines) == len(rows)
    assert lines[-1].startswith("1 failed, ") and not (root / "run").exists()


def test_what_one_rank_meets_alone_is_a_row_and_holds_up_nobody(root):
    (root / "program.py").write_text(PROGRAM)
    make_feature_dataset(root / "other", {"train": 24, "val": 6}, name="other")
    began = time.monotonic()
    code, said = start([root / "program.py", root / "config.yaml", root / "other", root], CPUS)
    assert code == 1 and time.monotonic() - began < 200, said

    first, both = (
        [Row(**row) for row in json.loads((root / name).read_text())] for name in ("no_data.json", "fails.json")
    )
    failed = {row.check: row.found for row in first if row.state == FAILED}
    assert list(failed) == ["shards", "data"]
    assert all("rank 1: " in found and "not a finished data set" in found for found in failed.values())
    assert first[-1].check == "steps" and first[-1].state == WARNING

    second = both[len(first) :]
    failed = {row.check: row.found for row in second if row.state == FAILED}
    assert list(failed) == ["shards", "steps"] and "rank 1: its digest is" in failed["shards"]
    assert "rank 0 on " in failed["steps"] and "has lost another rank" in failed["steps"]
    assert [line for line in said.splitlines() if line.startswith("rank")] == ["rank 1: RuntimeError: out of memory"]
