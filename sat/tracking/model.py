"""The trained model as MLflow serves it: pictures in, captions out, on any machine that has the packages.

Nothing is pickled: MLflow keeps the two lines of `CODE`, our source beside them, and the files of the model and of its
encoder. One table of pictures is one call; each row's picture is a file's bytes (base64 in JSON).
"""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from sat.captioning import Captioning

CODE = "from sat.tracking.model import set_as_model\n\nset_as_model()\n"
"""What MLflow runs to have the model (its `models from code`)."""
NEEDED = (
    *("torch", "torchvision", "timm", "safetensors", "tokenizers", "omegaconf", "typer", "pillow", "numpy", "pyarrow"),
    *("mlflow", "xxhash", "fsspec", "aiohttp", "tqdm", "accelerate", "pandas"),
)
"""Packages that captioning a picture takes; a test holds them against what is imported."""
PICTURE = "image"
"""Column of the input: a picture file's bytes."""
MODEL, ENCODER = "model", "encoder"
"""Names of the files among the model's artifacts: the folder of the trained model, and the encoder's weights."""


def signature() -> Any:
    """MLflow's, of what goes in (`image`, and how it is searched) and what comes out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    outputs = Schema([ColSpec(DataType.string, "caption"), ColSpec(DataType.double, "log_probability")])
    beams = ParamSpec("beam_size", DataType.long, 0)  # 0: as in training
    return ModelSignature(Schema([ColSpec(DataType.binary, PICTURE)]), outputs, ParamSchema([beams]))


def requirements() -> list[str]:
    """The packages, pinned as they are here; what is not installed was not needed."""
    found = []
    for name in NEEDED:
        try:
            found.append(f"{name}=={metadata.version(name).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    return found


def example() -> Any:
    """A table of one JPEG: a red disc on green ground."""
    import io

    import pandas
    from PIL import Image, ImageDraw

    picture, buffer = Image.new("RGB", (64, 64), (60, 150, 60)), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=(200, 30, 30))
    picture.save(buffer, "JPEG")
    return pandas.DataFrame({PICTURE: [buffer.getvalue()]})


def caption(captioning: Captioning, pictures: Iterable[bytes], beam_size: int = 0) -> list[dict[str, Any]]:
    """{caption, log_probability} of each picture, never with `<unk>`; ValueError (BadPicture) names one by its row."""
    beams = beam_size or captioning.options.beam_size
    found = captioning.with_options(method="beam", beam_size=beams, n_best=1, block_unk=True)(pictures)
    return [{"caption": each.caption, "log_probability": each.log_probability} for each in found]


def set_as_model() -> None:
    """Tell MLflow of the model; called by `CODE` alone."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class Captioner(PythonModel):  # type: ignore[misc]  # mlflow's base has no types here
        """`Captioning` behind MLflow's interface."""

        def load_context(self, context: Any) -> None:
            """Read the model from its artifacts."""
            place = {name: Path(path) for name, path in context.artifacts.items()}
            self.captioning = Captioning.from_pretrained(place[MODEL], place.get(ENCODER, place[MODEL]))

        def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            """The caption of every row's picture; a bad one is the caller's fault and has its number."""
            import pandas

            beams = int((params or {}).get("beam_size", 0))
            try:
                rows = caption(self.captioning, list(model_input[PICTURE]), beams)
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            return pandas.DataFrame(rows, columns=["caption", "log_probability"])

    set_model(Captioner())
