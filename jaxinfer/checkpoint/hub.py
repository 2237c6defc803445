"""From what a user calls a model to a folder on this machine: an embedded model, a folder, or a Hugging Face repository.

Of a repository only weights, JSON and template files are fetched; code in it is never downloaded, and code in a folder never opened.
huggingface_hub keeps its own cache and obeys its own variables (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.checkpoint.errors import CheckpointError

EMBEDDED = ("demo", "draft")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")
SKIPPED = ("original/*", "*/*", "consolidated*", "adapter_*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def resolve(name: str, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path:
    """The folder of a model: the embedded models by name, then folders, then Hugging Face repositories (at a revision), of which files
    that match `patterns` are fetched.

    Raises:
        CheckpointError: it does not exist, cannot be reached, or may not be read; the message says what to do.
    """
    if name in EMBEDDED:
        return _embedded(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or REPOSITORY.fullmatch(name) is None:
        raise CheckpointError(
            f"{name}: no such folder, and not the name of a Hugging Face repository (owner/name); embedded: {', '.join(EMBEDDED)}"
        )
    return _download(name, revision, patterns)


def _embedded(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    candidates = (package.parent / "checkpoints" / name, package / f"_{name}")
    found = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if found is None:
        raise CheckpointError(f"the embedded model {name!r} is not part of this installation; install jaxinfer again, or name a folder")
    return found


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(SKIPPED))
        )
    except errors.GatedRepoError:
        why = "its owner asks for consent: accept the terms on its page and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = "the repository has no such revision"
    except errors.RepositoryNotFoundError:
        why = "no such folder, and no such Hugging Face repository, or a private one: check the name, set HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        why = "not on this machine, and the Hugging Face hub cannot be reached or is off (HF_HUB_OFFLINE): fetch it first or name a folder"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        why = f"fetching it failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    raise CheckpointError(f"model {name!r}{at}: {why}")
