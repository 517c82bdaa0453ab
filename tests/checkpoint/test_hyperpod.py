"""Blobs in HyperPod's memory: through AWS's real client, against a daemon on loopback that fails as told."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hyperpod_daemon import Daemon, checksum, hyperpod_daemon

from hypershard.checkpoint import hyperpod_client
from hypershard.checkpoint.blob import HEAD_BYTES, BlobTable, blob_damage, head_bytes, layout_items, table_bytes
from hypershard.checkpoint.hyperpod import HyperPodMemory
from hypershard.checkpoint.hyperpod_client import STEPS_RETAINED, OutOfReach
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.sums import read_verified, sum_of
from hypershard.errors import DamagedCheckpoint, StorageError

JOB = "run/ä 7"  # neither fits into a URL
FIRST, SECOND, THIRD = (Lineage(generation, f"{generation:016x}") for generation in (1, 2, 3))
BLOBS, TABLES = "/(0|1)/", "/(2|3)/"  # the shards of a job of two ranks
PATIENT, HASTY = 20.0, 0.4


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hyperpod_client, "_PAUSE_SECONDS", 0.01)
    with hyperpod_daemon() as running:
        yield running


def memory(daemon: Daemon, job: str = JOB, *, seconds: float = PATIENT) -> HyperPodMemory:
    return HyperPodMemory(job, url=daemon.url, timeout_seconds=seconds)


def make(step: int, rank: int = 0, world_size: int = 2, lineage: Lineage = FIRST, **other: object) -> tuple:
    """A finished blob and its table; the bytes follow from step, rank and lineage."""
    size_bytes = int(other.pop("size_bytes", 3000))
    payload = random.Random(f"{step} {rank} {lineage}").randbytes(size_bytes)
    items = layout_items([("model/weight", "uint8", (size_bytes,), (0,), (size_bytes,), size_bytes)])
    table = BlobTable(
        job=str(other.pop("job", JOB)),
        lineage=lineage,
        step=step,
        rank=rank,
        world_size=world_size,
        part=int(other.pop("part", rank)),
        num_parts=int(other.pop("num_parts", world_size)),
        saved_at="2030-01-01T00:00:00Z",
        facts={"step": step},
        items=tuple(items),
        payload=sum_of(payload),
    )
    content = table_bytes(table)
    return head_bytes(content, payload_bytes=len(payload)) + payload + content, table


def put(held: HyperPodMemory, step: int, world_size: int = 2, lineage: Lineage = FIRST) -> list[BlobTable]:
    """Save `step` from all ranks."""
    made = [make(step, rank, world_size, lineage) for rank in range(world_size)]
    for blob, table in made:
        held.put(blob, table)
    return [table for _, table in made]


def payload_of(held: HyperPodMemory, table: BlobTable) -> bytes:
    [view] = read_verified(held.source(table), table.payload, [(0, table.size_bytes)], start=HEAD_BYTES)
    return bytes(view)


def steps_of(held: HyperPodMemory) -> list[tuple[int, int, int]]:
    """(generation, step, rank) of all that is found, in the order found."""
    return [(table.lineage.generation, table.step, table.rank) for table in held.tables()]


# --- what is put is found ------------------------------------------------------------------------------------


def test_two_ranks_and_several_steps_come_back_bit_equal(daemon: Daemon) -> None:
    ranks = [memory(daemon), memory(daemon)]
    made = [make(step, rank) for step in (0, 10, 20) for rank in (0, 1)]
    for blob, table in made:
        ranks[table.rank].put(memoryview(bytearray(blob + b"room for a longer table")), table)

    held = memory(daemon)
    assert held.tables() == [made[index][1] for index in (4, 5, 2, 3, 0, 1)]
    for blob, table in made:
        assert payload_of(held, table) == blob[HEAD_BYTES : HEAD_BYTES + table.size_bytes]
        assert blob_damage(held.source(table), table) is None


def test_finding_out_what_is_held_moves_no_payload_and_reading_moves_it_once(daemon: Daemon) -> None:
    held = memory(daemon)
    tables = put(held, 5)
    daemon.requests.clear()
    assert len(held.tables()) == 2
    assert not [request for request in daemon.requests if request.endswith(("/0/5", "/1/5"))]
    source = held.source(tables[1])
    for offset in (0, HEAD_BYTES, HEAD_BYTES + 1000):
        assert len(source.read(offset, 100)) == 100
    assert len([request for request in daemon.requests if request.endswith("/1/5")]) == 1


def test_nothing_was_saved_yet(daemon: Daemon) -> None:
    assert memory(daemon).tables() == []


def test_the_highest_steps_are_kept(daemon: Daemon) -> None:
    held = memory(daemon)
    for step in range(STEPS_RETAINED + 2):
        put(held, step)
    assert steps_of(held) == [(1, step, rank) for step in (4, 3, 2) for rank in (0, 1)]
    assert all(len(space.steps) <= STEPS_RETAINED for space in daemon.spaces.values())


def test_another_number_of_ranks_finds_them(daemon: Daemon) -> None:
    before = put(memory(daemon), 10, world_size=2)
    after = make(20, 0, 3, SECOND)
    held = memory(daemon)
    held.put(*after)  # rank 0 of three: not whole, so what was there stays
    assert held.tables() == [after[1], *before]


def test_jobs_do_not_see_each_other(daemon: Daemon) -> None:
    put(memory(daemon), 10)
    other = memory(daemon, "another")
    blob, table = make(10, job="another", num_parts=1)
    other.put(blob, table)
    assert other.tables() == [table]
    assert len(memory(daemon).tables()) == 2


# --- timelines -----------------------------------------------------------------------------------------------


def test_after_going_back_the_lower_steps_are_kept_and_told_apart(daemon: Daemon) -> None:
    for step in (80, 90, 100):
        put(memory(daemon), step, lineage=FIRST)
    resumed = memory(daemon)
    resumed.put(*make(70, 0, lineage=SECOND))
    assert steps_of(resumed)[0] == (2, 70, 0)
    assert (1, 100, 0) in steps_of(resumed), "nothing of the second start is whole yet"
    resumed.put(*make(70, 1, lineage=SECOND))
    put(resumed, 80, lineage=SECOND)
    assert steps_of(resumed) == [(2, step, rank) for step in (80, 70) for rank in (0, 1)]
    assert payload_of(resumed, resumed.tables()[0]) != make(80, 0, lineage=FIRST)[0][HEAD_BYTES:][:3000]


def test_starts_that_end_early_do_not_fill_the_memory(daemon: Daemon) -> None:
    put(memory(daemon), 10, lineage=FIRST)
    put(memory(daemon), 11, lineage=SECOND)
    put(memory(daemon), 12, lineage=THIRD)
    assert {generation for generation, _, _ in steps_of(memory(daemon))} == {2, 3}
    assert len(daemon.spaces) == 3, "two starts and the index"


def test_replicas_make_a_step_whole(daemon: Daemon) -> None:
    put(memory(daemon), 10, lineage=FIRST)
    held = memory(daemon)
    held.put(*make(20, 0, lineage=SECOND, part=0, num_parts=1))
    held.put(*make(30, 0, lineage=SECOND, part=0, num_parts=1))
    assert steps_of(held) == [(2, 30, 0), (2, 20, 0)]


# --- damage --------------------------------------------------------------------------------------------------


def test_a_bit_that_flips_once_on_the_way_is_asked_for_again(daemon: Daemon) -> None:
    held = memory(daemon)
    [table, _] = put(held, 10)
    with daemon.failing("flip", f"GET .*{BLOBS}", times=1):
        assert payload_of(held, table) == make(10)[0][HEAD_BYTES:][:3000]


@pytest.mark.parametrize("fault", ["flip", "no meta"])
def test_a_blob_that_does_not_match_the_daemons_checksum_is_damaged(daemon: Daemon, fault: str) -> None:
    held = memory(daemon)
    [table, _] = put(held, 10)
    with daemon.failing(fault, f"GET .*{BLOBS}"), pytest.raises(DamagedCheckpoint, match="shard 0 of step 10"):
        payload_of(held, table)


def test_a_blob_that_is_cut_off_is_an_error(daemon: Daemon) -> None:
    held = memory(daemon)
    [table, _] = put(held, 10)
    with daemon.failing("cut", f"GET .*{BLOBS}"), pytest.raises(StorageError, match="IncompleteRead"):
        payload_of(held, table)


def spoil(daemon: Daemon, key: tuple[int, int], at: int) -> None:
    """Flip a bit in the daemon's memory before it sums up: only our own checksums can tell."""
    [space] = [space for name, space in daemon.spaces.items() if name.endswith("-ranks")]
    body = bytearray(space.shards[key][0])
    body[at] ^= 4
    meta = space.shards[key][1].replace(checksum(space.shards[key][0]), checksum(bytes(body)))
    space.shards[key] = (bytes(body), meta)


@pytest.mark.parametrize("at", [HEAD_BYTES, HEAD_BYTES + 2999])
def test_a_bit_that_flips_in_the_daemon_is_noticed_by_our_checksums(daemon: Daemon, at: int) -> None:
    held = memory(daemon)
    [table, other] = put(held, 10)
    spoil(daemon, (0, 10), at)
    assert "checksum" in str(blob_damage(held.source(table), table))
    assert blob_damage(held.source(other), other) is None


@pytest.mark.parametrize("at", [HEAD_BYTES, HEAD_BYTES + 50])
def test_a_damaged_table_is_named_and_passed_over(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    held = memory(daemon)
    put(held, 10)
    spoil(daemon, (2, 10), at)
    assert steps_of(held) == [(1, 10, 1)]
    assert "step 10" in caplog.text and "passed over" in caplog.text


def test_another_blob_in_its_place_is_not_taken_for_it(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    held = memory(daemon)
    put(held, 10)
    put(held, 20)
    [space] = [space for name, space in daemon.spaces.items() if name.endswith("-ranks")]
    space.shards[2, 20] = space.shards[2, 10]
    assert steps_of(held) == [(1, 20, 1), (1, 10, 0), (1, 10, 1)]
    assert "found another blob" in caplog.text


def test_a_blob_that_was_dropped_since_it_was_listed(daemon: Daemon) -> None:
    held = memory(daemon)
    [table, _] = put(held, 10)
    source = held.source(table)
    for step in (20, 30, 40):
        put(held, step)
    with pytest.raises(FileNotFoundError):
        source.read(0, 1)


# --- a daemon that fails -------------------------------------------------------------------------------------


def test_no_daemon_is_an_error_in_every_method(daemon: Daemon) -> None:
    held = memory(daemon)
    blob, table = make(10)
    source = held.source(table)
    with daemon.refusing():
        for ask in (lambda: held.put(blob, table), held.tables, lambda: source.read(0, 1), held.forget):
            with pytest.raises(OutOfReach, match=r"refused.*--hyperpod_memory_url") as error:
                ask()
            assert not error.value.shared_by_all_ranks
    held.put(blob, table)
    assert held.tables() == [table]


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_a_daemon_that_hangs_is_an_error(daemon: Daemon, fault: str) -> None:
    held = memory(daemon, seconds=HASTY)
    [table, _] = put(held, 10)
    source = held.source(table)
    with daemon.failing(fault):
        for ask in (lambda: held.put(*make(20)), held.tables, lambda: source.read(0, 1)):
            with pytest.raises(OutOfReach, match=r"timed out|not done within"):
                ask()
    assert held.tables()[0] == table


def test_a_daemon_that_hangs_in_the_middle_is_not_one_that_holds_little(daemon: Daemon) -> None:
    held = memory(daemon, seconds=HASTY)
    put(held, 10)
    with daemon.failing("stall", "GET .*/3/10"), pytest.raises(OutOfReach, match="shard 3 of step 10"):
        held.tables()


def test_a_daemon_that_takes_no_more_bytes_is_an_error(daemon: Daemon) -> None:
    held = memory(daemon, seconds=HASTY)
    blob, table = make(10, size_bytes=24 * 2**20)  # more than the sockets' buffers
    with daemon.failing("stall", f"POST .*{BLOBS}"), pytest.raises(OutOfReach):
        held.put(blob, table)
    assert held.tables() == []


def test_sending_may_take_longer_than_connecting(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperpod_client, "_CONNECT_SECONDS", 0.5)
    held = memory(daemon)
    blob, table = make(10, size_bytes=24 * 2**20)
    with daemon.failing("slow"):  # 1.2 seconds
        held.put(blob, table)
    assert payload_of(held, table) == blob[HEAD_BYTES : HEAD_BYTES + table.size_bytes]


@pytest.mark.parametrize("pattern", ["namespaces", "index", BLOBS, TABLES])
def test_a_put_that_the_daemon_refuses_leaves_nothing_to_be_found_and_may_come_again(
    daemon: Daemon, pattern: str
) -> None:
    held = memory(daemon)
    earlier = put(held, 10)
    blob, table = make(20)
    with daemon.failing("500", pattern), pytest.raises(StorageError, match="500"):
        held.put(blob, table)
    assert held.tables() == earlier
    held.put(blob, table)
    assert held.tables() == [table, *earlier]
    assert payload_of(held, table) == blob[HEAD_BYTES : HEAD_BYTES + table.size_bytes]


@pytest.mark.parametrize("pattern", [BLOBS, TABLES])
def test_a_put_whose_answer_was_lost_may_come_again(daemon: Daemon, pattern: str) -> None:
    held = memory(daemon)
    blob, table = make(20)
    with daemon.failing("late 500", pattern), pytest.raises(StorageError, match="500"):
        held.put(blob, table)
    held.put(blob, table)
    assert held.tables() == [table]
    assert payload_of(held, table) == blob[HEAD_BYTES : HEAD_BYTES + table.size_bytes]


def test_one_error_while_reading_is_asked_past(daemon: Daemon) -> None:
    held = memory(daemon)
    tables = put(held, 10)
    for pattern in ("latest", "index/0", TABLES):
        with daemon.failing("500", f"GET .*{pattern}", times=1):
            assert held.tables() == tables


@pytest.mark.parametrize("fault", ["500", "garbage"])
def test_a_daemon_that_cannot_list_does_not_look_like_one_that_holds_nothing(daemon: Daemon, fault: str) -> None:
    held = memory(daemon)
    put(held, 10)
    with daemon.failing(fault, "latest"), pytest.raises(StorageError, match="listing"):
        held.tables()


def test_a_daemon_that_lost_everything_is_filled_again(daemon: Daemon) -> None:
    held = memory(daemon)
    put(held, 10)
    daemon.forget_everything()
    assert held.tables() == []
    tables = put(held, 20)
    assert held.tables() == tables


def test_ranks_that_make_the_namespace_at_the_same_time(daemon: Daemon) -> None:
    held = memory(daemon)
    with daemon.failing("race", "POST .*namespaces", times=2):
        tables = put(held, 10)
    assert held.tables() == tables


def test_a_namespace_for_another_number_of_ranks_is_refused(daemon: Daemon) -> None:
    held = memory(daemon)
    put(held, 10)
    for name, space in daemon.spaces.items():
        space.num_ranks += not name.endswith("index")
    with pytest.raises(StorageError, match=r"room for 5 ranks, expected 4"):
        put(held, 20)


# --- the index -----------------------------------------------------------------------------------------------


def index_of(daemon: Daemon) -> dict[tuple[int, int], tuple[bytes, str]]:
    [space] = [space for name, space in daemon.spaces.items() if name.endswith("-index")]
    return space.shards


def test_an_index_that_is_damaged_gives_way_to_the_one_before(daemon: Daemon) -> None:
    held = memory(daemon)
    put(held, 10)
    put(held, 20)
    shards = index_of(daemon)
    shards[0, max(shards)[1]] = (b"{}", shards[max(shards)][1])
    assert steps_of(held) == [(1, 10, 0), (1, 10, 1)]


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"job": "x", "starts": []}', b"\xff", None])
def test_without_any_index_that_is_one_nothing_is_silently_missing(daemon: Daemon, content: bytes | None) -> None:
    held = memory(daemon)
    put(held, 10)
    shards = index_of(daemon)
    for key, (_, meta) in list(shards.items()):
        shards[key] = (b"", meta) if content is None else (content, f'{{"checksum": "{checksum(content)}"}}')
    with pytest.raises(DamagedCheckpoint, match="index"):
        held.tables()
    tables = put(held, 20)  # and the next save begins a new one
    assert held.tables() == tables


@pytest.mark.parametrize("world_size", [0, -1, 10**12])
def test_an_index_with_an_absurd_number_of_ranks_is_refused(daemon: Daemon, world_size: int) -> None:
    held = memory(daemon)
    put(held, 10)
    shards = index_of(daemon)
    for key, (body, _) in list(shards.items()):
        spoiled = body.replace(b'"world_size": 2', b'"world_size": %d' % world_size)
        shards[key] = (spoiled, f'{{"checksum": "{checksum(spoiled)}"}}')
    with pytest.raises(DamagedCheckpoint, match="ranks"):
        held.tables()


# --- the end, the package, the address -----------------------------------------------------------------------


def test_forget_deletes_what_this_job_put_and_nothing_else(daemon: Daemon) -> None:
    held = memory(daemon)
    put(held, 10, lineage=FIRST)
    put(held, 20, lineage=SECOND)
    blob, table = make(1, job="another")
    memory(daemon, "another").put(blob, table)
    held.forget()
    assert held.tables() == []
    assert memory(daemon, "another").tables() == [table]
    assert len(daemon.spaces) == 2
    held.forget()


def test_the_client_prints_and_logs_nothing(
    daemon: Daemon, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logs = Path("/var/log/sagemaker_checkpointing")
    before = logs.exists()
    held = memory(daemon)
    put(held, 10)
    with daemon.refusing(), pytest.raises(StorageError):
        held.tables()
    with daemon.failing("500"), pytest.raises(StorageError):
        held.put(*make(20))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("amzn")] == []
    assert logs.exists() == before


def test_only_the_client_is_imported() -> None:
    program = (
        "import sys; from hypershard.checkpoint.hyperpod import HyperPodMemory; before = set(sys.modules)\n"
        "HyperPodMemory('job', url='', timeout_seconds=1)\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(names & {'torch', 'boto3', 's3torchconnector', 'tenacity'}, 'xxhash' in names)\n"
        "print({name for name in before if name.startswith(('amzn', 'requests'))})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["set() True", "set()", ""]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amzn_sagemaker_checkpointing.storage.clients.inmemory", None)
    monkeypatch.delitem(
        sys.modules, "amzn_sagemaker_checkpointing.storage.clients.inmemory.inmemory_client", raising=False
    )
    with pytest.raises(StorageError, match=r"pip install 'hypershard\[hyperpod\]'"):
        HyperPodMemory(JOB, url="", timeout_seconds=1)


@pytest.mark.parametrize(
    "url", ["https", "ftp://host:1", "http://", "http://me:secret@host:1", "http://h:x", "http://h/?token=secret"]
)
def test_an_address_that_is_none_or_holds_a_password_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(StorageError, match=r"--hyperpod_memory_url: found .* expected http://host:port") as error:
        HyperPodMemory(JOB, url=url, timeout_seconds=1)
    assert "secret" not in str(error.value)


def test_the_default_address_is_the_clients_own() -> None:
    from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig

    assert hyperpod_client.checked_url("") == InMemoryClientConfig().base_url
    assert hyperpod_client.checked_url("http://host:1/") == "http://host:1"


def test_the_daemon_of_these_tests_resets_as_its_client_asks(daemon: Daemon) -> None:
    """Other jobs' bytes would go too, so the program never does; the daemon here knows it for completeness."""
    put(memory(daemon), 10)
    urllib.request.urlopen(urllib.request.Request(f"{daemon.url}/v1/cp/cluster/reset", method="POST"))
    assert (daemon.num_resets, daemon.spaces) == (1, {})
