"""Where things are: the sources, and everything generated below `target/`."""

import os
import pathlib

REPO = pathlib.Path(__file__).resolve().parents[2]
TARGET = REPO / "target"
CACHE = TARGET / "vm"
LOGS = CACHE / "logs"
# Another build of the daemon can be put into its place, as in the integration tests; then nothing is built.
BACKEND = os.environ.get("LANEFSD_TEST_BACKEND")
DAEMON = pathlib.Path(BACKEND) if BACKEND else TARGET / "release" / "lanefsd"
FAULTY_DAEMON = TARGET / "release" / "lanefsd-faulty"
SLOW_STORE = TARGET / "release" / "faultfs"
