"""Runs of tests under `vm/test`: what they print, the second try, and that nothing is left when they are ended."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from harness import pytest_plugin

VM = pathlib.Path(pytest_plugin.__file__).parents[1]
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from harness import pytest_plugin
sys.exit(pytest_plugin.main(sys.argv[2], sys.argv[4:], int(sys.argv[3])))
"""
OUTCOMES = """
import pathlib
import pytest
from harness.guest import GuestError

def test_that_passes():
    pass

def test_that_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not here")
def test_that_is_skipped():
    pass

def test_that_qemu_lets_down(request):
    marker = pathlib.Path(__file__).with_name("tried")
    if not marker.exists():
        marker.touch()
        raise GuestError("Possible timer handling issue on cpu=1")
"""
# Each holds what a guest and a mount would be: a process, and something that has to be undone.
HOLDING = """
import pathlib
import time
import pytest
from harness.daemon import Daemon

@pytest.mark.parametrize("number", range(2))
def test_that_takes_long(number):
    folder = pathlib.Path(__file__).parent
    listener = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('{socket}'); s.listen(); s.accept()"
    with Daemon(folder, command=f'python3 -c "{listener}"') as daemon:
        (folder / f"pid-{number}").write_text(str(daemon.process.pid))
        try:
            time.sleep(1000)
        finally:
            (folder / f"undone-{number}").touch()
"""


def start(folder: pathlib.Path, text: str, jobs: int = 1, *options: str) -> subprocess.Popen[str]:
    (folder / "test_it.py").write_text(text)
    words = [sys.executable, "-c", RUN, str(VM), str(folder), str(jobs), *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: str, folder: pathlib.Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(condition))) < count:
        assert time.monotonic() < deadline, f"no {condition} in {folder}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("jobs", [1, 2])
def test_outcomes_are_printed_and_counted(tmp_path: pathlib.Path, jobs: int) -> None:
    out, errors = (run := start(tmp_path, OUTCOMES, jobs)).communicate(timeout=120)
    assert out.splitlines()[-1] == "2 passed, 1 failed", out + errors
    assert run.returncode == 1
    assert "one is not two" in errors
    for line in ("ok     test_that_passes", "FAILED test_that_fails", "skip   test_that_is_skipped"):
        assert line in errors, errors
    assert errors.index("again  test_that_qemu_lets_down") < errors.index("ok     test_that_qemu_lets_down")


def test_only_named_tests_run(tmp_path: pathlib.Path) -> None:
    out, errors = (run := start(tmp_path, OUTCOMES, 1, "--only=passes")).communicate(timeout=120)
    assert (out.splitlines()[-1], run.returncode) == ("1 passed, 0 failed", 0), out + errors


def test_a_run_without_tests_fails(tmp_path: pathlib.Path) -> None:
    out, errors = (run := start(tmp_path, OUTCOMES, 1, "--only=nothing")).communicate(timeout=120)
    assert (out.splitlines()[-1], run.returncode) == ("0 passed, 0 failed", 1), out + errors


def test_a_file_that_cannot_be_read_fails(tmp_path: pathlib.Path) -> None:
    out, errors = (run := start(tmp_path, "import nothing_of_this_name\n")).communicate(timeout=120)
    assert (out.splitlines()[-1], run.returncode) == ("0 passed, 1 failed", 1), out + errors
    assert "nothing_of_this_name" in errors


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_undoes_everything(tmp_path: pathlib.Path, jobs: int, number: signal.Signals) -> None:
    run = start(tmp_path, HOLDING, jobs)
    wait_until("pid-*", tmp_path, jobs)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    run.send_signal(number)
    out, errors = run.communicate(timeout=60)
    assert run.returncode not in (0, -number), out + errors
    assert len(list(tmp_path.glob("undone-*"))) == jobs, out + errors
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_leaves_no_process(tmp_path: pathlib.Path, jobs: int) -> None:
    run = start(tmp_path, HOLDING, jobs)
    wait_until("pid-*", tmp_path, jobs)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process is still there"
        time.sleep(0.1)
