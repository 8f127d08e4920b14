"""File systems behind URLs, through fsspec."""

from typing import Any

from lightning_peft.readable import first_line

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp",
    "https": "aiohttp", "sftp": "paramiko", "hf": "huggingface_hub",
}  # fmt: skip
"""Package that reads URLs of each kind through fsspec."""


def remote(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it. Raises ValueError for an unreachable system."""
    from fsspec.core import url_to_fs  # only remote files need it

    kind = url.split("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(kind, kind)
        raise ValueError(f"{url}: {kind}:// needs the package {package} (pip install {package})") from error
    except Exception as error:  # a file system raises what its service does
        raise ValueError(f"{url}: {first_line(error)}") from error
