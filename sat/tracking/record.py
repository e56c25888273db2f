"""What the uploader has to know of a run, as `tracking.json` in its folder, and whose run that is.

A folder that was copied is another run: it would otherwise write into the original's.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from sat import files

RECORD = "tracking.json"
UPLOADED = "mlflow_run.json"
"""Where the uploader stands: {key, uri, run_id, artifacts}; written by it, read here."""


@dataclass(frozen=True)
class DataInput:
    """A data set that a run learns from or is scored on."""

    name: str
    digest: str
    """Of its manifest, SHA-256."""
    source: str
    """Absolute folder or URL."""
    context: str
    """`training` or `evaluation`, as MLflow calls it."""
    images: Mapping[str, int] = field(default_factory=dict)
    """By split."""


@dataclass(frozen=True)
class About:
    """What a run is made of, beside its settings."""

    inputs: tuple[DataInput, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the encoder's weights and the vocabulary; they become params."""


@dataclass(frozen=True)
class Record:
    """The content of tracking.json."""

    key: str = field(default_factory=lambda: uuid4().hex)
    """Names the run on the server: it is found again even when the answer to its creation was lost."""
    folder: str = ""
    inode: int = 0
    """Where the run lay when this was written; a folder that differs in both is a copy."""
    started: float = 0.0
    """s since 1970"""
    ended: float | None = None
    status: str = ""
    """FINISHED, FAILED or KILLED; empty while this life of the run lasts."""
    uri: str = ""
    experiment: str = ""
    run_name: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of this life."""
    inputs: tuple[DataInput, ...] = ()
    parent: str = ""
    """Of an evaluation: the run folder whose model it is about, from here."""
    system_metrics: bool = False
    encoder_weights: str = ""
    """The encoder's file, or a folder that may hold it; empty: the model is not logged."""
    register: str = ""
    """Name in MLflow's registry that the model becomes a version of."""

    def write(self, folder: Path) -> None:
        """Into `tracking.json`."""
        files.write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """What `tracking.json` says; None where there is none that can be read."""
        document = files.read_json(folder / RECORD)
        if not document:
            return None
        known: dict[str, Any] = {one.name: document[one.name] for one in fields(cls) if one.name in document}
        known["status"] = known.get("status") or ""
        known["inputs"] = tuple(DataInput(**each) for each in known.get("inputs", ()))
        return cls(**known)

    @classmethod
    def of_folder(cls, folder: Path) -> "Record | None":
        """As `read`, but of a copied folder under a key of its own, which is written down and told."""
        record = cls.read(folder)
        if record is None or not record.is_of_another(folder):
            return record
        print(
            f"{folder} is a copy of {record.folder}: it becomes an MLflow run of its own",
            file=sys.stderr,
            flush=True,
        )
        record = replace(record, key=uuid4().hex).here(folder)
        record.write(folder)
        return record

    def here(self, folder: Path) -> "Record":
        """The same, of a run that lies in this folder."""
        return replace(self, folder=str(folder), inode=os.stat(folder).st_ino)

    def uploaded(self, folder: Path) -> tuple[str, int]:
        """(MLflow's id of this run, artifacts that it has), as far as they are known; else ("", 0)."""
        known = files.read_json(folder / UPLOADED)
        mine = (known.get("key"), known.get("uri")) == (self.key, self.uri)
        return (str(known["run_id"]), int(known["artifacts"])) if mine else ("", 0)

    def is_of_another(self, folder: Path) -> bool:
        """Whether this folder is a copy of the run's; one that was moved or is mounted elsewhere is the run's."""
        return bool(self.folder) and self.folder != str(folder) and self.inode != os.stat(folder).st_ino
