"""Directory trees that have to be equal."""

import hashlib
import os
import pathlib


def digest(root: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Path to a description of each file below a directory; git's own bookkeeping holds times and is left out."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".git"]
        for name in files + folders:
            path = pathlib.Path(folder) / name
            stat = path.lstat()
            if path.is_symlink():
                what = os.readlink(path)
            elif path.is_file():
                what = hashlib.md5(path.read_bytes()).hexdigest()
            else:
                what = ""
            found[str(path.relative_to(root))] = (stat.st_mode, what)
    return found
