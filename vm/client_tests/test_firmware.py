"""UEFI firmware as a client: OVMF's own driver for virtio-fs, and a kernel that is started from the share."""

import pathlib
import re
import shutil

from harness import cli, disk
from harness.guest import KERNEL_OPTIONS, Guest
from harness.host import require
from harness.kernels import Kernel

from .setup import Setup, step

OVMF = pathlib.Path("/usr/share/ovmf/OVMF.fd")
COUNT = 40
# The shell looks for this on all file systems. A command that fails ends the script.
SCRIPT = """@echo -off
fs0:
cd \\
echo BEGIN LISTING
ls folder
echo END LISTING
type folder\\text.txt
if exist written.txt then
  rm written.txt
endif
echo "written by the firmware" > written.txt
mkdir made
cp folder\\data.bin made\\copied.bin
comp folder\\data.bin made\\copied.bin
mv made\\copied.bin made\\moved.bin
rm -q folder\\remove.txt
echo THE KERNEL FOLLOWS
linux.efi initrd=\\initramfs.img OPTIONS
"""


def shown(guest: Guest, since: int) -> str:
    """What the firmware has written to the serial line from there on, without its colours."""
    text = re.sub(r"\x1b\[[0-9;?=]*[A-Za-z]", "", guest.log()[since:]).replace("\r", "")
    return text[: text.find("THE KERNEL FOLLOWS")]


def fill(share: pathlib.Path, kernel: Kernel, image: pathlib.Path) -> None:
    (share / "folder").mkdir()
    for number in range(COUNT):
        (share / f"folder/entry-{number:03}").write_text(f"{number}\n")
    (share / "folder/text.txt").write_text("a text for the firmware\r\n")
    (share / "folder/remove.txt").write_text("")
    (share / "folder/data.bin").write_bytes(bytes(range(256)) * 1024)
    shutil.copy(kernel.image, share / "linux.efi")
    shutil.copy(image, share / "initramfs.img")
    (share / "startup.nsh").write_text(SCRIPT.replace("OPTIONS", KERNEL_OPTIONS).replace("\n", "\r\n"))


def check_firmware(guest: Guest, share: pathlib.Path, since: int = 0) -> None:
    """The firmware has listed, read, written, copied, renamed and removed."""
    text = shown(guest, since)
    listing = text[text.find("BEGIN LISTING") : text.find("END LISTING")]
    missing = [number for number in range(COUNT) if f"entry-{number:03}" not in listing]
    assert not missing and "a text for the firmware" in text, f"missing {missing} in\n{text[-3000:]}"
    written = (share / "written.txt").read_bytes()
    # The shell writes UTF-16.
    assert "written by the firmware" in written.decode("utf-16", errors="replace"), written
    assert (share / "made/moved.bin").read_bytes() == (share / "folder/data.bin").read_bytes()
    assert not (share / "made/copied.bin").exists() and not (share / "folder/remove.txt").exists()


def test_firmware(setup: Setup) -> None:
    """OVMF lists, reads and writes the share, and starts a kernel from it, which mounts it."""
    if not OVMF.exists():
        require("ovmf")
    kernel, image = cli.prepare()
    with disk.directory() as share:
        fill(share, kernel, image)
        with setup.daemon(share) as daemon:
            step("the firmware starts the kernel")
            with Guest(
                None,
                None,
                [("share", daemon.socket, 1)],
                name="client",
                timeout_scale=2 * setup.timeout_scale,
                firmware=OVMF,
            ) as guest:
                check_firmware(guest, share)
                guest.mount()
                assert guest.output("cat /mnt/folder/text.txt").strip() == "a text for the firmware"
                guest.output("echo 'written by Linux' >/mnt/folder/remove.txt; rm -r /mnt/made")
                step("the same once more, after a reboot with the share mounted")
                since = len(guest.log())
                guest.reboot()
                check_firmware(guest, share, since)
                guest.mount()
                guest.output("ls /mnt/made")
            # Each of the two, twice.
            assert daemon.log().count("session begins") == 4, daemon.log()
