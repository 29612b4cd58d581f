"""overlayfs with all of its layers on a share, and podman, which uses it."""

import contextlib
import pathlib
import stat
import subprocess

from harness import disk
from harness.guest import Guest
from harness.host import HarnessError, run

from .setup import Setup, step
from .test_root import is_up

PREPARE = """mkdir l u w m l/dir l/gone; for f in a b c d e f dir/x dir/y gone/z; do echo lower $f >l/$f; done
    ln -s a l/link; chmod 644 l/?"""
# Copies up, waits until the guest's attributes and entries are old, and looks again.
CHANGE = """echo more >>m/a; echo more >>m/dir/x; chmod 600 m/b; chown 1000:1000 m/c; touch -d 2001-02-03 m/d
    exec 3>>m/e; echo open >&3
    sleep 2
    cat m/a m/dir/x; stat -c '%a %u' m/b m/c
    echo open >&3; exec 3>&-; cat m/e
    echo new >m/new; mv m/new m/a; cat m/a
    mv m/dir/y m/b; cat m/b
    rm m/c m/f; rm -r m/gone; mkdir m/gone; echo opaque >m/gone/w; ls m/gone
    ln m/d m/hard; mv m/d m/moved; stat -c %h m/hard
    for i in 1 2 3 4 5 6 7 8; do echo $i >>m/e; sed -i s/lower/upper/ m/e; done; cat m/e
    ls -1 m m/dir m/gone"""
CHANGED = """lower a
more
lower dir/x
more
600 0
644 1000
lower e
open
open
new
lower dir/y
w
2
upper e
open
open
1
2
3
4
5
6
7
8
m:
a
b
dir
e
gone
hard
link
moved

m/dir:
x

m/gone:
w"""
LATER = """sleep 2; cat m/a m/b m/e m/hard m/moved; stat -c %Y m/moved; ls -1 m"""


def layers_on_a_share(guest: Guest, point: str, share: pathlib.Path, kind: str) -> None:
    """Changes an overlay whose layers are all on one share, and mounts it again."""
    mount = f"mount -t overlay overlay -o {kind}lowerdir=l,upperdir=u,workdir=w m"
    seen = guest.output(f"set -e; cd {point}; {PREPARE}\n{mount}\n{CHANGE}", 180)
    assert seen == CHANGED, f"{kind}: the guest sees\n{seen}"
    before = guest.output(f"set -e; cd {point}; {LATER}", 60)
    again = guest.output(f"set -e; cd {point}; umount m; {mount}\n{LATER}; umount m", 60)
    assert before == again, (before, again)
    # What was removed is a whiteout for the host, and the lower layer is as it was.
    for name in ("c", "f"):
        whiteout = (share / "u" / name).lstat()
        assert stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0, name
    assert sorted(path.name for path in (share / "l").iterdir()) == [
        "a",
        "b",
        "c",
        "d",
        "dir",
        "e",
        "f",
        "gone",
        "link",
    ]
    assert (share / "l/a").read_text() == "lower a\n"


# Options of the daemon, and of the mount.
WAYS = {
    "userxattr": ("--xattr", "userxattr,"),
    "userxattr, --cache=never": ("--xattr --cache=never", "userxattr,"),
    "userxattr, --cache=always": ("--xattr --cache=always --writeback", "userxattr,"),
    "trusted xattrs": ("--xattr --modcaps=+sys_admin", ""),
    "trusted xattrs, --cache=never": ("--xattr --modcaps=+sys_admin --cache=never", ""),
    "mapped xattrs": ("--xattr --xattrmap=:map::user.virtiofs.:", ""),
}


# The default, and the newest.
KERNELS = ("6.1", "7.2")


def test_overlayfs(setup: Setup) -> None:
    """Overlayfs with its lower and upper layer on one share: copy-up, and work two seconds later."""
    wrong = []
    for kernel in KERNELS:
        with contextlib.ExitStack() as stack:
            shares = [stack.enter_context(disk.directory()) for _ in WAYS]
            daemons = [
                stack.enter_context(setup.daemon(share, *words.split()))
                for share, (words, _) in zip(shares, WAYS.values())
            ]
            guest = stack.enter_context(setup.small_guest(*daemons, kernel=kernel))
            for number, (name, (_, kind)) in enumerate(WAYS.items()):
                step(f"Linux {kernel}, {name}")
                guest.mount(f"share{number}" if number else "share", f"/mnt/{number}")
                try:
                    layers_on_a_share(guest, f"/mnt/{number}", shares[number], kind)
                except (HarnessError, AssertionError) as error:
                    if guest.broken:
                        raise
                    wrong.append(f"Linux {kernel}, {name}: {error}")
    if wrong:
        raise HarnessError("\n".join(wrong))


def container_image(root: pathlib.Path) -> None:
    """A small root file system as an archive in the guest's tree, since no registry is needed for that."""
    with disk.directory() as folder:
        for name in ("bin", "etc", "tmp", "proc", "sys", "dev"):
            (folder / name).mkdir()
        run(["cp", "/bin/busybox", folder / "bin/busybox"])
        for applet in ("sh", "cat", "echo", "sleep", "mv", "ls", "rm", "chmod", "stat", "id", "touch", "ln"):
            (folder / "bin" / applet).symlink_to("busybox")
        (folder / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
        subprocess.run(["tar", "-C", folder, "-cf", root / "root/image.tar", "."], check=True)


def test_podman(setup: Setup) -> None:
    """Podman in a Debian with Linux 7.2 whose root, and so all layers of its containers, is on a share."""
    run_one = "podman run --rm --network=none localhost/small"
    with setup.debian_root() as root:
        container_image(root)
        with setup.debian_guest(root, "--xattr", "--modcaps=+sys_admin", kernel="7.2") as (guest, daemon):
            is_up(guest)
            step("imports an image")
            driver = guest.output("podman info --format '{{.Store.GraphDriverName}}'", 120)
            assert driver == "overlay", driver
            guest.output("podman import /root/image.tar localhost/small 2>&1", 120)
            step("runs containers")
            inside = "echo more >>/etc/passwd; sleep 2; cat /etc/passwd; mv /etc/passwd /etc/p; echo new >/etc/n; mv /etc/n /etc/p; cat /etc/p"
            seen = guest.output(f"{run_one} sh -c '{inside}'", 180)
            assert seen == "root:x:0:0::/:/bin/sh\nmore\nnew", seen
            step("starts a kept container twice, and makes an image of it")
            guest.output(
                "podman run --name kept --network=none localhost/small sh -c 'echo $(cat /count) x >/count.new; mv /count.new /count'",
                180,
            )
            guest.output("podman start -a kept; podman commit kept localhost/counted 2>&1", 180)
            seen = guest.output("podman run --rm --network=none localhost/counted cat /count", 180)
            assert seen == "x x", seen
            guest.output("podman rm kept; podman rmi localhost/counted localhost/small", 180)
            guest.power_off("systemctl poweroff", 120)
            assert daemon.wait() == 0, daemon.log()
