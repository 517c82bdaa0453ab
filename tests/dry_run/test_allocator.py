"""The allocator's rules on cases worked out by hand."""

from collections.abc import Iterable

from hypershard.dry_run.allocator import MIB, Event, replay, rounded


def play(moves: Iterable[tuple[int, int]], *, expandable: bool, stream: str = "compute") -> list[Event]:
    """(block, bytes): the first time a block comes, the second time it goes."""
    seen: set[int] = set()
    events = []
    for block, num_bytes in moves:
        events.append(Event(block not in seen, block, num_bytes, stream, "any", "step"))
        seen.add(block)
    return events


def reserved(*moves: tuple[int, int], expandable: bool) -> float:
    return replay(play(moves, expandable=expandable), expandable=expandable).reserved_bytes / MIB


def test_sizes_are_rounded_to_512() -> None:
    assert [rounded(size) for size in (1, 511, 512, 513, MIB)] == [512, 512, 512, 1024, MIB]
    window = replay(play([(1, 1), (2, 513)], expandable=True), expandable=True).windows[0]
    assert window.in_use_bytes == 512 + 1024 and window.categories == {"any": 1536}


def test_segments_of_requests_by_size() -> None:
    """2 MiB for what is small, 20 MiB up to 10 MiB, then the request itself to the next 2 MiB."""
    assert reserved((1, MIB), expandable=False) == 2
    assert reserved((1, MIB + 1), expandable=False) == 20
    assert reserved((1, 10 * MIB - 512), expandable=False) == 20
    assert reserved((1, 11 * MIB), expandable=False) == 12
    assert reserved((1, MIB), expandable=True) == 2
    assert reserved((1, 11 * MIB), expandable=True) == 20
    assert reserved((1, 21 * MIB), expandable=True) == 40


def test_a_large_block_is_split_only_when_more_than_1_mib_is_left() -> None:
    # 30 MiB come and go; 29 MiB take all of it, so a request of 1.5 MiB needs a segment; 28 MiB leave it 2.
    again = [(1, 30 * MIB), (1, 30 * MIB)]
    assert reserved(*again, (2, 29 * MIB), (3, 3 * MIB // 2), expandable=False) == 30 + 20
    assert reserved(*again, (2, 28 * MIB), (3, 3 * MIB // 2), expandable=False) == 30
    # Where segments grow, whatever is left over serves.
    assert reserved((1, 40 * MIB), (1, 0), (2, 39 * MIB), (3, MIB + 512), expandable=True) == 60
    assert reserved((1, 40 * MIB), (1, 0), (2, 38 * MIB), (3, 2 * MIB), expandable=True) == 40


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    # Segments of 40 and 24 MiB are free; 22 MiB take the second one, so 40 still find the first.
    freed = [(1, 40 * MIB), (2, 24 * MIB), (1, 0), (2, 0)]
    assert reserved(*freed, (3, 22 * MIB), (4, 40 * MIB), expandable=False) == 64


def test_neighbours_that_are_free_are_one() -> None:
    # Two of 20 MiB side by side: with growing segments their room serves 40, else they are segments apart.
    moves = [(1, 20 * MIB), (2, 20 * MIB), (3, 20 * MIB), (1, 0), (2, 0), (4, 40 * MIB)]
    assert reserved(*moves, expandable=True) == 60
    assert reserved(*moves, expandable=False) == 100


def test_the_last_block_grows_by_what_is_missing() -> None:
    assert reserved((1, 30 * MIB), (1, 0), (2, 50 * MIB), expandable=True) == 60
    assert reserved((1, 30 * MIB), (1, 0), (2, 50 * MIB), expandable=False) == 80


def test_a_block_that_can_grow_is_the_last_choice() -> None:
    # Free: 24 MiB in front, and 20 at the end, which count as endless. So 18 MiB go to the front, though the end is
    # nearer in size, and 24 MiB make the end grow.
    moves = [(1, 24 * MIB), (2, 16 * MIB), (3, 20 * MIB), (1, 0), (3, 0), (4, 18 * MIB), (5, 24 * MIB)]
    assert reserved(*moves, expandable=True) == 80


def test_streams_do_not_share() -> None:
    events = play([(1, 40 * MIB), (1, 0)], expandable=True)
    events += play([(2, 40 * MIB)], expandable=True, stream="gather")
    played = replay(events, expandable=True)
    assert played.reserved_bytes == 80 * MIB
    assert played.windows[0].in_use_bytes == 40 * MIB
    assert played.windows[0].stream_bytes == {"compute": 40 * MIB, "gather": 40 * MIB}
