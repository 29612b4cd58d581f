"""QMP, QEMU's control protocol, over one connection."""

import json
import socket
from types import TracebackType
from typing import Any, Self

from .host import HarnessError


class QmpError(HarnessError):
    """QEMU refused a command, or is gone."""


class Qmp:
    """A connection that has been greeted; a context manager."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.file = link.makefile("rw")
        self.read()
        self.run("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(self) -> dict[str, Any]:
        """The next message."""
        try:
            line = self.file.readline()
        except OSError as error:
            raise QmpError(f"QMP: {error}") from error
        if not line:
            raise QmpError("QMP: QEMU has closed the connection")
        return json.loads(line)

    def run(self, execute: str, **arguments: Any) -> Any:
        """Runs a command, whose arguments have underscores in place of hyphens; returns QEMU's answer."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self.file.write(json.dumps({"execute": execute, "arguments": words}) + "\n")
            self.file.flush()
        except OSError as error:
            raise QmpError(f"QMP {execute}: {error}") from error
        while True:
            answer = self.read()
            if "error" in answer:
                raise QmpError(f"QMP {execute}: {answer['error']['desc']}")
            # Events come in between.
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self.file.close()
        self.link.close()
