"""SPICE (Anderson et al. 2016) by pycocoevalcap's jar, for those who have what it needs; nothing is downloaded here.

It needs Stanford CoreNLP 3.6.0 beside it (400 MB) and a Java 8, which newer ones cannot replace.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sat.evaluation.java import Java, package_folder

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
JAVA_8 = "SAT_JAVA8"
"""Environment variable: the path of a Java 8."""
NEEDS = (
    f"SPICE needs {JARS[0]} and {JARS[1]} in pycocoevalcap/spice/lib (`python -m pycocoevalcap.spice."
    f"get_stanford_models` fetches 400 MB) and {JAVA_8}=/path/to/a/java/8/bin/java"
)


def spice(references: Sequence[Sequence[str]], captions: Sequence[str], deadline: float) -> tuple[float, list[float]]:
    """SPICE of all and of each tokenised caption, until `deadline` (time.monotonic).

    Raises RuntimeError that says what is missing, or what Java said; TimeoutError.
    """
    lib = package_folder() / "spice/lib"
    java = os.environ.get(JAVA_8, "")
    if not all((lib / jar).is_file() for jar in JARS) or not shutil.which(java):
        raise RuntimeError(NEEDS)
    with tempfile.TemporaryDirectory(prefix="sat-spice-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pairs = enumerate(zip(references, captions, strict=True))
        rows = [{"image_id": i, "test": text, "refs": list(texts)} for i, (texts, text) in pairs]
        (folder / "in.json").write_text(json.dumps(rows))
        (folder / "cache").mkdir()
        jar = package_folder() / "spice/spice-1.0.jar"
        options: list[str | Path] = ["-cache", folder / "cache", "-out", folder / "out.json", "-subset", "-silent"]
        with closing(Java(["-jar", "-Xmx8G", jar, folder / "in.json", *options], program=java)) as process:
            process.finish(deadline)
        found = json.loads((folder / "out.json").read_text())
    by_image = {row["image_id"]: row["scores"]["All"]["f"] for row in found}
    each = [math.nan if by_image[i] is None else float(by_image[i]) for i in range(len(captions))]
    return sum(each) / len(each), each
