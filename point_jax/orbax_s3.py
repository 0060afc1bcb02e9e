"""Checkpoints in Amazon's S3, which Orbax 0.12 knows as little as any store but Google's.

TensorStore, by which Orbax writes arrays, has a driver for S3, and etils has paths there; but Orbax
takes every address that is not gs:// for a folder of this machine. Four of its private functions
decide that. They are replaced here by ones that answer for s3:// and ask the original about all
else (github.com/google/orbax, issue 359 asks for it; once it is there this file can go).
"""

import functools
import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import fsspec

S3 = "s3://"


class UnknownOrbaxError(ImportError):
    """A version of Orbax that decides about stores elsewhere."""


@functools.cache
def teach_orbax() -> None:
    """Makes Orbax write and read s3:// in this process.

    Raises:
        UnknownOrbaxError: this version of Orbax lacks what is to be replaced.
    """
    try:
        # Here, since it takes seconds, and only runs in S3 need it.
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        is_google, google_driver = gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs
        has_driver, normal = tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path
    except (ImportError, AttributeError) as error:
        raise UnknownOrbaxError(
            f"this version of orbax-checkpoint cannot be made to write to S3 ({error}); "
            "pip install 'point_jax[s3]' brings one that can"
        ) from error

    def is_store(path: PurePosixPath) -> bool:
        """No atomic rename there: a file marks which checkpoint is complete."""
        return path.as_posix().startswith(S3) or is_google(path)

    def driver(path: str) -> dict[str, Any]:
        if not path.startswith(S3):
            return google_driver(path)
        return s3_driver(path, os.environ, _endpoint())

    def has_store_driver(folder: str) -> bool:
        return folder.startswith(S3) or has_driver(folder)

    def normal_address(path: str) -> str:
        if not path.startswith(S3):
            return normal(path)
        return S3 + os.path.normpath(path.removeprefix(S3))

    gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs = is_store, driver
    tensorstore_utils._use_gcs_driver = has_store_driver
    tensorstore_utils._normalize_path = normal_address


def s3_driver(path: str, environment: Mapping[str, str], endpoint: str) -> dict[str, Any]:
    """TensorStore's specification of a store of keys under an address, s3://bucket/folder.

    Args:
        path: the address.
        environment: the process's.
        endpoint: where s3fs, by which all else is read and written, looks for the store.
    """
    bucket, _, folder = path.removeprefix(S3).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": folder}
    if ".amazonaws.com" not in endpoint:  # TensorStore finds the region of Amazon's buckets
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if environment.get("AWS_ACCESS_KEY_ID"):
        return spec | {"aws_credentials": {"type": "environment"}}
    # Without a profile's name it does not find the files (0.1.86); roles come after them.
    profile = environment.get("AWS_PROFILE") or "default"
    return spec | {"aws_credentials": {"type": "default", "profile": profile}}


def _endpoint() -> str:
    client: Any = fsspec.filesystem("s3").s3
    return client.meta.endpoint_url
