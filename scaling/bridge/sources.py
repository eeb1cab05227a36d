"""Where a model's files are: a folder on this machine, the zoo, or a repository on the hub."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling.bridge.refusals import not_safetensors
from sims.store.files import read_json

__all__ = ["ZOO", "Source", "is_zoo", "join", "locate", "zoo_names"]

ZOO = Path(__file__).parents[1] / "zoo" / "models"
"""The folder of the models that come with the package."""

REACH = 2.0
"""Seconds within which the hub must answer."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder or a repository; names of files in it have forward slashes."""

    origin: str
    """What to call it in messages."""
    fetch: Callable[[str], Path | None]
    """From a file's name to its path on this machine; None if there is no such file."""
    names: Callable[[str], list[str] | None]
    """The names in a folder of it, for messages; None if they are not known."""
    weights: tuple[str, ...] | None = None
    """The weights file, if the path names one."""


def locate(path_or_hub_id: str | Path, revision: str | None) -> Source:
    """The source that a path or a hub id names; ``ValueError`` if it can be neither."""
    path = Path(path_or_hub_id)
    if path.is_file():
        return _beside(path)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder: revision={revision!r} is for repositories on the hub.")
        return Source(str(path), _local(path), _listing(path))
    text = str(path_or_hub_id)
    if revision is None and is_zoo(path_or_hub_id):
        return locate(ZOO / text, None)
    # A name on the hub has at most one slash, and no file of weights is a repository.
    first = Path(text.split("/")[0])
    looks_local = text.endswith(SUFFIXES) or isinstance(path_or_hub_id, Path) or ("/" in text and first.is_dir())
    if looks_local and revision is None:
        kind = "a special file or a link that leads nowhere" if path.is_symlink() or path.exists() else "nothing"
        raise ValueError(
            f"{path}: neither a folder nor a .safetensors file, but {kind}. It is looked up on the hub only with a "
            f"revision, for example main. The zoo has {', '.join(zoo_names())}."
        )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_hub_id)):
        raise ValueError(
            f"{path_or_hub_id}: neither a folder, nor of the zoo ({', '.join(zoo_names())}), nor the name of a "
            "repository on the hub (owner/name)."
        )
    return Source(text, _hub(text, revision), lambda _: None)


def zoo_names() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(folder.name for folder in ZOO.iterdir() if folder.is_dir())


def is_zoo(path_or_hub_id: str | Path) -> bool:
    """Whether a name means a model of the zoo; a folder or file of that name goes before."""
    return str(path_or_hub_id) in zoo_names() and not Path(path_or_hub_id).exists()


def join(folder: str, name: str) -> str:
    """A name in a folder, either of which may be empty."""
    return "/".join(part for part in (folder, name) if part)


def _beside(weights: Path) -> Source:
    local = _local(weights.parent)
    if weights.suffix != ".safetensors":
        path = local("config.json")
        config = {} if path is None else read_json(path)
        listed = config.get("architectures")
        named = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else "")
        raise ValueError(not_safetensors(weights, named if isinstance(named, str) else ""))

    def fetch(name: str) -> Path | None:
        return None if name == "model_index.json" else local(name)

    return Source(str(weights.parent), fetch, _listing(weights.parent), (weights.name,))


def _listing(root: Path) -> Callable[[str], list[str] | None]:
    def names(folder: str) -> list[str] | None:
        path = root / folder
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    return names


def _local(folder: Path) -> Callable[[str], Path | None]:
    root = folder.resolve()
    # In huggingface_hub's cache the files of a snapshot are links to its blobs.
    roots = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]

    def fetch(name: str) -> Path | None:
        path = folder / name
        if not path.is_file():
            return None
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise ValueError(f"{path}: links to {path.resolve()}, outside the model's folder; copy the file there.")
        return path

    return fetch


def _hub(repository: str, revision: str | None) -> Callable[[str], Path | None]:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.file_download import repo_folder_name

    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable()
    cached = (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")).is_dir()
    if problem and not cached:
        raise ValueError(
            f"{repository}: no folder of this name is here, no model of the zoo ({', '.join(zoo_names())}), and "
            f"nothing in huggingface_hub's cache; the hub was not asked: {problem}. Give the path of a model's folder, "
            "or try again with a connection."
        )
    options: Any = {"local_files_only": True} if problem else {}

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, **options))
        except errors.EntryNotFoundError:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise ValueError(f"{repository}: neither a folder nor reachable on the hub: {error}") from error

    return fetch


def _unreachable() -> str | None:
    """Why the hub does not answer; None if it does. Its client would try each file for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    # The answer arrives here; a thread, for looking up the address of a host knows no deadline.
    outcome = [f"no answer within {REACH:g} seconds"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH)
        except Exception as error:  # Of the HTTP library that huggingface_hub uses.
            outcome[0] = str(error) or type(error).__name__
        else:
            outcome.clear()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH)
    return outcome[0] if outcome else None
