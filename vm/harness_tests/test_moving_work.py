"""The parts of a migrated guest's work that need no guest: scripts, what is left out, and checks on the host."""

import pathlib
import subprocess

import pytest

from harness import moving_work
from harness.host import HarnessError
from harness.migration import Demands

ALL = Demands(("unlinked",))


@pytest.mark.parametrize("script", [*moving_work.JOBS.values(), moving_work.LOOP, moving_work.BLOCKED])
def test_scripts_are_shell(script: str) -> None:
    assert subprocess.run(["sh", "-n", "-c", script], capture_output=True).returncode == 0


def test_loop_counts_rounds_until_it_is_stopped(tmp_path: pathlib.Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "jobs/job").write_text(f'[ "$round" -lt 3 ] || touch {tmp_path}/stop')
    loop = moving_work.LOOP.replace("/tmp/", f"{tmp_path}/")
    subprocess.run(["sh", "-c", loop, "sh", "job"], check=True)
    assert (tmp_path / "out/job.rounds").read_text() == "3\n"
    assert (tmp_path / "out/job.ended").exists()
    assert not (tmp_path / "out/failed").exists()


def test_loop_ends_and_names_a_job_that_fails(tmp_path: pathlib.Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "jobs/job").write_text('echo "round $round"; [ "$round" -lt 3 ]')
    loop = moving_work.LOOP.replace("/tmp/", f"{tmp_path}/")
    subprocess.run(["sh", "-c", loop, "sh", "job"], check=True)
    assert (tmp_path / "out/failed").read_text() == "job\n"
    assert (tmp_path / "out/job").read_text() == "round 3\n"
    assert (tmp_path / "out/job.rounds").read_text() == "2\n"


def test_work_with_nameless_files_is_left_out_where_they_are_lost() -> None:
    assert "churn" in moving_work.Work(ALL, moving_work.NAMES).names
    assert "churn" not in moving_work.Work(Demands((), unlinked=False), moving_work.NAMES).names


def test_many_files_are_prepared(tmp_path: pathlib.Path) -> None:
    moving_work.Work(ALL, [], inodes=2003).prepare(tmp_path)
    found = [path for path in (tmp_path / "many").rglob("*") if path.is_file()]
    assert len(found) == 2003
    assert (tmp_path / "many/2/2002").read_text() == "2002"


def test_counters_are_compared(tmp_path: pathlib.Path) -> None:
    work = moving_work.Work(ALL, ["count"])
    work.done["count"] = 7
    for kind in ("flock", "posix", "openfile"):
        (tmp_path / f"counter-{kind}").write_bytes((140).to_bytes(8, "little"))
    work.check_counters(tmp_path)
    (tmp_path / "counter-posix").write_bytes((139).to_bytes(8, "little"))
    with pytest.raises(HarnessError, match="under posix locks is 139, not 140"):
        work.check_counters(tmp_path)
