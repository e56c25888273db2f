"""Log a run's best model as an MLflow model, as a process of its own: that of the uploader stays light.

What cannot caption pictures (its encoder is not here, or it looks at regions) is kept as plain files, and that is said.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from sat import files
from sat.cli import run_program
from sat.tracking.client import connect
from sat.tracking.model import CODE, ENCODER, MODEL, example, requirements, signature
from sat.tracking.record import Record
from sat.tracking.uploader import MODEL_TAG, REGISTERED_TAG

NAME = "captioner"
"""Of the MLflow model."""
FOLDER = "model"
"""Of the plain files among the run's artifacts."""


def log_model(folder: Path, run_id: str) -> None:
    """Log `folder`/best, unless it is there. Raises whatever MLflow raises, and ValueError for what is no model."""
    record = Record.read(folder)
    assert record is not None, "the uploader has read it"
    best = folder / "best"
    about = json.loads((best / "config.json").read_text())
    client, step = connect(record.uri), int(about["step"])
    use(record.uri)
    run = client.get_run(run_id)
    done, encoder = run.data.tags.get(MODEL_TAG), encoder_file(about, Path(record.encoder_weights))
    if isinstance(encoder, str):
        if done not in (f"files {step}", f"model {step}"):
            print(f"the best model is kept in MLflow as files, not as a model: {encoder}", flush=True)
            client.log_artifacts(run_id, str(best), FOLDER)
            client.set_tag(run_id, MODEL_TAG, f"files {step}")
        return
    if done != f"model {step}":
        discard_unfinished(client, run)
        model_id = as_mlflow_model(client, run, best, encoder, step)
        client.set_tag(run_id, f"{MODEL_TAG}.id", model_id)
        client.set_tag(run_id, MODEL_TAG, f"model {step}")
    if record.register:
        register(client, record.register, run_id, client.get_run(run_id).data.tags[f"{MODEL_TAG}.id"])
        client.set_tag(run_id, REGISTERED_TAG, f"{record.register} {step}")


def encoder_file(about: dict[str, Any], weights: Path) -> Path | str | None:
    """The file of the encoder in front of a model; None where it is in the model; else why there is none."""
    if about["config"]["encoder"]["train"]:
        return None
    features = about["features"]
    if features.get("kind", "grid") == "regions":
        return "it looks at regions that a detector elsewhere has found, and reads no pictures"
    if not features.get("encoder"):
        return "it does not say which encoder made its features"
    wanted = features["encoder"]["weights_sha256"]
    for path in sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]:
        if path.is_file() and files.sha256(path) == wanted:
            return path
    return (
        f"no encoder with SHA-256 {wanted[:12]}... at {weights}; name its file: tracking.encoder_weights=FILE, "
        "or sat sync RUN --weights FILE"
    )


def use(uri: str) -> None:
    """Have MLflow's functions, which know no client, write to this store."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def as_mlflow_model(client: Any, run: Any, best: Path, encoder: Path | None, step: int) -> str:
    """Log the folder of a trained model; MLflow's id of it. Its input example is captioned on the way."""
    import mlflow
    from mlflow.models import Model

    info = run.info
    sys.dont_write_bytecode = True  # MLflow loads what it has copied, and would leave that in it
    made = client.create_logged_model(info.experiment_id, NAME, info.run_id, None, run.data.params, "image-captioning")
    with tempfile.TemporaryDirectory() as temporary:
        code, source = Path(temporary) / "captioner.py", Path(temporary) / "sat"
        code.write_text(CODE)
        shutil.copytree(Path(__file__).parents[1], source, ignore=shutil.ignore_patterns("__pycache__"))
        artifacts = {MODEL: str(best)} | ({ENCODER: str(encoder)} if encoder else {})
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=info.run_id,
            model_id=made.model_id,
            step=step,
            python_model=str(code),
            code_paths=[str(source)],
            artifacts=artifacts,
            signature=signature(),
            input_example=example(),
            pip_requirements=requirements(),
        )
    return str(made.model_id)


def discard_unfinished(client: Any, run: Any) -> None:
    """Remove models that an upload which was ended midway has left."""
    for output in run.outputs.model_outputs if run.outputs else ():
        if str(client.get_logged_model(output.model_id).status) != "READY":
            client.delete_logged_model(output.model_id)


def register(client: Any, name: str, run_id: str, model_id: str) -> None:
    """Make the logged model a version of the registered model `name`, unless it is one."""
    import mlflow

    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if any(version.source == f"models:/{model_id}" for version in known):
        return
    version = mlflow.register_model(f"models:/{model_id}", name)
    print(f"registered as {name}, version {version.version}", flush=True)


def main(
    run: Annotated[Path, typer.Argument(help="run folder")],
    run_id: Annotated[str, typer.Argument(help="of its MLflow run")],
) -> None:
    """Log the best model of RUN in its MLflow run, and register it where the settings say so."""
    with files.locked(run / ".mlflow-model.lock"):
        log_model(run, run_id)
    sys.stdout.flush()


if __name__ == "__main__":
    run_program(main)
