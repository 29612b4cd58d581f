"""The guest's programs on the host, where they check what guests have written."""

import pathlib

from . import initramfs
from .host import Word, run


def tool(name: str) -> pathlib.Path:
    """A program of vm/guest-tools; linked statically, it runs on the host as well."""
    return initramfs.TOOLS_FOLDER / f"guest-{name}"


def verify_on_host(name: str, *arguments: Word) -> None:
    """Runs the check of a program; it fails if a byte is wrong."""
    run([tool(name), "verify", *arguments])
