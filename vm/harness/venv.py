"""The Python packages of the tests and linters, in a virtual environment below `target/`."""

import hashlib
import importlib.util
import os
import pathlib
import sys

from . import cache
from .host import install, log, run
from .paths import REPO, TARGET

REQUIREMENTS = REPO / "vm/requirements.txt"
HOME = TARGET / "python"


def prepare() -> pathlib.Path:
    """Installs the packages of requirements.txt, unless they are there; returns the environment's interpreter."""
    python = HOME / "bin/python"
    stamp = HOME / "made-from"
    base = f"{sys.base_prefix} {sys.version}\n"
    inputs = base + hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    with cache.locked(HOME, "the Python packages of the tests"):
        if stamp.exists() and stamp.read_text() == inputs:
            return python
        log.info("installing the Python packages of the tests into %s", HOME.relative_to(REPO))
        if importlib.util.find_spec("ensurepip") is None:
            install("python3-venv")
        cache.remove(HOME)
        run([sys.executable, "-m", "venv", HOME])
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        run([python, *pip, "--require-hashes", "--requirement", REQUIREMENTS])
        # The last file: without it the environment is made again.
        stamp.write_text(inputs)
    return python


def enter() -> None:
    """Goes on in the virtual environment: starts this program again with its interpreter, unless it runs there."""
    if pathlib.Path(sys.prefix) == HOME:
        return
    python = prepare()
    os.execv(python, [str(python), *sys.argv])
