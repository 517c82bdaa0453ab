"""What a hub says about data sets and models, kept in a local cache so that the processes of a node ask once.

The only place that asks a hub; the bytes of a data set's files are read by `remote_files`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import DataError
from ...log import logger
from ...remote_files import Offline, Patience, RemoteFile, Unreachable, hub_endpoint, hub_host, hub_request, hub_url
from ...storage import exclusive, make_directory, read_json, write_bytes, write_json

# "c4", "allenai/c4", and either with a branch, tag or commit: "allenai/c4@main".
HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?(?:@[\w./-]+)?")
README = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What was asked so recently is not asked again: the processes of a job start within this time of each other.
_FRESH_SECONDS = 30.0
# With something in the cache to go on with, a hub that is down is not waited for as long as it can be.
_PATIENCE_WITH_CACHE = Patience(num_attempts=3, total_seconds=60.0)


@dataclass(frozen=True, kw_only=True)
class HubFileInfo:
    """A file of a data set; `version` is its content's hash."""

    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A data set at one commit; `name` is what the hub calls it, which may not be what it was asked for."""

    name: str
    commit: str
    files: tuple[HubFileInfo, ...]
    readme: str


def list_dataset(name: str, *, cache_dir: Path) -> HubDataset:
    """All files of the data set `name` (org/name, or with @revision) and its README.md, at the newest commit.

    A listing in the cache is used again for the same commit; for an unknown one only when the hub may not or cannot
    be asked, with a warning that gives its date. DataError: no such name, gated, or offline and nothing in the cache.
    StorageError: the hub cannot be reached, and nothing is in the cache.
    """
    kept = _Kept("datasets", name, cache_dir, flag="--dataset")
    value = kept.current(lambda info: _listing(kept.doing, info, kind="datasets"))
    files = tuple(HubFileInfo(**file) for file in value["files"])
    return HubDataset(name=value["name"], commit=value["commit"], files=files, readme=value["readme"])


def list_model(name: str, *, cache_dir: Path) -> dict[str, RemoteFile]:
    """All files of the model `name` (org/name, or with @revision) at its newest commit, by path.

    Cached as `list_dataset` does, with the same errors; DataError too for what can be no name.
    """
    if not HUB_NAME.fullmatch(name):
        raise DataError(
            f"--init_from={name}: found nothing there; expected a folder, s3://… or a model such as org/name"
        )
    kept = _Kept("models", name, cache_dir, flag="--init_from", file="files.json")
    value = kept.current(lambda info: _listing(kept.doing, info, kind="models"))
    return {
        file["path"]: RemoteFile(
            location=f"hf://{value['name']}@{value['commit']}/{file['path']}",
            size_bytes=file["size_bytes"],
            version=file["version"],
        )
        for file in value["files"]
    }


def _listing(doing: str, info: dict[str, Any], *, kind: str) -> dict[str, Any]:
    name, commit = info["id"], info["sha"]
    url: str | None = f"{hub_endpoint()}/api/{kind}/{name}/tree/{commit}?recursive=true&expand=false"
    files = []
    while url:
        answer = hub_request(doing, url, patience=Patience())
        for entry in _json(answer, doing):
            if entry["type"] == "file":
                lfs = entry.get("lfs") or {}
                file = HubFileInfo(
                    path=entry["path"],
                    size_bytes=int(lfs.get("size", entry["size"])),
                    version=str(lfs.get("oid") or entry["oid"]),
                )
                files.append(dataclasses.asdict(file))
        url = answer.links.get("next", {}).get("url")
    readme = ""
    if kind == "datasets" and any(file["path"] == README for file in files):
        location = f"hf://datasets/{name}@{commit}/{README}"
        readme = hub_request(doing, hub_url(location), patience=Patience()).content.decode(errors="replace")
    return {"name": name, "commit": commit, "files": files, "readme": readme}


def fetch_tokenizer(name: str, *, cache_dir: Path) -> Path:
    """A folder with the tokenizer files (`TOKENIZER_FILES`, as far as it has them) of the model `name`.

    Cached as `list_dataset` does, with the same errors; DataError too when the model has no tokenizer.json.
    """
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"--tokenizer={name}: found nothing there; expected a path, or a model's name such as org/name")
    kept = _Kept("models", name, cache_dir, flag="--tokenizer")
    commit: str = kept.current(lambda info: _fetch_files(kept, info))["commit"]
    return kept.folder / commit


def _fetch_files(kept: _Kept, info: dict[str, Any]) -> dict[str, Any]:
    """Its files into a folder named after the commit; that is believed once the cache names it."""
    name, commit = info["id"], info["sha"]
    there = {entry["rfilename"] for entry in info["siblings"]}
    if "tokenizer.json" not in there:
        shown = ", ".join(sorted(there)[:10]) or "no files"
        raise DataError(f"{kept.doing}: found {shown}; expected tokenizer.json, of the tokenizers library")
    folder = make_directory(kept.folder / commit)
    for file in TOKENIZER_FILES:
        if file in there:
            answer = hub_request(kept.doing, hub_url(f"hf://{name}@{commit}/{file}"), patience=Patience())
            write_bytes(folder / file, answer.content)
    return {"commit": commit}


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the cache holds about a name, and when the hub said so (seconds since 1970)."""

    value: dict[str, Any]
    asked_at: float

    @property
    def is_fresh(self) -> bool:
        return 0 <= time.time() - self.asked_at < _FRESH_SECONDS


class _Kept:
    """The cache's folder of one name on one hub, and the question which commit the name has now."""

    def __init__(self, kind: str, name: str, cache_dir: Path, *, flag: str, file: str = "kept.json") -> None:
        self.doing = f"{flag}={name}: no file or folder here has this name; asking the hub for it"
        self._name = name
        repository, _, revision = name.partition("@")
        self._url = f"{hub_endpoint()}/api/{kind}/{repository}/revision/{quote(revision or 'main', safe='')}"
        hub = re.sub(r"[^\w.-]", "_", hub_host())
        self.folder = cache_dir / "hub" / hub / kind / name.replace("/", "--")
        self._file = self.folder / file

    def current(self, make: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """What is known of the name: of the cache where that is right, else what `make` makes of the hub's description
        (`id`, `sha`, `siblings`), which has the key "commit"."""
        make_directory(self.folder)
        # One process of a node at a time; the others find what it wrote.
        with exclusive(self.folder / ".lock", doing=f"asking a hub for {self._name}"):
            found = self._read()
            if found is not None and found.is_fresh:
                return found.value
            try:
                info = self._ask(_PATIENCE_WITH_CACHE if found else Patience())
            except (Offline, Unreachable) as error:
                if found is None:
                    raise self._nothing_kept(error) from error
                asked_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.asked_at))
                logger.warning("%s; going on with what the hub said on %s", error, asked_at)
                return found.value
            is_same = found is not None and found.value["commit"] == info["sha"]
            value = found.value if found is not None and is_same else make(info)
            write_json(self._file, dataclasses.asdict(_Found(value=value, asked_at=time.time())))
            return value

    def _read(self) -> _Found | None:
        """None: nothing, or what a program of another version wrote."""
        try:
            kept = read_json(self._file)
            found = _Found(value=kept["value"], asked_at=float(kept["asked_at"]))
            return found if "commit" in found.value else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _ask(self, patience: Patience) -> dict[str, Any]:
        info = _json(hub_request(self.doing, self._url, patience=patience), self.doing)
        # The commit becomes the name of a folder, and what comes from outside is not to choose where that is.
        if not isinstance(info, dict) or not re.fullmatch(r"[0-9a-f]{7,64}", str(info.get("sha"))) or "id" not in info:
            raise DataError(f"{self.doing}: {hub_host()} answered {str(info)[:100]}; expected id and sha")
        return info

    def _nothing_kept(self, error: Offline | Unreachable) -> Exception:
        return type(error)(
            f"{error}; nothing is in the cache ({self.folder}): run once where there is a network with the same "
            "--cache_dir, or give a local path",
            shared_by_all_ranks=False,
        )


def _json(answer: Any, doing: str) -> Any:
    """What an answer says. Networks that want a login answer with a page of their own."""
    try:
        return answer.json()
    except ValueError as error:
        found = answer.headers.get("content-type", "something")
        raise DataError(f"{doing}: {hub_host()} answered {found}; expected JSON (is this a hub?)") from error
