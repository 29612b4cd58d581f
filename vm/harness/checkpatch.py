"""The kernel's own checks of patches, over those of guest-kernel/: their form, and warnings of compiler and sparse."""

import pathlib
import re
import shutil
import subprocess

from . import cache, guest_modules, kernels
from .host import log, require, run
from .paths import CACHE

# The series whose sources have the newest checkpatch.pl.
SOURCE = "7.2"
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


def warnings(series: str, tree: pathlib.Path, patched: bool) -> set[str]:
    """The warnings of `make W=1 C=2`, without line numbers, which the patches change."""
    work = CACHE / "modules" / f"{series}-warnings"
    if patched:
        guest_modules.patched_source(series, work)
    else:
        cache.remove(work)
        shutil.copytree(guest_modules.source_folder(series) / "fuse", work)
    command = [*guest_modules.make_command(series, tree, work), "W=1", "C=2"]
    # Without the patches, modules that the kernel has built in compile but cannot be linked.
    check = patched or series not in guest_modules.BUILT_IN
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=check)
    cache.remove(work)
    found = re.findall(r"^.*(?:warning|error): .*$", answer.stdout, re.MULTILINE)
    return {re.sub(r":\d+", "", line) for line in found}


def check_warnings() -> bool:
    """Prints the warnings that the patches add; returns whether there are none."""
    require("sparse", *guest_modules.BUILD_TOOLS)
    clean = True
    for series in guest_modules.SERIES:
        tree = guest_modules.headers(kernels.fetch(series).release)
        before, after = (warnings(series, tree, patched) for patched in (False, True))
        log.info(f"{series}: {len(before)} warnings without the patches, {len(after - before)} new ones")
        for line in sorted(after - before):
            log.info(line)
        clean = clean and after <= before
    return clean
