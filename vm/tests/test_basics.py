"""Operations of a guest on a file system, compared with the host's view."""

import fcntl
import os
import pathlib
import stat

import pytest

from harness import disk

from .config import TestConfig


def test_files_are_the_same_on_both_sides(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share, "--xattr") as (guest, _):
        guest.output("""cd /mnt
            echo content >file; chmod 640 file; chown 1000:1000 file
            mkdir -p a/b/c; ln -s ../file a/link; ln file a/hard; mkfifo a/fifo
            mknod a/null c 1 3
            dd if=/dev/zero of=sparse bs=1 count=1 seek=1048575 2>/dev/null
            mv a/b/c a/moved
            touch -d '2001-02-03 04:05:06' a/b""")
        file = (share / "file").stat()
        assert (file.st_size, stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_nlink) == (
            8,
            0o640,
            1000,
            1000,
            2,
        )
        assert (share / "file").read_text() == "content\n"
        assert os.readlink(share / "a/link") == "../file"
        assert (share / "a/hard").samefile(share / "file")
        assert stat.S_ISFIFO((share / "a/fifo").stat().st_mode)
        null = (share / "a/null").stat()
        assert stat.S_ISCHR(null.st_mode) and null.st_rdev == os.makedev(1, 3)
        sparse = (share / "sparse").stat()
        assert sparse.st_size == 1 << 20 and sparse.st_blocks < 64
        assert int((share / "a/b").stat().st_mtime) == 981173106
        assert (share / "a/moved").is_dir() and not (share / "a/b/c").exists()

        (share / "host").write_text("from the host")
        assert guest.output("cat /mnt/host") == "from the host"
        assert guest.output("cat /mnt/a/link") == "content"
        guest.output("cd /mnt; rm -r a file sparse host; sync")
        assert list(share.iterdir()) == []


def test_a_large_directory_is_listed_completely(config: TestConfig, share: pathlib.Path) -> None:
    count = 5000
    with config.guest(share) as (guest, _):
        guest.output(f"mkdir /mnt/many; cd /mnt/many; seq {count} | sed s/^/name/ | xargs touch", 300)
        assert len(os.listdir(share / "many")) == count
        for _ in range(2):
            listed = guest.output("ls /mnt/many | sort | uniq | wc -l; ls -l /mnt/many | wc -l", 300).split()
            assert listed == [str(count), str(count + 1)], listed
        guest.output("rm -r /mnt/many", 300)
        assert not (share / "many").exists()


def test_callers_own_what_they_make(config: TestConfig, share: pathlib.Path) -> None:
    with config.guest(share) as (guest, _):
        share.chmod(0o777)
        guest.output("cd /mnt; su user -c 'umask 027; echo >mine; mkdir own; ln -s x link'")
        for name, mode in (("mine", 0o640), ("own", 0o750)):
            seen = (share / name).stat()
            assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (1000, 1000, mode), name
        assert (share / "link").lstat().st_uid == 1000
        # A write by somebody without privilege clears set-id bits.
        guest.output("cd /mnt; cp /bin/busybox prog; chmod 6777 prog; su user -c 'echo >>prog'")
        assert stat.S_IMODE((share / "prog").stat().st_mode) == 0o777
        guest.output("chmod 6777 /mnt/prog; su user -c ': >/mnt/prog'")
        assert stat.S_IMODE((share / "prog").stat().st_mode) == 0o777


def test_all_cache_policies_serve(config: TestConfig) -> None:
    policies = [f"--cache={policy}" for policy in ("never", "metadata", "auto", "always")]
    with config.mounts(*policies, "--writeback") as (guest, mounts):
        for point, share in mounts:
            guest.output(f"""cd {point}
                dd if=/dev/urandom of=data bs=64k count=40 2>/dev/null; sync; md5sum data >/tmp/sum; md5sum -c /tmp/sum
                for i in $(seq 200); do echo line $i >>log; done; sync""")
            assert (share / "data").stat().st_size == 40 << 16
            assert (share / "log").read_text().splitlines() == [f"line {i}" for i in range(1, 201)]


def test_a_read_only_share_stays_as_it_is(config: TestConfig, share: pathlib.Path) -> None:
    (share / "file").write_text("kept")
    with config.guest(share, "--readonly") as (guest, _):
        assert guest.output("cat /mnt/file") == "kept"
        for command in (
            "echo >/mnt/file",
            "rm /mnt/file",
            "mkdir /mnt/new",
            "chmod 0 /mnt/file",
            "mv /mnt/file /mnt/x",
        ):
            status, text = guest.run(command, check=False)
            assert status != 0 and "Read-only" in text, (command, text)
    assert (share / "file").read_text() == "kept"


def test_an_overlay_keeps_its_upper_directory_on_a_share(config: TestConfig) -> None:
    """As podman and Docker do with their storage there. Longer than names are cached, and with a rename over a file
    that was copied up."""
    for arguments in ("--xattr", "--modcaps=+sys_admin"), ("--xattrmap=:map::user.virtiofs.:", "--cache=never"):
        with disk.directory() as share, config.guest(share, *arguments) as (guest, _):
            seen = guest.output("""cd /mnt; mkdir lower upper work merged; echo 1 >lower/a; echo 1 >lower/b; echo 1 >lower/c
                mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work merged && cd merged
                echo 2 >>a; echo 2 >>b; sleep 1.5; cat a; mv a b; rm c; chmod 600 b; echo 3 >>b; sleep 1.5; cat b; ls; cd /
                umount /mnt/merged""")
            assert seen.split() == ["1", "2", "1", "2", "3", "b"], (arguments, seen)
            assert (share / "upper/b").read_text() == "1\n2\n3\n"


@pytest.mark.kernels("6.12", "7.2")
def test_idmapped_mounts_have_the_right_owners(config: TestConfig) -> None:
    for arguments, shift in ((), 0), (("--translate-uid=map:0:5000:1000", "--translate-gid=map:0:6000:1000"), 1):
        with disk.directory() as share, config.guest(share, *arguments) as (guest, _):
            share.chmod(0o777)
            said = guest.output("mkdir /tmp/mapped; chmod 755 /tmp; idmap /mnt /tmp/mapped")
            assert said == "owners are right", said
            uid, gid = 5000 * shift, 6000 * shift
            seen = {
                name: ((share / name).lstat().st_uid, (share / name).lstat().st_gid)
                for name in ("dir", "dir/file", "dir/link", "renamed")
            }
            assert seen == {
                "dir": (uid + 5, gid + 6),
                "dir/file": (uid + 5, gid + 6),
                "dir/link": (uid + 9, gid + 6),
                "renamed": (uid + 7, gid + 8),
            }, seen
            assert not (share / "roots").exists()
            # The other mount keeps the caller's ids.
            guest.output("cd /mnt; su user -c 'echo >mine'")
            assert (share / "mine").stat().st_uid == 1000


# Each changes a set-user-ID program as an ordinary user, and prints the mode before and after.
CHANGE_PROGRAMS = """cd /mnt
for change in 'dd if=/dev/zero of=tool bs=4096 count=1 conv=notrunc' 'fallocate -l 100000 tool' 'truncate -s 5 tool' \
    'dd if=/dev/zero of=tool bs=4096 count=1 conv=notrunc oflag=direct' ': >tool'; do
    dd if=/dev/zero of=tool bs=4096 count=2 2>/dev/null && chmod 6777 tool && stat -c %a tool
    su user -c "$change" 2>/dev/null
    stat -c %a tool
done
chown user:user tool && chmod 2666 tool && su user -c 'echo x >tool' && stat -c %a tool"""


def test_programs_that_users_change_lose_their_set_id_bits(config: TestConfig) -> None:
    for arguments in ("--cache=always",), ("--cache=never", "--no-killpriv-v2"):
        with disk.directory() as share, config.guest(share, *arguments) as (guest, _):
            share.chmod(0o777)
            said = guest.output(CHANGE_PROGRAMS).split()
            # A set-group-ID bit without group execution gives no rights, and stays when the owner writes.
            assert said == ["6777", "777"] * 5 + ["2666"], said


def test_flags_of_files_count_on_the_host(config: TestConfig, share: pathlib.Path) -> None:
    nodump, immutable = 0x40, 0x10

    def on_host(path: pathlib.Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            flags = fcntl.ioctl(descriptor, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
            return int.from_bytes(flags[:4], "little")
        finally:
            os.close(descriptor)

    with config.guest(share) as (guest, _):
        share.chmod(0o777)
        guest.output(f"cd /mnt; echo >file; mkdir dir; flags --toggle {nodump} file dir; echo >dir/inside")
        for name in ("file", "dir", "dir/inside"):
            assert on_host(share / name) & nodump, name
            assert int(guest.output(f"flags /mnt/{name}").split()[0], 16) == on_host(share / name), name
        before = on_host(share / "file")
        # An ordinary user may not change flags of others, nor the guest's root set one that only the host's root can clear.
        for command in (f"su user -c 'flags --toggle {nodump} /mnt/file'", f"flags --toggle {immutable} /mnt/file"):
            status, text = guest.run(command, check=False)
            assert status != 0 and "not permitted" in text, (command, text)
        assert on_host(share / "file") == before
        guest.output(f"su user -c 'echo >/mnt/own; flags --toggle {nodump} /mnt/own'")
        assert on_host(share / "own") & nodump
