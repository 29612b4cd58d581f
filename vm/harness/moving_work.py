"""What a guest does on its share while it is migrated, in rounds, and how that is checked."""

import pathlib
import shlex
import time

from .guest import Guest
from .host import HarnessError, log, run
from .migration import Demands
from .tools import tool, verify_on_host
from .trees import digest

FIO = (
    "--directory=/mnt/fio --size=2m --verify=crc32c --verify_fatal=1 --verify_backlog=64 --randrepeat=0 "
    "--group_reporting=1 --fallocate=none --randseed=$round"
)
STRIPES = "/mnt/stripes --writers 16 --size 8388608 --stripe 65536 $direct"
APPEND = "--writers 4 --records 50"
COUNT = "--writers 4 --rounds 5"
SQL = """create table if not exists t(id integer primary key, round integer, text);
begin immediate;
with recursive n(i) as (select 1 union all select i + 1 from n where i < 500)
insert into t(round, text) select $round, hex(randomblob(20)) from n;
commit;
delete from t where round <= $round - 5;
select count(*) from t;
pragma integrity_check;"""


def churn(seed: str, directory: str) -> list[str]:
    return [directory, "--seed", seed, "--writers", "4", "--steps", "150"]


# Scripts of the shell, of which each runs in rounds: $round counts from 1. One fails with its last command, or by
# `exit 1`.
JOBS = {
    "stripes": f"""rm -rf /mnt/stripes /mnt/progress; direct=; [ $((round % 2)) = 0 ] || direct=--direct
stripes write {STRIPES} --watchers 2 --progress /mnt/progress && stripes verify {STRIPES}""",
    "direct": f"fio --name=direct {FIO} --direct=1 --ioengine=libaio --iodepth=32 --rw=randrw --bs=4k --numjobs=2",
    "cached": f"fio --name=cached {FIO} --ioengine=psync --rw=randwrite --bs=8k --numjobs=2",
    "churn": f"""mkdir -p /mnt/churn/$round && churn {" ".join(churn("$round", "/mnt/churn/$round"))} &&
rm -rf /mnt/churn/$((round - 2))""",
    "append": f"""append run /mnt/log.$round {APPEND} && append verify /mnt/log.$round {APPEND} &&
rm -f /mnt/log.$((round - 1))""",
    "agree": "agree /mnt/agree --time 1000",
    "sqlite": f"""sqlite3 -batch -cmd '.timeout 60000' /mnt/data.db "{SQL}" >/tmp/out/sql || exit 1
rows=$((500 * (round < 5 ? round : 5))); [ "$(tr '\\n' ' ' </tmp/out/sql)" = "$rows ok " ] || exit 1""",
    "count": f"locks count /mnt/counter {COUNT}",
}
NAMES = list(JOBS)
# Those that use files without a name.
UNLINKING = ("churn",)
# Runs a job until /tmp/stop is there; its number of rounds is in NAME.rounds, and its name in `failed` if it failed.
LOOP = """round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1)); export round
    sh /tmp/jobs/$1 >/tmp/out/$1 2>&1 || { echo $1 >>/tmp/out/failed; break; }
    echo $round >/tmp/out/$1.rounds
done
touch /tmp/out/$1.ended"""
HOLD = "hold"
# Seconds.
PROGRESS_TIMEOUT = 120
END_TIMEOUT = 300
LOOKUP_TIMEOUT = 1800
LOCKED = "/mnt/locked"
# What programs do that do not go on.
BLOCKED = """for process in /proc/[0-9]*; do
    [ -e $process/exe ] || continue
    echo "${process#/proc/} $(tr '\\0' ' ' <$process/cmdline): $(cat $process/wchan)"
    grep -E 'fuse|virtio' $process/stack
done 2>/dev/null"""


class Work:
    """All that runs in the guest."""

    def __init__(self, demands: Demands, names: list[str], inodes: int = 0, open_files: int = 0) -> None:
        self.demands, self.inodes, self.open_files = demands, inodes, open_files
        self.names = [name for name in names if demands.unlinked or name not in UNLINKING]
        self.done: dict[str, int] = {}
        self.share = pathlib.Path()

    def prepare(self, share: pathlib.Path) -> None:
        """Makes what the guest finds."""
        self.share = share
        for number in range(self.inodes):
            folder = share / "many" / str(number // 1000)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(number)).write_text(str(number))

    def start(self, guest: Guest) -> None:
        """Starts all, and waits until the things that are held are held."""
        guest.output("mkdir -p /tmp/jobs /tmp/out /mnt/fio /mnt/churn")
        write_file(guest, "/tmp/loop", LOOP)
        self.know_many(guest)
        things = ",".join(self.demands.things)
        hold = f"{HOLD} /mnt/held --until /tmp/stop --rounds /tmp/out/{HOLD}.rounds --things {things}"
        if self.open_files:
            hold = f"ulimit -n {self.open_files + 1000}; {hold} --open {self.open_files} --files /mnt/many"
        end = f"touch /tmp/out/{HOLD}.ended"
        background(guest, f"{{ {hold} || echo {HOLD} >>/tmp/out/failed; }} >/tmp/out/{HOLD} 2>&1; {end}")
        background(guest, f"locks hold {LOCKED} >/tmp/out/locks 2>&1; echo locks >>/tmp/out/failed")
        for name in self.names:
            write_file(guest, f"/tmp/jobs/{name}", JOBS[name])
            background(guest, f"sh /tmp/loop {name}")
        self.goes_on(guest)

    def know_many(self, guest: Guest) -> None:
        """Looks up all files of --inodes."""
        if self.inodes:
            log.info("the guest looks up %d files", self.inodes)
            guest.output("find /mnt/many -type f -size +1000 | wc -l", LOOKUP_TIMEOUT)

    def goes_on(self, guest: Guest) -> None:
        """Waits until all things that are held have been used twice more; nothing may have failed, no lock be lost."""
        begin = self.held_rounds(guest)
        deadline = time.monotonic() + PROGRESS_TIMEOUT
        while self.held_rounds(guest) < begin + 2:
            if time.monotonic() > deadline:
                raise HarnessError(f"{HOLD} does not go on after {begin} rounds:\n{guest.output(BLOCKED)}")
            time.sleep(0.05)
        guest.output(f"locks held {LOCKED}")
        if self.demands.locks:
            run([tool("locks"), "held", self.share / "locked"])

    def held_rounds(self, guest: Guest) -> int:
        self.look_for_failures(guest)
        return int(guest.output(f"cat /tmp/out/{HOLD}.rounds 2>/dev/null || echo 0"))

    def look_for_failures(self, guest: Guest) -> None:
        failed = guest.output("cat /tmp/out/failed 2>/dev/null; true").split()
        if failed:
            reports = [f"{name}:\n{guest.output(f'tail -c 2000 /tmp/out/{name}')}" for name in failed]
            raise HarnessError("failed in the guest: " + "\n".join(reports))

    def stop(self, guest: Guest) -> None:
        """Lets all end, in the middle of nothing."""
        guest.output("touch /tmp/stop")
        deadline = time.monotonic() + END_TIMEOUT
        names = [*self.names, HOLD]
        ended = " && ".join(f"[ -e /tmp/out/{name}.ended ]" for name in names)
        while guest.run(ended, check=False)[0]:
            if time.monotonic() > deadline:
                raise HarnessError(f"the work in the guest does not end:\n{guest.output(BLOCKED)}")
            time.sleep(0.1)
        self.look_for_failures(guest)
        for name in names:
            self.done[name] = int(guest.output(f"cat /tmp/out/{name}.rounds"))
        guest.output("killall locks; rm -f /tmp/out/failed")

    def check(self, share: pathlib.Path, native: pathlib.Path) -> None:
        """The share has what the same work leaves on the host."""
        if "append" in self.names:
            verify_on_host("append", share / f"log.{self.done['append']}", *APPEND.split())
        if "stripes" in self.names:
            verify_on_host("stripes", share / "stripes", *STRIPES.split()[1:-1])
        if "count" in self.names:
            self.check_counters(share)
        for folder in (share / "churn").iterdir():
            other = native / folder.name
            other.mkdir()
            run([tool("churn"), *churn(folder.name, str(other))])
            one, two = digest(folder), digest(other)
            if one != two:
                odd = sorted(set(one.items()) ^ set(two.items()))[:10]
                raise HarnessError(f"the trees differ, with seed {folder.name}: {odd}")

    def check_counters(self, share: pathlib.Path) -> None:
        """Each kind of lock has kept writers out of each other's way."""
        wanted = 4 * 5 * self.done["count"]
        for kind in ("flock", "posix", "openfile"):
            found = int.from_bytes((share / f"counter-{kind}").read_bytes(), "little")
            if found != wanted:
                raise HarnessError(f"the number under {kind} locks is {found}, not {wanted}")

    def rounds(self) -> int:
        """All that were done."""
        return sum(count for name, count in self.done.items() if name != HOLD)


def write_file(guest: Guest, path: str, text: str) -> None:
    guest.output(f"cat >{path} <<'END_OF_FILE'\n{text}\nEND_OF_FILE")


def background(guest: Guest, command: str) -> None:
    """Runs a shell command beside others, without the agent's line."""
    guest.output(f"sh -c {shlex.quote(command)} </dev/null >/dev/null 2>&1 &")
