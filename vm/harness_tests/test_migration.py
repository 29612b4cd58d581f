"""The parts of `vm/migrate` that need no guest: QMP, QEMU's trace, the table, and the demands on each back end."""

import json
import socket
import threading
from collections.abc import Callable

import pytest

from harness import migration
from harness.host import HarnessError
from harness.migration import Times
from harness.qmp import Qmp, QmpError

SOURCE = """qemu: a message of QEMU itself
100@1795795649.010000:vmstate_downtime_checkpoint src-downtime-start
100@1795795649.013500:vmstate_downtime_checkpoint src-vm-stopped
100@1795795649.020000:vmstate_downtime_save type=non-iterable idstr=ps2mouse instance_id=0 downtime=2
100@1795795649.031000:vmstate_downtime_save type=non-iterable idstr=0000:00:03.0/vhost-user-fs instance_id=0 downtime=9500
"""
# It was a source before, so an older checkpoint stands first.
DESTINATION = """100@1795795600.000000:vmstate_downtime_checkpoint dst-precopy-bh-enter
101@1795795649.043199:vmstate_downtime_load type=non-iterable idstr=0000:00:03.0/vhost-user-fs instance_id=0 downtime=18065
101@1795795649.043672:vmstate_downtime_checkpoint dst-precopy-bh-enter
101@1795795649.044172:vmstate_downtime_checkpoint dst-precopy-bh-vm-started
"""


def test_trace_of_a_migration() -> None:
    there = migration.checkpoints(SOURCE)
    assert there["src-vm-stopped"] - there["src-downtime-start"] == pytest.approx(3.5, abs=0.01)
    here = migration.checkpoints(DESTINATION)
    assert here["dst-precopy-bh-vm-started"] - here["dst-precopy-bh-enter"] == pytest.approx(0.5, abs=0.01)
    save, load = migration.device_time(SOURCE, "save"), migration.device_time(DESTINATION, "load")
    assert save[1] - save[0] == pytest.approx(9.5, abs=0.01)
    assert load[1] - load[0] == pytest.approx(18.065, abs=0.01)
    assert load[1] - save[0] == pytest.approx(21.699, abs=0.01)


def test_a_guest_is_started_after_precopy_or_postcopy() -> None:
    assert migration.start_time(migration.checkpoints(DESTINATION)) == pytest.approx(0.5, abs=0.01)
    later = DESTINATION.replace("precopy", "postcopy").replace("649.04", "650.04").replace("4172", "5172")
    assert migration.start_time(migration.checkpoints(later)) == pytest.approx(1.5, abs=0.01)
    assert migration.start_time(migration.checkpoints(DESTINATION + later)) == pytest.approx(1.5, abs=0.01)
    with pytest.raises(HarnessError, match="when the guest was started"):
        migration.start_time({})


def test_trace_without_the_device() -> None:
    with pytest.raises(HarnessError, match="how long the load of the share's device took"):
        migration.device_time(SOURCE, "load")


def times(source: str, destination: str, downtime: float) -> Times:
    return Times(source, destination, total=1000, downtime=downtime, stop=1, save=2, load=3, share=5, start=4)


def test_table_has_a_row_for_each_direction() -> None:
    found = [times("a", "b", 10), times("b", "a", 7), times("a", "b", 30), times("a", "b", 20)]
    lines = migration.table(found).splitlines()
    assert lines[0] == "| from | to | migrations | downtime | stop | save | load | share | start | total |"
    assert (
        lines[2]
        == "| a | b | 3 | 20.0 (30.0) | 1.0 (1.0) | 2.0 (2.0) | 3.0 (3.0) | 5.0 (5.0) | 4.0 (4.0) | 1000.0 (1000.0) |"
    )
    assert lines[3].startswith("| b | a | 1 | 7.0 (7.0) |")
    assert len(lines) == 4


def test_demands_are_those_of_the_weaker_end() -> None:
    ours = migration.demands(["lanefsd", "lanefsd"], "auto")
    assert ours.locks and ours.unlinked and set(ours.things) == set(migration.THINGS)
    for mode, snapshot in (("auto", True), ("find-paths", False)):
        kept = migration.demands(["lanefsd", "lanefsd"], mode, snapshot)
        assert kept.locks and kept.unlinked and set(kept.things) == set(migration.THINGS) - {"removed"}
    for names in (["lanefsd", "virtiofsd"], ["virtiofsd", "virtiofsd"]):
        by_path = migration.demands(names, "find-paths")
        assert not by_path.locks and not by_path.unlinked
        assert not {"unlinked", "replaced", "removed", "bytes"} & set(by_path.things)
        assert migration.demands(names, "file-handles", snapshot=True) == by_path
        by_handle = migration.demands(names, "file-handles")
        assert by_handle.unlinked and not by_handle.locks
        assert {"unlinked", "replaced", "removed"} <= set(by_handle.things)


def test_back_ends_are_set_up_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.peer.program", lambda: "/there/virtiofsd")
    alone = migration.back_end("lanefsd", ["lanefsd", "lanefsd"], "auto", "abort", ["--xattr"])
    assert {"--migration-mode=auto", "--posix-lock", "--flock", "--xattr"} <= set(alone.arguments)
    assert alone.command is None
    mixed = migration.back_end("lanefsd", ["lanefsd", "virtiofsd"], "find-paths", "guest-error")
    assert "--migration-format=virtiofsd" in mixed.arguments
    assert not {"--posix-lock", "--flock"} & set(mixed.arguments)
    peer = migration.back_end("virtiofsd", ["lanefsd", "virtiofsd"], "find-paths", "guest-error", ["--ours-alone"])
    assert peer.command is not None and peer.command.startswith("/there/virtiofsd ")
    assert "--ours-alone" not in peer.arguments
    assert "--migration-on-error=guest-error" in peer.arguments
    errors = [argument for argument in peer.strict().arguments if "on-error" in argument]
    assert errors == ["--migration-on-error=abort"]


def serve(answer: Callable[[dict[str, object]], list[dict[str, object]]]) -> socket.socket:
    """A QEMU that answers each command; returns the other end of its connection."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs, theirs.makefile("rw") as file:
            file.write('{"QMP": {}}\n')
            file.flush()
            for line in file:
                messages = answer(json.loads(line))
                if not messages:
                    return
                file.write("".join(json.dumps(message) + "\n" for message in messages))
                file.flush()

    threading.Thread(target=run, daemon=True).start()
    return ours


def test_qmp_skips_events_and_names_arguments_as_qemu_does() -> None:
    asked = []

    def answer(command: dict[str, object]) -> list[dict[str, object]]:
        asked.append(command)
        return [{"event": "STOP"}, {"return": {"status": "running"}}]

    with Qmp(serve(answer)) as qmp:
        assert qmp.run("migrate-set-parameters", max_bandwidth=5) == {"status": "running"}
    assert asked[1] == {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 5}}


def test_qmp_reports_refusals_and_the_end_of_qemu() -> None:
    def answer(command: dict[str, object]) -> list[dict[str, object]]:
        if command["execute"] == "quit":
            return []
        return [{"error": {"desc": "it is no good"}} if command["execute"] == "migrate" else {"return": {}}]

    with Qmp(serve(answer)) as qmp:
        with pytest.raises(QmpError, match="QMP migrate: it is no good"):
            qmp.run("migrate", uri="unix:x")
        with pytest.raises(QmpError, match="closed the connection"):
            qmp.run("quit")


class Asked:
    """Answers of query-migrate, one after the other."""

    def __init__(self, *answers: dict[str, object]) -> None:
        self.answers = list(answers)

    def run(self, execute: str) -> dict[str, object]:
        assert execute == "query-migrate"
        return self.answers.pop(0)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_end_of_a_migration_is_awaited(status: str) -> None:
    asked = Asked({}, {"status": "setup"}, {"status": "active"}, {"status": status, "downtime": 3})
    assert migration.wait_for_end(asked) == {"status": status, "downtime": 3}  # type: ignore[arg-type]


def test_migration_that_ends_too_early_is_not_under_way() -> None:
    asked = Asked({"status": "active", "ram": {"transferred": 0}}, {"status": "active", "ram": {"transferred": 9}})
    migration.wait_until_active(asked)  # type: ignore[arg-type]
    with pytest.raises(HarnessError, match="not under way"):
        migration.wait_until_active(Asked({"status": "failed"}))  # type: ignore[arg-type]
