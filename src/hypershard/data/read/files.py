"""From a name of `--dataset` to files: which there are, in what order, and to which split each belongs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import DataError
from ...log import logger
from ...remote_files import RemoteFile, list_files, open_file
from ...storage import readable_errors
from ..records import DataFile
from .cards import CardSplit, card_configs, choose_config, config_splits, glob_pattern
from .formats import UNDERSTOOD, format_of
from .hub import HUB_NAME, README, list_dataset

# "train-0001.jsonl", "val/", "c4-validation.00000.json.gz", but not "trainspotting.txt".
_SPLIT_NAME = re.compile(r"(?:^|[._-])(train|val)(?:ing|id|idation)?(?=[._-]|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """Everything that lies there, under its path below the data set, and the text of README.md."""

    dataset: str
    files: dict[str, DataFile]
    readme: str
    is_of_hub: bool = False


def find_files(dataset: str, *, dataset_config_name: str | None, cache_dir: Path) -> list[DataFile]:
    """The files of `dataset` in a fixed order: of a local file or folder, of s3://bucket/prefix, or of a hub name.

    A folder is searched through, but for hidden files. A README.md with a data card says which files a configuration
    has and their splits; else names do (a part of the path below the folder, such as `train/` or `c4-val.jsonl`).
    Where some files are train or val, those of neither kind are left out with a warning. What a hub says is kept in
    `cache_dir`. DataError: nothing there, files of other kinds only, no such configuration, or only validation files.
    StorageError: a disk, bucket or hub that does not answer.
    """
    path = Path(dataset).expanduser().absolute()
    if dataset.startswith("s3://"):
        listing = _s3_listing(dataset)
    elif "://" in dataset and not dataset.startswith("hf://datasets/"):
        raise DataError(
            f"--dataset={dataset}: found a {dataset.split('://', 1)[0]}:// URI; expected a path, s3://…, or a hub name"
        )
    elif path.exists():
        with readable_errors(path, "listing"):
            listing = _local_listing(dataset, path)
    else:
        listing = _hub_listing(dataset, cache_dir)
    return _train_and_val(_chosen(listing, dataset_config_name))


def _local_listing(dataset: str, path: Path) -> _Listing:
    is_file = path.is_file()
    found = [path] if is_file else sorted(one for one in path.rglob("*") if one.is_file())
    files = {}
    for one in found:
        status = one.stat()
        name = "" if is_file else one.relative_to(path).as_posix()
        files[name] = DataFile(
            location=str(one), size_bytes=status.st_size, version=str(status.st_mtime_ns), split=None
        )
    readme = (path / README).read_text(errors="replace") if README in files else ""
    return _Listing(dataset=dataset, files=files, readme=readme)


def _s3_listing(dataset: str) -> _Listing:
    files = {
        found.location.removeprefix(dataset.rstrip("/")).lstrip("/"): DataFile(
            location=found.location, size_bytes=found.size_bytes, version=found.version, split=None
        )
        for found in _s3_files(dataset)
    }
    readme = ""
    if README in files:
        with open_file(files[README].location, size_bytes=files[README].size_bytes) as file:
            readme = file.read().decode(errors="replace")
    return _Listing(dataset=dataset, files=files, readme=readme)


def _s3_files(dataset: str) -> list[RemoteFile]:
    try:
        return list_files(dataset)
    except DataError as error:
        raise DataError(f"--dataset={dataset}: {error}") from error


def _hub_listing(dataset: str, cache_dir: Path) -> _Listing:
    name = dataset.removeprefix("hf://datasets/")
    if not HUB_NAME.fullmatch(name) or format_of(name) is not None:
        raise DataError(
            f"--dataset={dataset}: found nothing there; expected a path of files that end in {UNDERSTOOD}, "
            "s3://bucket/prefix, or a hub name such as org/name"
        )
    found = list_dataset(name, cache_dir=cache_dir)
    files = {
        file.path: DataFile(
            location=f"hf://datasets/{found.name}@{found.commit}/{file.path}",
            size_bytes=file.size_bytes,
            version=file.version,
            split=None,
        )
        for file in found.files
    }
    return _Listing(dataset=dataset, files=files, readme=found.readme, is_of_hub=True)


def _chosen(listing: _Listing, dataset_config_name: str | None) -> list[DataFile]:
    """The files to read among all that are listed, with what the card or their names say of splits."""
    dataset, files = listing.dataset, listing.files
    where = f"--dataset={dataset}: {README}"
    configs = card_configs(listing.readme, where=where)
    config = choose_config(configs, dataset=dataset, dataset_config_name=dataset_config_name)
    if list(files) == [""]:  # one file, named itself
        if format_of(files[""].name) is None:
            raise DataError(f"--dataset={dataset}: found a file of another kind; expected {UNDERSTOOD}")
        return [files[""]]
    names = sorted((name for name in files if not _is_hidden(name)), key=lambda name: name.split("/"))
    if config is None:
        splits = {name: _split_named(*name.split("/")) for name in names if format_of(name)}
        if listing.is_of_hub:
            splits = _most_common_format(dataset, splits)
    else:
        splits = _splits_of_card(names, config_splits(config, where=where), where=where)
    if not splits:
        shown = ", ".join(names[:5]) or "nothing"
        raise DataError(f"--dataset={dataset}: found {shown}; expected files that end in {UNDERSTOOD}")
    return [replace(files[name], split=split) for name, split in splits.items()]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _most_common_format(dataset: str, splits: dict[str, str | None]) -> dict[str, str | None]:
    """Without a card: hubs hold licences beside the data, and the same rows in two formats."""
    formats = {name: found.name for name in splits if (found := format_of(name))}
    common = Counter(formats.values()).most_common()
    if len(common) > 1:
        logger.warning(
            "--dataset=%s: it has no card that says which files are meant; only those in its most common format are "
            "read, %s, not %s",
            dataset,
            common[0][0],
            ", ".join(f"{count} {name}" for name, count in common[1:]),
        )
    return {name: split for name, split in splits.items() if formats[name] == common[0][0]}


def _splits_of_card(names: Sequence[str], card_splits: Sequence[CardSplit], *, where: str) -> dict[str, str | None]:
    """Name -> split, for the files that a configuration names."""
    splits: dict[str, str | None] = {}
    for one in card_splits:
        patterns = [glob_pattern(glob) for glob in one.globs]
        found = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
        if not any(format_of(name) for name in found):
            raise DataError(
                f"{where} names {', '.join(one.globs)}; found {', '.join(found[:5]) or 'no such file'}, "
                f"expected files that end in {UNDERSTOOD}"
            )
        for name in found:
            if format_of(name):
                splits.setdefault(name, _split_named(*name.split("/")) if one.name is None else _split_named(one.name))
    return {name: splits[name] for name in names if name in splits}


def _split_named(*words: str) -> str | None:
    for word in words:
        if match := _SPLIT_NAME.search(word):
            return match.group(1).lower()
    return None


def _train_and_val(files: list[DataFile]) -> list[DataFile]:
    if not any(file.split for file in files):
        return files
    unused = [file.location for file in files if file.split is None]
    if unused:
        logger.warning(
            "%d files are not read, because others are named train or val: %s", len(unused), ", ".join(unused[:5])
        )
    files = [file for file in files if file.split]
    if not any(file.split == "train" for file in files):
        raise DataError(
            f"--dataset: found only validation files, such as {files[0].location}; expected some named train as well"
        )
    return files
