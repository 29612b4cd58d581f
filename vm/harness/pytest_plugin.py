"""The tests in guests under pytest: a line of progress for each test, a second try where QEMU failed, a last line.

pytest-xdist runs the tests in worker processes, each with guests of its own. Only the main process prints.
"""

import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Generator, Sequence
from types import FrameType
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

from .host import HarnessError, log
from .paths import REPO


class Progress:
    """Prints what has ended, and counts."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0
        self.skipped = 0
        self.begun = time.monotonic()
        # The outcome and seconds of tests that are not over yet.
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0) + report.duration
        outcome = self.outcomes.setdefault(name, "ok")
        if report.failed:
            self.outcomes[name] = "FAILED"
            log.info(report.longreprtext)
        elif report.skipped and outcome == "ok":
            self.outcomes[name] = "skip"
        if report.when == "teardown":
            self.end(name)

    def end(self, name: str) -> None:
        """A test is over."""
        outcome = self.outcomes.pop(name)
        self.passed += outcome == "ok"
        self.failed += outcome == "FAILED"
        self.skipped += outcome == "skip"
        log.info(f"{outcome:6} {title(name)} ({self.seconds.pop(name):.1f} s)")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed += 1
            log.info(report.longreprtext)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """Keeps pytest's own dots away."""
        return report.outcome, "", ""

    def summary(self) -> int:
        """Prints the last lines; returns the exit status."""
        log.info(f"{time.monotonic() - self.begun:.0f} s, {self.skipped} skipped")
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed or not self.passed else 0


def title(nodeid: str) -> str:
    """`file.py::test_name[configuration]` as `configuration: test_name`."""
    name, _, configuration = nodeid.rpartition("::")[2].partition("[")
    return f"{configuration.removesuffix(']')}: {name}" if configuration else name


def main(folder: str, options: Sequence[str], jobs: int = 1) -> int:
    """Runs the tests in a folder of vm/, `jobs` at once; returns the exit status."""
    progress = Progress()
    quiet = ["-p", "harness.pytest_plugin", "-qq", "--no-header", "--no-summary", "--tb=short", "--capture=no"]
    quiet.append("--continue-on-collection-errors")
    parallel = ["--numprocesses", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    status = pytest.main([str(REPO / "vm" / folder), *quiet, *parallel, *options], plugins=[progress])
    if status == pytest.ExitCode.INTERRUPTED:
        return 130
    outcome = progress.summary()
    return outcome or (0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(status))


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def stop_on_signals(config: pytest.Config) -> None:
    """Makes a signal end a run as Ctrl-C does: guests, daemons and mounts of the running tests go with it."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        # Another one must not break the clean-up. execnet sends one after five seconds.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if getattr(config.option, "numprocesses", None):
            terminate_children()
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)


def terminate_children() -> None:
    """Passes a signal on to the workers of pytest-xdist."""
    pid = os.getpid()
    for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGTERM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only", action="append", default=[], help="run only tests whose name contains one of these words"
    )


def pytest_configure(config: pytest.Config) -> None:
    stop_on_signals(config)
    config.addinivalue_line("markers", "patched: needs a guest with our FUSE modules")


def name_of(item: pytest.Item) -> str:
    """The name of a test without prefix and configuration."""
    return item.name.removeprefix("test_").partition("[")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    words = config.getoption("only")
    if words:
        chosen = [item for item in items if any(word in name_of(item) for word in words)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Marks the report of a test whose guest QEMU has let down."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, HarnessError):
        item.user_properties.append(("emulator failed", getattr(error, "emulator_failed", False)))
        report.user_properties = list(item.user_properties)
    return report


def qemu_failed(reports: list[pytest.TestReport]) -> bool:
    return any(report.failed and ("emulator failed", True) in report.user_properties for report in reports)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs a test, and once more if QEMU has let its guest down."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if qemu_failed(reports):
        log.info(f"again  {title(item.nodeid)}")
        for report in reports:
            if report.failed:
                log.info(report.longreprtext)
        item.user_properties.clear()
        renew: Any = item
        renew._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
