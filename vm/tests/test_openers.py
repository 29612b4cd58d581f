"""All openers of a file get the same mode, whoever is first, also when OPEN and CREATE race."""

import re

import pytest

from harness import disk

from .config import TestConfig


def openers(config: TestConfig, policy: str, *faults: str) -> tuple[int, int, int]:
    """Races openers; returns the daemon's counts of disagreements, and of meetings in each mode."""
    milliseconds = config.seconds(4, 30) * 1000
    with disk.directory() as share:
        with config.guest(share, f"--cache={policy}", faults=list(faults)) as (guest, daemon):
            guest.output(f"openers /mnt --time {milliseconds}", 120)
            guest.output("umount /mnt")
        daemon.close()
        log = daemon.log()
    met = re.search(r"(\d+) openers met others in direct mode, (\d+) in cached mode", log)
    assert met is not None, log
    return log.count("disagree"), int(met[1]), int(met[2])


def test_openers_of_one_file_never_disagree(config: TestConfig) -> None:
    wrong, direct, cached = openers(config, "auto")
    # The first opener of a file decides, so that both modes are seen; but before Linux 6.9 none is direct.
    new = config.kernel.name in ("6.12", "7.2")
    assert not wrong and (direct > 20 if new else not direct) and cached > 20, (wrong, direct, cached)
    wrong, direct, cached = openers(config, "never")
    assert not wrong and direct > 20 and not cached, (wrong, direct, cached)


@pytest.mark.patched
def test_a_daemon_that_mixes_modes_is_noticed(config: TestConfig) -> None:
    """Tests the check that the other tests rely on."""
    assert openers(config, "auto", "--mixed-modes")[0] > 0
