"""File systems in image files, mounted on the host for a test and gone afterwards."""

import contextlib
import pathlib
import tempfile

from .paths import CACHE, run


@contextlib.contextmanager
def mounted(kind, megabytes=512):
    """A fresh `ext4` or `xfs`, mounted; yields its directory."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{kind}-", dir=CACHE) as folder:
        image = pathlib.Path(folder) / "image"
        point = pathlib.Path(folder) / "mount"
        point.mkdir()
        run(["truncate", "-s", f"{megabytes}M", image])
        run([f"mkfs.{kind}", "-q", image])
        # The loop device is freed with the mount.
        run(["mount", "-o", "loop", image, point])
        try:
            yield point
        finally:
            run(["umount", "--lazy", point])


@contextlib.contextmanager
def directory():
    """An empty directory on the host's own file system."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="share-", dir=CACHE) as folder:
        yield pathlib.Path(folder)
