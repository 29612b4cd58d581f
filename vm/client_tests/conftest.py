"""Options and fixtures of the clients of `vm/clients`."""

import pytest

from .setup import Setup


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patience", type=float, default=3, help="multiply all timeouts by this number")


@pytest.fixture
def setup(pytestconfig: pytest.Config) -> Setup:
    """Shares and guests, and how long to wait for them."""
    return Setup(pytestconfig.getoption("patience"))
