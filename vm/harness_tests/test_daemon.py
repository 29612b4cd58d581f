"""The wait for a daemon's socket."""

import pathlib
import socket

from harness import daemon


def test_socket_that_is_bound_does_not_listen_yet(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "socket"
    assert not daemon.listens(path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        assert path.exists() and not daemon.listens(path)
        bound.listen()
        assert daemon.listens(path)
    assert not daemon.listens(path)
