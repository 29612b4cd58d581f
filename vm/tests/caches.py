"""Direct writers, cached readers and mappings of one file in one guest. Needs our modules."""

from harness import disk
from harness.guest import GuestError


def cached_readers_see_direct_writes(setting):
    """With a daemon that keeps one mode for a file, private mappings are what can be stale."""
    if not setting.patched:
        return
    milliseconds = setting.seconds(2, 15) * 1000
    with setting.mounts("--cache=never", "--cache=metadata", "--cache=auto") as (guest, mounts):
        for point, _ in mounts:
            guest.output(f"agree {point}/file --time {milliseconds}")


def mixed_openers_agree(setting):
    """A daemon that lets some openers of a file use the cache and others write past it."""
    if not setting.patched:
        return
    milliseconds = setting.seconds(3, 20) * 1000
    with disk.directory() as share, setting.guest(share, "--cache=auto", faults=["--mixed-modes"], fio=True) as (guest, _):
        guest.output(f"agree /mnt/file --time {milliseconds}")
        guest.output(f"agree /mnt/shared --shared --time {milliseconds}")
        # Asynchronous writes, while the file is kept in the cache.
        guest.output("dd if=/dev/zero of=/mnt/async bs=1M count=4 2>/dev/null")
        guest.output("(while ! [ -e /tmp/stop ]; do cat /mnt/async >/dev/null; done) >/dev/null 2>&1 &")
        for byte in (0xa1, 0xb2, 0xc3):
            guest.output("fio --name=x --filename=/mnt/async --rw=write --bs=64k --size=4m --direct=1 --ioengine=libaio "
                         f"--iodepth=16 --buffer_pattern={byte:#x} --output=/tmp/fio")
            # Bytes of the file, and those of them that are something else.
            seen = guest.output(f"cat /mnt/async | wc -c; cat /mnt/async | tr -d '\\{byte:o}' | wc -c").split()
            assert seen == [str(4 << 20), "0"], seen
        guest.output("touch /tmp/stop")


def writeback_meets_parallel_writes(setting):
    """On a kernel below 6.9 without our modules this is a crash (BUG_ON in fuse_set_nowrite)."""
    milliseconds = setting.seconds(3, 20) * 1000

    def collide():
        faults = ["--mixed-modes", "--delay", "10"]
        with disk.directory() as share, setting.guest(share, "--cache=auto", faults=faults) as (guest, _):
            guest.output(f"agree /mnt/file --collide --writers 2 --readers 0 --time {milliseconds}", 60)

    if setting.patched:
        collide()
    elif setting.full and setting.kernel.name == "6.1":
        try:
            collide()
        except GuestError as error:
            assert "kernel BUG at fs/fuse/dir.c" in str(error), error
        else:
            raise AssertionError("the stock module was to crash")


TESTS = (cached_readers_see_direct_writes, mixed_openers_agree, writeback_meets_parallel_writes)
