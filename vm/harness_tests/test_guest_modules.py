"""The build tools in the headers of a suite that is newer than the host."""

import pathlib
import shutil
import subprocess
from typing import cast

from harness import apt, guest_modules

LIBRARY = pathlib.Path("/lib/x86_64-linux-gnu/libc.so.6")
# The library that the tool needs and the host lacks.
OTHER = "libx.so.6"
DEPENDS = {"linux-kbuild": ["libtool", "make"], "libtool": ["libx"], "libx": ["libtool"]}


class Suite:
    """A suite whose tools need a library of a library."""

    suite = "newer"

    def depends(self, package: str) -> list[str]:
        return DEPENDS[package]

    def unpack(self, packages: list[str], directory: pathlib.Path) -> None:
        assert packages == ["libtool", "libx"]
        folder = directory / "usr/lib/x86_64-linux-gnu"
        folder.mkdir(parents=True)
        shutil.copy(guest_modules.LOADER, folder)
        shutil.copy(LIBRARY, folder / OTHER)


def make_tool(folder: pathlib.Path) -> pathlib.Path:
    """A program that prints its arguments, and needs `OTHER`."""
    folder.mkdir(parents=True)
    tool = folder / "tool"
    shutil.copy("/bin/echo", tool)
    tool.write_bytes(tool.read_bytes().replace(LIBRARY.name.encode(), OTHER.encode()))
    return tool


def test_a_program_that_lacks_a_library_is_found(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert not guest_modules.lacks_libraries(script)
    assert not guest_modules.lacks_libraries(tmp_path / "absent")
    assert not guest_modules.lacks_libraries(pathlib.Path("/bin/echo").resolve())
    assert guest_modules.lacks_libraries(make_tool(tmp_path / "tools"))


def test_a_tool_runs_with_the_libraries_of_its_suite(tmp_path: pathlib.Path) -> None:
    scratch, place = tmp_path / "scratch", tmp_path / "place"
    tool = make_tool(scratch / "usr/lib/linux-kbuild/scripts")
    guest_modules.adapt_tools(cast(apt.Apt, Suite()), ["linux-kbuild"], scratch, place)
    scratch.rename(place)
    command = [str(place / tool.relative_to(scratch)), "two words", "$HOME"]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout == "two words $HOME\n"


def test_tools_that_run_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    shutil.copy("/bin/echo", tmp_path / "tool")
    guest_modules.adapt_tools(cast(apt.Apt, Suite()), ["linux-kbuild"], tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tool"]
