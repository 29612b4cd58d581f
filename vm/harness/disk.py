"""File systems in image files, mounted on the host for a test and gone afterwards."""

import contextlib
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

from .host import HarnessError, run
from .paths import CACHE, SLOW_STORE


@contextlib.contextmanager
def mounted(kind: str, megabytes: int = 512, delay: int = 0) -> Iterator[pathlib.Path]:
    """A fresh `ext4` or `xfs`, mounted; yields its directory. The image lies in memory; with a delay each read and
    write of it takes so many milliseconds more, however many are under way."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{kind}-", dir=CACHE)))
        store, point = folder / "store", folder / "mount"
        store.mkdir()
        point.mkdir()
        if delay:
            image = stack.enter_context(slow_file(store, megabytes, delay))
        else:
            image = stack.enter_context(file_in_memory(store, megabytes))
        run([f"mkfs.{kind}", "-q", image])
        # Direct I/O of the loop device has as many requests under way as its user. The device is freed with the mount.
        device = run(["losetup", "--find", "--show", f"--direct-io={'on' if delay else 'off'}", image]).strip()
        try:
            run(["mount", device, point])
            stack.callback(run, ["umount", "--lazy", point])
        finally:
            run(["losetup", "--detach", device])
        yield point


@contextlib.contextmanager
def file_in_memory(folder: pathlib.Path, megabytes: int) -> Iterator[pathlib.Path]:
    """An empty file on a tmpfs of its own."""
    run(["mount", "-t", "tmpfs", "-o", f"size={megabytes + 1}m", "tmpfs", folder])
    try:
        image = folder / "file"
        run(["truncate", "-s", f"{megabytes}M", image])
        yield image
    finally:
        run(["umount", "--lazy", folder])


@contextlib.contextmanager
def slow_file(folder: pathlib.Path, megabytes: int, delay: int) -> Iterator[pathlib.Path]:
    """A file in memory that takes `delay` milliseconds for each read and write."""
    command = [str(SLOW_STORE), str(folder), str(megabytes << 20), str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline() != b"mounted\n":
                raise HarnessError(f"{SLOW_STORE} did not mount {folder}")
            yield folder / "file"
        finally:
            process.stdin.close()


@contextlib.contextmanager
def directory() -> Iterator[pathlib.Path]:
    """An empty directory on the host's own file system."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="share-", dir=CACHE) as folder:
        yield pathlib.Path(folder)


@contextlib.contextmanager
def in_memory() -> Iterator[pathlib.Path]:
    """An empty directory on a file system of its own."""
    with directory() as point:
        run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", point])
        try:
            yield point
        finally:
            run(["umount", "--lazy", point])
