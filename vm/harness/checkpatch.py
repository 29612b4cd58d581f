"""The kernel's own check of the form of patches, over those of guest-kernel/."""

import pathlib
import subprocess

from . import cache, guest_modules
from .host import require, run
from .paths import CACHE

# The series whose sources have the newest checkpatch.pl.
SOURCE = "6.12"
FILES = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")
# The sign-off is added by the person who sends a patch.
OPTIONS = ("--no-tree", "--strict", "--no-signoff")
RECORD = guest_modules.ROOM / "checkpatch.txt"


def program() -> pathlib.Path:
    """checkpatch.pl of the distribution's kernel sources."""

    def make(scratch: pathlib.Path) -> None:
        scratch.mkdir(parents=True)
        names = [f"linux-source-{SOURCE}/scripts/{name}" for name in FILES]
        archive = guest_modules.source_archive(SOURCE)
        run(["tar", "-C", scratch, "--strip-components=2", "-xf", archive, *names])

    require("perl", "xz:xz-utils")
    return cache.cached(CACHE / "checkpatch", make) / "checkpatch.pl"


def check() -> bool:
    """Checks all patches, prints and records the result; returns whether there was nothing to complain about."""
    command = ["perl", str(program()), *OPTIONS]
    lines = [
        f"checkpatch.pl of linux-source-{SOURCE}, {' '.join(OPTIONS)}; repeat with `make -C guest-kernel checkpatch`"
    ]
    clean = True
    for series in guest_modules.SERIES:
        for patch in guest_modules.patches(series):
            answer = subprocess.run([*command, str(patch)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            clean = clean and answer.returncode == 0
            found = [line for line in answer.stdout.splitlines() if line and not set(line) <= {"-"}]
            lines += ["", *(line.replace(f"{guest_modules.ROOM}/", "") for line in found)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RECORD.write_text(text)
    return clean
