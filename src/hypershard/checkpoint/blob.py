"""One rank's part of one save as one run of bytes that proves itself: in a memory slot, on a wire, in a file. No torch.

    0        head      4096 bytes: magic, where the table lies, its checksum, the head's own; zeros: nothing here yet
    4096     payload   the tensors' bytes, each from a multiple of 64 on
    ...      table     JSON: which job, lineage, step and rank; facts; the tensors' places; the payload's checksums

The head is zeroed before anything else is written and written last. A blob is valid when head, table and every
block of the payload match their sums, so one that was cut off at any point, or of which one bit flipped, is not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import DamagedCheckpoint
from .lineage import Lineage
from .sums import FileSum, Source, crc32c, damage_of

HEAD_BYTES = 4096
ALIGNMENT_BYTES = 64  # a cache line
_MAGIC = b"HSBLOB01"
_HEAD = struct.Struct("<8sQQII")  # magic, table's offset, table's size, table's CRC32C, CRC32C of the fields before
_MAX_TABLE_BYTES = 2**30  # far above the table of any model; a damaged size must not ask for all memory
NO_HEAD = bytes(HEAD_BYTES)
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A box of one tensor: `offsets` and `sizes` within its global `shape`, `begin` counts from the payload's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True)
class BlobTable:
    """What a blob says of itself. `job` tells runs apart, `lineage` the timelines of one run.

    Ranks that hold the same boxes (replicas) hold the same `part`; any one blob of each of the `num_parts` parts
    makes the checkpoint whole.
    """

    job: str
    lineage: Lineage
    step: int
    rank: int
    world_size: int
    part: int
    num_parts: int
    saved_at: str
    facts: Mapping[str, Any]
    items: tuple[Item, ...]
    payload: FileSum

    @property
    def size_bytes(self) -> int:
        return self.payload.size_bytes


def layout_items(boxes: Sequence[tuple[str, str, Sizes, Sizes, Sizes, int]]) -> list[Item]:
    """Place boxes (name, dtype, shape, offsets, sizes, size_bytes) one after the other."""
    items, begin = [], 0
    for name, dtype, shape, offsets, sizes, size_bytes in boxes:
        items.append(Item(name, dtype, shape, offsets, sizes, begin, size_bytes))
        begin += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return items


def table_bytes(table: BlobTable) -> bytes:
    value = {
        "job": table.job,
        "lineage": asdict(table.lineage),
        "step": table.step,
        "rank": table.rank,
        "world_size": table.world_size,
        "part": table.part,
        "num_parts": table.num_parts,
        "saved_at": table.saved_at,
        "facts": dict(table.facts),
        "items": [list(vars(item).values()) for item in table.items],
        "payload": table.payload.to_json(),
    }
    return json.dumps(value, separators=(",", ":")).encode()


def head_bytes(table: bytes, *, payload_bytes: int) -> bytes:
    """The head of a blob whose `table` follows a payload of so many bytes."""
    fields = _HEAD.pack(_MAGIC, HEAD_BYTES + payload_bytes, len(table), crc32c(table), 0)[:-4]
    return (fields + struct.pack("<I", crc32c(fields))).ljust(HEAD_BYTES, b"\0")


def blob_bytes(head: bytes) -> int | None:
    """The size of the whole blob by its head, or None when the head is not valid."""
    fields = _read_head(head)
    return None if fields is None else fields[0] + fields[1]


def _read_head(head: bytes) -> tuple[int, int, int] | None:
    """Offset, size and CRC32C of the table, or None when this is no head."""
    if len(head) < _HEAD.size or head[:8] != _MAGIC:
        return None
    _, offset, size, crc, own = _HEAD.unpack_from(head)
    if own != crc32c(head[: _HEAD.size - 4]) or offset < HEAD_BYTES or size > _MAX_TABLE_BYTES:
        return None
    return offset, size, crc


def read_table(source: Source) -> BlobTable | None:
    """The table of the blob in `source`; None when there is none (never finished, or being written now).

    Raises DamagedCheckpoint when there is a head and what it names is damaged.
    """
    fields = _read_head(bytes(source.read(0, HEAD_BYTES)))
    if fields is None:
        return None
    offset, size, crc = fields
    content = bytes(source.read(offset, size))
    if len(content) != size or crc32c(content) != crc:
        raise DamagedCheckpoint(f"{source.name}: its table of contents is damaged")
    try:
        value = json.loads(content)
        table = BlobTable(
            job=str(value["job"]),
            lineage=Lineage(int(value["lineage"]["generation"]), str(value["lineage"]["id"])),
            step=int(value["step"]),
            rank=int(value["rank"]),
            world_size=int(value["world_size"]),
            part=int(value["part"]),
            num_parts=int(value["num_parts"]),
            saved_at=str(value["saved_at"]),
            facts=dict(value["facts"]),
            items=tuple(
                Item(name, dtype, tuple(shape), tuple(offsets), tuple(sizes), begin, size_bytes)
                for name, dtype, shape, offsets, sizes, begin, size_bytes in value["items"]
            ),
            payload=FileSum.from_json(value["payload"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{source.name}: its table is not one of this version: {error}") from error
    if table.payload.size_bytes != offset - HEAD_BYTES:
        found = offset - HEAD_BYTES
        raise DamagedCheckpoint(f"{source.name}: found a payload of {found} bytes, expected {table.size_bytes}")
    return table


def blob_damage(source: Source, table: BlobTable) -> str | None:
    """What is wrong with the payload of a blob, or None when every byte is as saved."""
    return damage_of(source, table.payload, start=HEAD_BYTES)
