"""Names become folders: embedded models, folders, repositories; the network is never reached here."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxinfer.checkpoint import hub
from jaxinfer.checkpoint.errors import CheckpointError


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~") == tmp_path


def test_embedded_models_are_found_in_the_repository_or_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "jaxinfer" / "checkpoint" / "hub.py"))
    with pytest.raises(CheckpointError, match="embedded model 'demo' is not part of this installation"):
        hub.resolve("demo")
    packaged, source = tmp_path / "jaxinfer" / "_demo", tmp_path / "checkpoints" / "demo"
    for folder in (packaged, source):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert hub.resolve("demo") == folder


def test_only_weights_json_and_templates_are_fetched(tmp_path, monkeypatch):
    asked = {}

    def download(name, **keywords):
        asked.update(name=name, **keywords)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/model", "abc123") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc123")
    assert not any(pattern.endswith(("*", ".py", ".bin")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/model", "~/absent", "a/b/c", "owner/..", "-x", "", "owner/mo del", "a\0b", "https://example.com/x"]
)
def test_what_is_neither_folder_nor_repository(name):
    with pytest.raises(CheckpointError, match=r"no such folder, and not the name of a Hugging Face repository"):
        hub.resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        hub.resolve(str(tmp_path / "model.safetensors"))


def failing(kind):
    """An error of huggingface_hub, made without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "accept the terms on its page and set HF_TOKEN"),
        (errors.RevisionNotFoundError, "has no such revision"),
        (errors.RepositoryNotFoundError, "no such Hugging Face repository"),
        (errors.LocalEntryNotFoundError, "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, "fetching it failed: HfHubHTTPError"),
        (OSError, "fetching it failed: OSError: first line"),
    ],
)
def test_failures_say_what_to_do(kind, words, monkeypatch):
    def download(*_, **__):
        raise failing(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as error:
        hub.resolve("owner/model", "main")
    assert (
        words in str(error.value) and str(error.value).startswith("model 'owner/model' at revision 'main'") and "\n" not in str(error.value)
    )


def test_offline_is_respected():
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        hub.resolve("owner/certainly-not-here")
