"""Commands that fill the cache at once wait for each other, and what a killed one left is made again."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from harness import cache

VM = pathlib.Path(cache.__file__).parents[1]

# Makes an entry, for which it needs a file "go", and writes a line into a log each time.
MAKER = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from harness import cache, host
folder = pathlib.Path(sys.argv[2])
entry = folder / "entry"

def make(scratch):
    scratch.mkdir()
    (scratch / "first").touch()
    with open(folder / "log", "a") as file:
        file.write("made\\n")
    waits = f"touch {folder}/started; until [ -e {folder}/go ]; do sleep 0.05; done"
    host.run(["timeout", "60", "sh", "-c", waits])
    (scratch / "last").touch()

cache.cached(entry, make)
assert (entry / "last").exists()
"""


WAITS = "waiting for another command that prepares entry"


class Maker:
    """A command that makes the entry; what it says is in a file."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        self.messages = folder / f"said-{name}"
        with open(self.messages, "w") as file:
            self.process = subprocess.Popen([sys.executable, "-c", MAKER, str(VM), str(folder)], stderr=file)

    def said(self) -> str:
        return self.messages.read_text()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_commands_at_once_make_an_entry_once(tmp_path: pathlib.Path) -> None:
    makers = [Maker(tmp_path, name) for name in ("first", "second", "third")]
    wait_for(lambda: sum(WAITS in maker.said() for maker in makers) == 2, "two of them wait")
    (tmp_path / "go").touch()
    assert [maker.process.wait(60) for maker in makers] == [0, 0, 0], [maker.said() for maker in makers]
    assert (tmp_path / "log").read_text() == "made\n"


def test_threads_at_once_make_an_entry_once(tmp_path: pathlib.Path) -> None:
    made = []

    def make(scratch: pathlib.Path) -> None:
        made.append(scratch)
        time.sleep(0.2)
        scratch.touch()

    threads = [threading.Thread(target=cache.cached, args=(tmp_path / "entry", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_a_killed_command_left_is_made_again(tmp_path: pathlib.Path) -> None:
    maker = Maker(tmp_path, "first")
    wait_for((tmp_path / "started").exists, "it makes the entry")
    maker.process.send_signal(signal.SIGKILL)
    maker.process.wait()
    assert not (tmp_path / "entry").exists()
    second = Maker(tmp_path, "second")
    # The program that the killed one had started keeps the lock until it ends.
    wait_for(lambda: WAITS in second.said(), "it waits for what the killed one has started")
    (tmp_path / "go").touch()
    assert second.process.wait(60) == 0, second.said()
    assert (tmp_path / "log").read_text() == "made\nmade\n"
    assert sorted(path.name for path in (tmp_path / "entry").iterdir()) == ["first", "last"]


def test_a_failed_entry_is_not_there(tmp_path: pathlib.Path) -> None:
    def make(scratch: pathlib.Path) -> None:
        scratch.mkdir()
        raise ValueError("a fault in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        cache.cached(tmp_path / "entry", make)
    assert not (tmp_path / "entry").exists()
    assert cache.held_locks() == ()


def test_an_entry_of_an_older_version_is_made_again(tmp_path: pathlib.Path) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry/old").touch()

    def make(scratch: pathlib.Path) -> None:
        scratch.mkdir()
        (scratch / "proof").touch()

    cache.cached(tmp_path / "entry", make, "proof")
    assert [path.name for path in (tmp_path / "entry").iterdir()] == ["proof"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_tree_with_a_mount_is_not_removed(tmp_path: pathlib.Path) -> None:
    point = tmp_path / "entry/dev"
    point.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
    try:
        (point / "kept").touch()
        with pytest.raises(OSError, match="something is mounted"):
            cache.remove(tmp_path / "entry")
        assert (point / "kept").exists()
    finally:
        subprocess.run(["umount", point], check=True)
