"""virtiofsd, which users would run otherwise, installed below `target/`."""

import pathlib

from .host import cargo_install, require

VERSION = "1.14.0"


def program() -> pathlib.Path:
    """Its path; built if it is not there."""
    require("/usr/include/cap-ng.h:libcap-ng-dev", "/usr/include/seccomp.h:libseccomp-dev")
    return cargo_install("virtiofsd", VERSION, "virtiofsd")
