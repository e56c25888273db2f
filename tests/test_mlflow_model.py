"""The best model in MLflow captions JPEG bytes by MLflow's own commands, from code and safetensors."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sat import caption, files
from sat.captioning import Captioning
from sat.config import TrackingConfig, load_config
from sat.export import save_model
from sat.model.captioner import Captioner
from sat.model.encoders.resnet import ResNet
from sat.model.spec import Sizes
from sat.shards.features import EncoderSpec, FeatureSpec, Transform
from sat.text import build_tokenizer
from sat.tracking.journal import Tracker
from sat.tracking.log_model import log_model
from sat.tracking.mlflow import sync
from sat.tracking.model import requirements
from tests.helpers_tracking import ROOT, NoUploader, client, replace_uploader, wait_for

SMALL = ["model.lstm_dim=8", "model.embedding_dim=6", "model.attention_dim=5", "eval.max_length=6", "eval.beam_size=2"]
MLFLOW = [sys.executable, "-m", "mlflow", "models"]


def run_folder(root: Path) -> Path:
    """A run folder with a model whose words depend on the picture; its encoder is `weights/encoder.safetensors`."""
    torch.manual_seed(0)
    (root / "weights").mkdir()
    save_file(ResNet(stage=1).state_dict(), root / "weights/encoder.safetensors")
    tokenizer, config = (
        build_tokenizer(["a red circle above the blue square near one green star"], 1),
        load_config(None, SMALL),
    )
    model = Captioner(config.model, Sizes(tokenizer.vocab_size, grid_size=64, feature_dim=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=3 / parameter.shape[-1] ** 0.5, generator=torch.Generator().manual_seed(1))
    sha256 = files.sha256(root / "weights/encoder.safetensors")
    encoder = EncoderSpec("resnet50", 1, 256, 4.0, 0.0, weights_sha256=sha256)
    features = FeatureSpec("grid", (8, 8), 256, "fp16", encoder, Transform(32, "squash", "", "bicubic"))
    save_model(root / "run/best", model.state_dict(), tokenizer, config, features.to_fingerprint(), step=3)
    return root / "run"


def finish(folder: Path, weights: Path) -> str:
    """The end of a training, seen by nobody yet; its store."""
    store = f"sqlite:///{folder.parent}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        replace_uploader(patch, NoUploader)
        tracker = Tracker(folder, TrackingConfig(mlflow_uri=store, encoder_weights=str(weights), register="captions"))
        tracker.log(3, {"val/CIDEr": 0.5})
        tracker.model()
        tracker.close()
    return store


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(run folder, store, id of the MLflow run), with the model in MLflow."""
    folder = run_folder(tmp_path_factory.mktemp("model"))
    store = finish(folder, folder.parent / "nowhere")
    assert sync(folder, model=False) == 2  # a point, and the wish for the model
    server = client(store)
    (run,) = server.search_runs([server.get_experiment_by_name("show-attend-and-tell").experiment_id])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sat.tracking.log_model.use", lambda uri: None)  # it would last in this process
        log_model(folder, run.info.run_id)  # the encoder is not there: files
    assert {file.path for file in server.list_artifacts(run.info.run_id, "model")} >= {"model/model.safetensors"}
    run = server.get_run(run.info.run_id)
    assert not (run.outputs and run.outputs.model_outputs) and run.data.tags["sat.model"] == "files 3"
    assert sync(folder, folder.parent / "weights") == 0
    return folder, store, run.info.run_id


def pictures() -> list[bytes]:
    """JPEG files of three colours."""
    found = []
    for colour in ((200, 30, 30), (30, 200, 30), (240, 240, 250)):
        buffer = io.BytesIO()
        Image.new("RGB", (50, 40), colour).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def request(rows: list[bytes], **params: int) -> bytes:
    data = [[base64.b64encode(each).decode()] for each in rows]
    return json.dumps({"dataframe_split": {"columns": ["image"], "data": data}, "params": params}).encode()


def environment(store: str) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}


BARE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def with_what_they_need(names: set[str]) -> set[str]:
    """These packages, and what pip would install with them."""
    found, new = set(), set(names)
    while new:
        found |= new
        needed = set()
        for name in new:
            with contextlib.suppress(metadata.PackageNotFoundError):
                needed |= {name_of(line) for line in metadata.requires(name) or () if "extra ==" not in line}
        new = needed - found
    return found


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def without_the_other_packages(folder: Path) -> str:
    """A folder for PYTHONPATH: Python then has none of our packages but those that the logged model asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ours = {name_of(line) for line in project["project"]["dependencies"]}
    absent = ours - with_what_they_need({name_of(line) for line in requirements()})
    assert {"webdataset", "h5py"} <= absent
    modules = {
        name for name, of in metadata.packages_distributions().items() if absent & {name_of(each) for each in of}
    }
    (folder / "sitecustomize.py").write_text(BARE.format(names=sorted(modules)))
    return str(folder)


def test_the_model_is_logged_once_from_code_and_is_a_version_of_the_registered_one(logged):
    folder, store, run_id = logged
    server = client(store)
    run = server.get_run(run_id)
    (output,) = run.outputs.model_outputs
    model = server.get_logged_model(output.model_id)
    assert str(model.status) == "READY" and output.step == 3 and model.experiment_id == run.info.experiment_id
    (version,) = server.search_model_versions("name = 'captions'")
    assert version.source == f"models:/{output.model_id}" and version.run_id == run_id
    kept = [path for path in Path(model.artifact_location.removeprefix("file://")).rglob("*") if path.is_file()]
    assert {"captioner.py", "encoder.safetensors", "model.safetensors", "input_example.json"} <= {p.name for p in kept}
    assert not [path for path in kept if path.suffix in (".pkl", ".pickle", ".pyc", ".pt", ".bin")]
    assert sync(folder) == 0 and len(server.get_run(run_id).outputs.model_outputs) == 1


@pytest.mark.end_to_end
def test_mlflow_models_predict_captions_jpeg_bytes_with_no_package_but_those_asked_for(logged, tmp_path):
    folder, store, _ = logged
    (tmp_path / "in.json").write_bytes(request(pictures(), beam_size=3))
    given = environment(store)
    given["PYTHONPATH"] = without_the_other_packages(tmp_path)  # and our source is the model's own
    files_ = ["-i", tmp_path / "in.json", "-t", "json", "-o", tmp_path / "out.json"]
    command = [*MLFLOW, "predict", "-m", "models:/captions/1", "--env-manager", "local", *files_]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    captioning = Captioning.from_pretrained(folder, folder.parent / "weights").with_options(beam_size=3, block_unk=True)
    expected = captioning(pictures())
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [each["caption"] for each in found] == [each.caption for each in expected]
    assert len({each["caption"] for each in found}) > 1
    assert [each["log_probability"] for each in found] == pytest.approx([each.log_probability for each in expected])


@pytest.mark.end_to_end
def test_mlflow_models_serve_answers_with_captions_and_a_bad_picture_is_a_400(logged, tmp_path):
    folder, store, _ = logged
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["-h", "127.0.0.1", "-p", str(port), "-w", "1"]
    command = [*MLFLOW, "serve", "-m", "models:/captions/1", "--env-manager", "local", *where]
    with open(tmp_path / "log", "w") as log:
        outputs = {"stdout": log, "stderr": log}
        server = subprocess.Popen(command, env=environment(store), cwd=tmp_path, start_new_session=True, **outputs)

    def post(body: bytes) -> object:
        url, headers = f"http://127.0.0.1:{port}/invocations", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
            return json.load(answer)

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 300)
        model = Captioning.from_pretrained(folder, folder.parent / "weights").with_options(block_unk=True)
        found = post(request(pictures()))["predictions"]
        assert [each["caption"] for each in found] == [each.caption for each in model(pictures())]
        with pytest.raises(HTTPError) as refused:
            post(request([pictures()[0], b"<html>no picture</html>"]))
        assert refused.value.code == 400 and "picture 1" in refused.value.read().decode()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_captioning_ones_own_pictures_changes_nothing_in_the_run_and_sends_nothing(logged, tmp_path, monkeypatch):
    folder, store, run_id = logged

    def state() -> tuple[object, ...]:
        kept = {path: files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        run = client(store).get_run(run_id)
        return kept, run.to_dictionary(), [each.path for each in client(store).list_artifacts(run_id)]

    before = state()
    monkeypatch.setattr("sat.tracking.child.command", None)  # nor is a program of ours started
    (tmp_path / "private.jpg").write_bytes(pictures()[0])
    caption.main([tmp_path / "private.jpg"], folder, folder.parent / "weights", tmp_path / "out")
    monkeypatch.undo()
    assert json.loads((tmp_path / "out/captions.json").read_text())[0]["caption"]
    assert sync(folder) == 0 and state() == before
