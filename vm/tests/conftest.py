"""Options and fixtures of the tests in guests."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from harness import cli, debug_kernel, disk, kernels
from harness.kernels import Kernel

from .config import TestConfig

# Kernel, queues, CPUs, and whether the modules are the distribution's, of a run with --full.
FULL = [
    ("6.1", 1, 2, False),
    ("6.1", 4, 4, False),
    ("7.2", 4, 4, False),
    ("7.2", 2, 2, True),
    ("6.12", 4, 4, False),
    ("5.10", 1, 2, False),
    ("5.10", 4, 4, False),
]
# A TestConfig as plain data, which pytest-xdist can send to its workers.
Prepared = tuple[str, str, str, str, int, int, bool]
PREPARED = pytest.StashKey[list[Prepared]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guests")
    group.addoption("--kernel", choices=[*kernels.KERNELS, debug_kernel.NAME], help="this kernel only")
    group.addoption("--full", action="store_true", help="all kernels, 1, 2 and 4 queues, and longer torture")
    group.addoption("--queues", type=int, default=1, help="request queues, and CPUs if more than 2")
    group.addoption("--stock-modules", action="store_true", help="the modules of the distribution")


def wanted(kernel: str | None, queues: int, full: bool, stock: bool) -> list[tuple[str, int, int, bool]]:
    """Kernel, queues, CPUs, and whether the modules are the distribution's, of each configuration."""
    if not full:
        return [(kernel or kernels.DEFAULT, queues, max(2, queues), stock)]
    if kernel:
        return [(kernel, 1, 2, stock), (kernel, 4, 4, stock)]
    return [(name, queues, cpus, stock or theirs) for name, queues, cpus, theirs in FULL]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stock: needs a guest with the distribution's FUSE modules")
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "kernels(name, ...): runs with these guest kernels only")
    if workerinput := getattr(config, "workerinput", None):
        config.stash[PREPARED] = workerinput["prepared"]
        return
    # The main process prepares everything, once.
    option = config.option
    prepared: list[Prepared] = []
    for name, queues, cpus, stock in wanted(option.kernel, option.queues, option.full, option.stock_modules):
        kernel, image = cli.prepare(name, stock)
        prepared.append((kernel.name, str(kernel.root), kernel.release, str(image), queues, cpus, option.full))
    config.stash[PREPARED] = prepared


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Passes the configurations to a worker of pytest-xdist."""
    node.workerinput["prepared"] = node.config.stash[PREPARED]


def configurations(config: pytest.Config) -> list[TestConfig]:
    return [
        TestConfig(Kernel(name, pathlib.Path(root), release), pathlib.Path(image), queues, cpus, full)
        for name, root, release, image, queues, cpus, full in config.stash[PREPARED]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "config" in metafunc.fixturenames:
        metafunc.parametrize("config", configurations(metafunc.config), ids=str, scope="session")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that its markers exclude."""
    if not isinstance(item, pytest.Function):
        return
    config = item.callspec.params["config"]
    assert isinstance(config, TestConfig)
    markers = {marker.name: marker for marker in item.iter_markers()}
    if "patched" in markers and not config.patched:
        pytest.skip("needs our FUSE modules")
    if "stock" in markers and config.patched:
        pytest.skip("needs the distribution's FUSE modules")
    if "full" in markers and not config.full:
        pytest.skip("runs with --full only")
    if "kernels" in markers and config.kernel.name not in markers["kernels"].args:
        pytest.skip(f"needs Linux {' or '.join(markers['kernels'].args)}")


@pytest.fixture
def share() -> Iterator[pathlib.Path]:
    """An empty directory of the host to share with guests."""
    with disk.directory() as folder:
        yield folder
