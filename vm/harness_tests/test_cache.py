"""Commands that fill the cache at once wait for each other, and what a killed one left is made again."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness import cache

VM = pathlib.Path(cache.__file__).parents[1]

# Makes an entry slowly, and writes a line into a log each time.
MAKER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from harness import cache, host
entry, log, seconds = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]

def make(scratch):
    scratch.mkdir()
    (scratch / "first").touch()
    with open(log, "a") as file:
        file.write("made\\n")
    host.run(["sleep", seconds])
    (scratch / "last").touch()

cache.cached(entry, make)
assert (entry / "last").exists()
"""


def start_maker(folder: pathlib.Path, seconds: float = 0.5) -> subprocess.Popen[str]:
    words = [str(VM), str(folder / "entry"), str(folder / "log"), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", MAKER, *words], stderr=subprocess.PIPE, text=True)


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def test_commands_at_once_make_an_entry_once(tmp_path: pathlib.Path) -> None:
    makers = [start_maker(tmp_path, 2) for _ in range(3)]
    said = [maker.communicate(timeout=60)[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0], said
    assert (tmp_path / "log").read_text() == "made\n"
    assert any("waiting for another command that prepares entry" in text for text in said), said


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
    maker = start_maker(tmp_path, 6)
    wait_for(tmp_path / "entry.part/first")
    wait_for(tmp_path / "log")
    maker.send_signal(signal.SIGKILL)
    # Its messages would end only with the program that it had started.
    maker.wait()
    assert not (tmp_path / "entry").exists()
    second = start_maker(tmp_path, 0)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0, said
    # The program that the killed one had started kept the lock until it ended.
    assert "waiting for another command that prepares entry" in said, said
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
