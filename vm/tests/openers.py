"""Openers of one file are told the same, whoever is first, also when OPEN and CREATE race."""

import re

from harness import disk


def openers(setting, policy, *faults):
    """Lets openers meet; returns what the daemon saw: disagreements, and meetings in each mode."""
    milliseconds = setting.seconds(4, 30) * 1000
    with disk.directory() as share:
        with setting.guest(share, f"--cache={policy}", faults=list(faults)) as (guest, daemon):
            guest.output(f"openers /mnt --time {milliseconds}", 120)
            guest.output("umount /mnt")
        daemon.close()
        log = daemon.log()
    direct, cached = map(int, re.search(r"(\d+) openers met others in direct mode, (\d+) in cached mode", log).groups())
    return log.count("disagree"), direct, cached


def openers_of_one_file_never_disagree(setting):
    wrong, direct, cached = openers(setting, "auto")
    # The first opener of a file decides, so that both modes are seen; but before Linux 6.9 none is direct.
    new = setting.kernel.name in ("6.12", "7.2")
    assert not wrong and (direct > 20 if new else not direct) and cached > 20, (wrong, direct, cached)
    wrong, direct, cached = openers(setting, "never")
    assert not wrong and direct > 20 and not cached, (wrong, direct, cached)


def a_daemon_that_mixes_modes_is_noticed(setting):
    """The watch itself is tested."""
    if setting.patched:
        assert openers(setting, "auto", "--mixed-modes")[0] > 0


TESTS = (openers_of_one_file_never_disagree, a_daemon_that_mixes_modes_is_noticed)
