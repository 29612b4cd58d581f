"""virtiofsd, which users would run otherwise: installed from crates.io below `target/`."""

import os

from .paths import REPO, TARGET, cargo_environment, run, say

VERSION = "1.14.0"
LIBRARIES = {"/usr/include/cap-ng.h": "libcap-ng-dev", "/usr/include/seccomp.h": "libseccomp-dev"}


def program():
    """Its path; built if it is not there."""
    path = TARGET / "peer" / "bin" / "virtiofsd"
    if not path.exists():
        for header, package in LIBRARIES.items():
            if not os.path.exists(header):
                run(["apt-get", "install", "-y", "--no-install-recommends", package])
        say(f"building virtiofsd {VERSION} from crates.io (a few minutes)")
        run(["cargo", "install", "virtiofsd", "--version", VERSION, "--locked", "--root", TARGET / "peer"],
            cwd=REPO, env=cargo_environment())
    return path
