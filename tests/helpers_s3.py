"""A bucket of a real S3 API: moto's server on loopback, through s3fs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def in_bucket(folder: Path) -> Iterator[str]:
    """The URL of this data set in a bucket; who reads it finds server and keys as with any S3, in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "ada",
            "AWS_SECRET_ACCESS_KEY": "lovelace",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("pictures")
        filesystem.put(f"{folder}/", "pictures/coco/", recursive=True)
        try:
            yield "s3://pictures/coco"
        finally:
            filesystem.rm("pictures", recursive=True)  # servers of one process share their buckets
            filesystem.clear_instance_cache()
    server.stop()
