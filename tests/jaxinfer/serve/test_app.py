"""The application: routes are found, not registered; one shape for every error; an honest schema."""

import importlib
import logging
import pkgutil

from jaxinfer.serve import app, routes
from tests.fakes import FakeEngine, LiveServer, until


def test_every_file_of_the_folder_is_mounted(client):
    paths = client.get("/openapi.json").json()["paths"]
    for module in pkgutil.iter_modules(routes.__path__):
        router = importlib.import_module(f"{routes.__name__}.{module.name}").router
        for route in router.routes:
            assert route.path.replace(":path", "") in paths or not route.include_in_schema


def test_unknown_routes_and_methods(client, fault):
    fault(client.get("/v2/anything"), 404)
    fault(client.get("/health/"), 404)
    refused = client.get("/v1/completions")
    fault(refused, 405)
    assert refused.headers["allow"] == "POST"
    fault(client.delete("/v1/models"), 405)


def test_no_page_of_the_frameworks_own(client, fault):
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        fault(client.get(path), 404)


def test_the_schema_promises_what_comes(client):
    schema = client.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            error = operation["responses"]["default"]["content"]["application/json"]["schema"]["properties"]["error"]
            assert error["required"] == ["message", "type", "param", "code"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    prompt = schema["components"]["schemas"]["CompletionBody"]["properties"]["prompt"]
    assert len(prompt["anyOf"]) == 4


def test_a_hang_is_written_to_the_log_with_all_stacks(monkeypatch, caplog):
    dumped = []
    monkeypatch.setattr(app, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(app.faulthandler, "dump_traceback", lambda file: dumped.append(file))
    caplog.set_level(logging.ERROR)
    engine = FakeEngine(hang=True)
    body = {"prompt": "a", "stream": True}
    with (
        LiveServer(lambda progress: engine, stall_seconds=0.1) as server,
        server.client() as client,
        client.stream("POST", "/v1/completions", json=body),
    ):
        until(lambda: dumped)
        engine.hang = False
        engine.release.set()
    assert len(dumped) == 1
    assert "no progress" in caplog.text
