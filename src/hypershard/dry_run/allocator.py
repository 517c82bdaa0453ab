"""What CUDA's caching allocator would reserve for a recorded sequence of allocations. Pure arithmetic, no torch.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13), with its default settings: sizes are
rounded up to 512 bytes; up to 1 MiB comes from a small pool, more from a large one; each stream has pools of its own,
and a block that one stream freed serves no other; the smallest free block that is large enough is taken and, if enough
is left over, split; neighbours that are free grow together. Memory that ran out, and what is then given back, is not
played: the answer is what an allocator with room enough would have reserved.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
_ROUNDING = 512  # kMinBlockSize
_SMALL_UP_TO = MIB  # kSmallSize: the largest request that the small pool serves
_SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
_LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
_OWN_SEGMENT_FROM = 10 * MIB  # kMinLargeAlloc: from here on a segment is made for one request
_OWN_ROUNDING = 2 * MIB  # kRoundLarge


NO_LAYER = -1


class Event(NamedTuple):
    """Memory that comes (`is_new`) or goes; `block` tells which, and is given once.

    `window` is the part of a training step it happens in, `layer` the layer that then runs, or NO_LAYER.
    """

    is_new: bool
    block: int
    num_bytes: int
    stream: str
    category: str
    window: str
    layer: int = NO_LAYER


@dataclass(frozen=True)
class Window:
    """The most of a named part of a step: bytes in use, with their categories then, and each stream's own most."""

    name: str
    in_use_bytes: int
    categories: dict[str, int]
    stream_bytes: dict[str, int]


@dataclass(frozen=True)
class Replay:
    """Bytes reserved after all, and the windows in the order they first came."""

    reserved_bytes: int
    windows: tuple[Window, ...]


class Pool:
    """The blocks of one stream that are small, or that are large."""

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.reserved_bytes = 0
        self._end = 0  # of the addresses given out; segments that do not grow lie a byte apart, so never grow together
        self._is_small, self._expandable = is_small, expandable
        self._by_size: list[tuple[int, int]] = []  # free blocks, (bytes, address), in order
        self._size_at: dict[int, int] = {}  # free blocks by where they begin
        self._start_of: dict[int, int] = {}  # and by where they end
        self._lengths: dict[int, int] = {}  # blocks in use

    def allocate(self, num_bytes: int) -> int:
        """The address of a block of `num_bytes`, a multiple of 512."""
        found = self._best_fit(num_bytes)
        if found is None:
            found = self._grow(num_bytes)
        size, start = found
        self._take(size, start)
        rest = size - num_bytes
        if rest >= _ROUNDING and (self._is_small or self._expandable or rest > _SMALL_UP_TO):
            self._give(rest, start + num_bytes)
        else:
            num_bytes = size
        self._lengths[start] = num_bytes
        return start

    def free(self, start: int) -> None:
        size = self._lengths.pop(start)
        before = self._start_of.get(start)
        if before is not None:
            self._take(start - before, before)
            start, size = before, size + start - before
        after = self._size_at.get(start + size)
        if after is not None:
            self._take(after, start + size)
            size += after
        self._give(size, start)

    def _best_fit(self, num_bytes: int) -> tuple[int, int] | None:
        index = bisect.bisect_left(self._by_size, (num_bytes, -1))
        if index == len(self._by_size):
            return None
        size, start = self._by_size[index]
        # The last block can grow, and counts as large as it can become: any other that is large enough goes before it.
        if self._expandable and start + size == self._end and index + 1 < len(self._by_size):
            return self._by_size[index + 1]
        return size, start

    def _grow(self, num_bytes: int) -> tuple[int, int]:
        """Reserve more, and the free block that holds `num_bytes` now."""
        if self._expandable:
            page = _SMALL_SEGMENT if self._is_small else _LARGE_SEGMENT
            start = self._start_of.get(self._end, self._end)  # behind the last block in use
            left = self._end - start
            more = _up_to(num_bytes - left, page)
            if left:
                self._take(left, start)
            size = left + more
        else:
            size = more = _segment_bytes(num_bytes)
            start = self._end + 1
        self._end = start + size
        self.reserved_bytes += more
        self._give(size, start)
        return size, start

    def _give(self, size: int, start: int) -> None:
        bisect.insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of[start + size] = start

    def _take(self, size: int, start: int) -> None:
        del self._by_size[bisect.bisect_left(self._by_size, (size, start))]
        del self._size_at[start], self._start_of[start + size]


def rounded(num_bytes: int) -> int:
    """What a request of `num_bytes` takes."""
    return _up_to(max(num_bytes, 1), _ROUNDING)


class _Peaks:
    """The most so far of one window."""

    def __init__(self) -> None:
        self._in_use, self._categories = -1, Counter[str]()
        self._streams: dict[str, int] = defaultdict(int)

    def see(self, streams: Mapping[str, int], categories: Counter[str]) -> None:
        """What is in use now; of `streams` only what may have grown."""
        total = categories.total()
        if total > self._in_use:
            self._in_use, self._categories = total, Counter(categories)
        for name, num_bytes in streams.items():
            self._streams[name] = max(self._streams[name], num_bytes)

    def window(self, name: str) -> Window:
        return Window(name, self._in_use, dict(+self._categories), dict(self._streams))


def replay(events: Iterable[Event], *, expandable: bool) -> Replay:
    """Play `events` through one pool per stream and kind of size. `expandable`: segments grow (expandable_segments)."""
    pools: dict[str, Pool] = {}
    addresses: dict[int, tuple[str, int, int]] = {}
    peaks: dict[str, _Peaks] = {}
    streams, categories = Counter[str](), Counter[str]()
    window = ""
    for event in events:
        if event.window != window:
            window = event.window
            peaks.setdefault(window, _Peaks()).see(streams, categories)
        if event.is_new:
            size = rounded(event.num_bytes)
            is_small = size <= _SMALL_UP_TO
            name = f"{event.stream}/{'small' if is_small else 'large'}"
            pool = pools.setdefault(name, Pool(is_small=is_small, expandable=expandable))
            addresses[event.block] = name, pool.allocate(size), size
            streams[event.stream] += size
            categories[event.category] += size
            peaks[window].see({event.stream: streams[event.stream]}, categories)
        else:
            name, start, size = addresses.pop(event.block)
            pools[name].free(start)
            streams[event.stream] -= size
            categories[event.category] -= size
    reserved = sum(pool.reserved_bytes for pool in pools.values())
    return Replay(reserved_bytes=reserved, windows=tuple(peak.window(name) for name, peak in peaks.items()))


def _segment_bytes(num_bytes: int) -> int:
    """The segment that is made for a request which nothing free can serve."""
    if num_bytes <= _SMALL_UP_TO:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if num_bytes < _OWN_SEGMENT_FROM else _up_to(num_bytes, _OWN_ROUNDING)


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
