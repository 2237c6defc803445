"""One live server for the whole folder: most tests only ask it something."""

import pytest

from tests.fakes import LiveServer


@pytest.fixture(scope="session")
def live():
    """A server whose engine echoes prompts; leave it as you found it."""
    with LiveServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(live):
    """A plain HTTP client of the shared server."""
    with live.client() as client:
        yield client


def error_of(response):
    """The error of an answer, checked for its one shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert len(body["error"]["message"]) > 10
    assert not any(
        word in body["error"]["message"] for word in ("/root", "/home", "/usr", "/secret", "site-packages", "Traceback", " at 0x")
    )
    return body["error"]


@pytest.fixture(scope="session")
def fault():
    """Checks an error answer's status and shape and returns its error."""

    def check(response, status, param=None):
        assert response.status_code == status, response.text
        error = error_of(response)
        if param is not None:
            assert error["param"] == param, error
        return error

    return check
