"""The cache below `target/`: each entry is made once, by one process at a time, and is complete or absent.

Commands may run at once, and any of them may be killed. So an entry is made in a folder beside its place, under a
lock, and renamed into its place when it is whole. The lock is flock(2) on a file that stays. The kernel releases it
when the last process that inherited it has ended; a file that says who holds the lock would outlive a killed command.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("lanefsd.harness")


class _Held(threading.local):
    """The descriptors of the locks that a thread holds."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []


_held = _Held()


def held_locks() -> tuple[int, ...]:
    """The descriptors of the locks that this thread holds, for commands that work under them."""
    return tuple(_held.descriptors)


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str | None = None) -> Iterator[None]:
    """Holds the lock of a cache entry. Threads exclude each other too. A command that has to wait says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another command that prepares %s", what or path.name)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _held.descriptors.append(descriptor)
        try:
            yield
        finally:
            _held.descriptors.remove(descriptor)
    finally:
        os.close(descriptor)


def cached(path: pathlib.Path, make: Callable[[pathlib.Path], None], proof: str = "") -> pathlib.Path:
    """Returns `path`, which `make` fills if it is absent. `make` gets a path beside it that does not exist yet.

    An entry that lacks the file `proof` counts as absent. It was made by an older version of the harness.
    """
    if not (path / proof).exists():
        with locked(path):
            if not (path / proof).exists():
                scratch = path.with_name(f"{path.name}.part")
                remove(scratch)
                remove(path)
                make(scratch)
                scratch.rename(path)
    return path


def remove(path: pathlib.Path) -> None:
    """Removes a file or a tree, if it is there; refuses a tree in which something is mounted."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    mounts = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [point for point in mounts if point == str(path) or point.startswith(f"{path}/")]
    if inside:
        raise OSError(f"{path} cannot be removed, since something is mounted at {inside[0]}; unmount that")
    if path.exists():
        shutil.rmtree(path)
