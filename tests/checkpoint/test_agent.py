"""The agent on one machine: what it keeps, whom it hears, what bad networks and dying processes do to it."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.checkpoint.agents import (
    FIRST,
    ROOM_BYTES,
    SECOND,
    Proxy,
    Spoil,
    address_of,
    is_alive,
    make_blob,
    pid_of,
    sleeper,
    start_agent,
    wait_for,
)

from hypershard.checkpoint.agent_client import AgentAddress, AgentClient, AgentSource, ensure_agent
from hypershard.checkpoint.blob import HEAD_BYTES, BlobTable, blob_damage, read_table, table_bytes
from hypershard.checkpoint.copies import Offer, open_blob
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.memory_files import scan
from hypershard.checkpoint.sums import FileSource
from hypershard.errors import StorageError

PAYLOAD_BYTES = 2**20
SLOT_BYTES = PAYLOAD_BYTES + ROOM_BYTES
HERE = "127.0.0.1"


@pytest.fixture
def job() -> Iterator[subprocess.Popen[bytes]]:
    """The process whose life the agents share; with it they end."""
    process = sleeper()
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def clients() -> Iterator[Callable[..., AgentClient]]:
    """`clients(address)`: a client that is closed after the test."""
    made: list[AgentClient] = []

    def client(address: AgentAddress, timeout_seconds: float = 10) -> AgentClient:
        made.append(AgentClient(address, timeout_seconds=timeout_seconds))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def proxies() -> Iterator[Callable[..., Proxy]]:
    made: list[Proxy] = []

    def proxy(target: AgentAddress, **spoil: object) -> Proxy:
        made.append(Proxy(target, Spoil(**spoil)))  # type: ignore[arg-type]
        return made[-1]

    yield proxy
    for one in made:
        one.close()


class Pair:
    """Two agents: `a` is beside a trainer of rank 0, `b` keeps its copies."""

    def __init__(self, folder: Path, watch_pid: int, timeout_seconds: float = 10):
        self.a, self.b = folder / "a", folder / "b"
        self.address_a, self.address_b = (
            start_agent(root, watch_pid=watch_pid, timeout_seconds=timeout_seconds) for root in (self.a, self.b)
        )
        self.client_a = AgentClient(self.address_a, timeout_seconds=timeout_seconds)
        self.client_b = AgentClient(self.address_b, timeout_seconds=timeout_seconds)

    def emptied(self) -> "Pair":
        """The same agents with nothing saved; all they know is in files."""
        for root in (self.a, self.b):
            for kind in ("own", "copies"):
                shutil.rmtree(root / kind, ignore_errors=True)
        self.client_b.reserve({0: SLOT_BYTES})
        return self

    def save(self, step: int, *, lineage: Lineage = FIRST, through: AgentAddress | None = None) -> str | None:
        """Rank 0 saves and has a copy made; what went wrong with that."""
        path = make_blob(self.a, rank=0, step=step, lineage=lineage, payload_bytes=PAYLOAD_BYTES)
        return self.client_a.replicate(path, [through or self.address_b])[0]

    def copies(self) -> list[tuple[int, int]]:
        """Generation and step of all valid copies that b holds."""
        found = []
        for path, table in scan(self.b):
            assert blob_damage(FileSource(path), table) is None
            found.append((table.lineage.generation, table.step))
        return sorted(found)

    def close(self) -> None:
        self.client_a.close()
        self.client_b.close()


@contextlib.contextmanager
def lasting(folder: Path, timeout_seconds: float) -> Iterator[Pair]:
    watched = sleeper()
    try:
        made = Pair(folder, watched.pid, timeout_seconds)
        yield made
        made.close()
    finally:
        watched.kill()
        watched.wait()


@pytest.fixture(scope="module")
def patient_agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with lasting(tmp_path_factory.mktemp("patient"), 10) as made:
        yield made


@pytest.fixture(scope="module")
def hasty_agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with lasting(tmp_path_factory.mktemp("hasty"), 1) as made:
        yield made


@pytest.fixture
def pair(patient_agents: Pair) -> Pair:
    return patient_agents.emptied()


@pytest.fixture
def hasty(hasty_agents: Pair) -> Pair:
    """Agents that wait no longer than a second for a byte."""
    return hasty_agents.emptied()


@pytest.fixture
def mortal(tmp_path: Path, job: subprocess.Popen[bytes]) -> Iterator[Pair]:
    """Agents of this one test, to be killed; they watch `job`."""
    made = Pair(tmp_path, job.pid)
    yield made.emptied()
    made.close()


def test_a_copy_is_read_back_bit_by_bit(pair: Pair) -> None:
    assert pair.save(5) is None
    ((path, size_bytes),) = [one for one in pair.client_b.held("memory") if one[0].endswith("slot-0")]
    assert (path, size_bytes) == ("copies/rank-00000/slot-0", SLOT_BYTES)
    source = AgentSource(pair.address_b, "memory", path)
    table = read_table(source)
    assert table is not None and table.step == 5 and table.facts == {"step": 5}
    assert blob_damage(source, table) is None
    original = (pair.a / "own/rank-00000/slot-0").read_bytes()
    whole = bytes(source.read(0, 2 * SLOT_BYTES))
    end = original.rstrip(b"\0")
    assert whole[: len(end)] == end and len(whole) == SLOT_BYTES
    assert bytes(source.read(4090, 100)) == original[4090:4190]
    assert source.read(SLOT_BYTES, 10) == b""
    assert source.name == f"{HERE}:{path}" and source.parallel_reads == 2


def test_blobs_on_disk_are_served_too(tmp_path: Path, job: subprocess.Popen[bytes], clients) -> None:
    disk = tmp_path / "disk"
    path = make_blob(disk, rank=3, step=8)
    (disk / path).rename(disk / "own/rank-00003/step-00000008.blob")
    (disk / "own/rank-00003/.step-00000008.blob.7.tmp").touch()
    client = clients(start_agent(tmp_path / "memory", watch_pid=job.pid, disk=disk))
    assert client.held("memory") == []
    (held,) = client.held("disk")
    assert held[0] == "own/rank-00003/step-00000008.blob"
    assert client.read("disk", held[0], 0, held[1]) == (disk / held[0]).read_bytes()
    with pytest.raises(StorageError, match="answered: no 'tape' checkpoints"):
        client.held("tape")


def test_the_newest_copy_is_never_overwritten(pair: Pair) -> None:
    for step, held in ((5, [5]), (6, [5, 6]), (7, [6, 7]), (6, [6, 7])):
        assert pair.save(step) is None
        assert [step for _, step in pair.copies()] == held
    assert pair.save(7) is None  # is there already, and takes no other's place
    assert pair.copies() == [(1, 6), (1, 7)]
    # A new start from an older step: its steps are newer, whatever their numbers.
    assert pair.save(3, lineage=SECOND) is None
    assert pair.copies() == [(1, 7), (2, 3)]
    assert pair.save(99, lineage=FIRST) is None
    assert (2, 3) in pair.copies()
    assert pair.save(4, lineage=SECOND) is None
    assert pair.copies() == [(2, 3), (2, 4)]


def test_what_is_not_a_finished_blob_is_not_sent(pair: Pair) -> None:
    path = make_blob(pair.a, rank=0, step=5, payload_bytes=PAYLOAD_BYTES)
    with open(pair.a / path, "r+b") as file:
        file.write(bytes(4096))
    outcome = pair.client_a.replicate(path, [pair.address_b])[0]
    assert outcome is not None and "no finished blob" in outcome
    outcome = pair.client_a.replicate("own/rank-00009/slot-0", [pair.address_b])[0]
    assert outcome is not None and "No such file" in outcome
    assert pair.client_a.replicate(path, []) == []


def test_copies_of_a_rank_nobody_reserved_for_and_of_a_blob_too_big(pair: Pair) -> None:
    outcome = pair.client_a.replicate(make_blob(pair.a, rank=1, step=5), [pair.address_b])[0]
    assert outcome is not None and "no memory is reserved for copies of rank 1" in outcome
    big = make_blob(pair.a, rank=0, step=5, payload_bytes=SLOT_BYTES)
    outcome = pair.client_a.replicate(big, [pair.address_b])[0]
    assert outcome is not None and "are reserved for a copy of rank 0" in outcome
    assert pair.copies() == []


def test_a_blob_that_is_not_the_one_offered_is_refused(pair: Pair, clients) -> None:
    path = make_blob(pair.a, rank=0, step=5, payload_bytes=PAYLOAD_BYTES)
    table = read_table(FileSource(pair.a / path))
    assert table is not None
    size_bytes = len((pair.a / path).read_bytes().rstrip(b"\0"))
    client = clients(pair.address_b)
    with open_blob(pair.a, path) as file:
        offer = Offer(0, FIRST, 5, size_bytes, PAYLOAD_BYTES)
        for wrong in (
            replace(offer, step=6),
            replace(offer, lineage=SECOND),
            replace(offer, size_bytes=size_bytes - 1),
        ):
            with pytest.raises(StorageError, match=r"not the blob that was offered|damaged head"):
                client.put(file, wrong)
        with pytest.raises(StorageError, match="ValueError"):
            client.put(file, replace(offer, payload_bytes=size_bytes))
        assert pair.copies() == []
        client.put(file, offer)  # on the same connection
    assert pair.copies() == [(1, 5)]


def test_a_wrong_token_is_refused(pair: Pair, clients) -> None:
    stranger = clients(replace(pair.address_b, token=secrets.token_hex(32)))
    with pytest.raises(StorageError, match="greeting"):
        stranger.held("memory")
    outcome = pair.save(5, through=replace(pair.address_b, token="guessed"))
    assert outcome is not None and "greeting" in outcome
    assert pair.copies() == []
    assert "does not know the token" in (pair.b / "agent.log").read_text()


def test_a_false_agent_is_told_nothing(pair: Pair, clients) -> None:
    with socket.create_server((HERE, 0)) as listener:
        false = clients(AgentAddress(HERE, listener.getsockname()[1], pair.address_b.token))
        # It does as an agent does, but cannot prove that it knows the token.
        heard: list[bytes] = []

        def answer() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.sendall(b"HSAGENT1" + bytes(32))
                heard.append(connection.recv(1000))
                connection.sendall(heard[0][-32:])  # reflects what it was given
                heard.append(connection.recv(1000))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StorageError, match="something else answers"):
            false.ping()
        thread.join()
    assert len(heard[0]) == 72 and heard[1] == b""
    assert pair.address_b.token.encode() not in heard[0]


def test_something_else_at_the_address(clients) -> None:
    with socket.create_server((HERE, 0)) as listener:
        client = clients(AgentAddress(HERE, listener.getsockname()[1], "token"), timeout_seconds=0.5)
        with pytest.raises(StorageError, match=f"agent at {HERE}:.* did not move a byte"):
            client.ping()
    with pytest.raises(StorageError, match="cannot be reached: Connection refused"):
        client.ping()


def test_strangers_are_sent_away(hasty: Pair) -> None:
    where = (hasty.address_b.host, hasty.address_b.port)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(where)) for _ in range(40)]
        noisy = opened.enter_context(socket.create_connection(where))
        with contextlib.suppress(ConnectionError):
            noisy.sendall(bytes(10_000))
        for one in (*silent, noisy):
            one.settimeout(60)
            with contextlib.suppress(ConnectionError):
                while one.recv(1000):  # the agent's greeting, then the end
                    pass
    assert hasty.save(5) is None


def test_a_torn_transfer_leaves_the_older_copies(pair: Pair, proxies) -> None:
    assert pair.save(5) is None
    assert pair.save(6) is None
    for cut_after in (60, 300, 5000, PAYLOAD_BYTES // 2, PAYLOAD_BYTES + 4096):
        outcome = pair.save(7, through=proxies(pair.address_b, cut_after=cut_after).address)
        assert outcome is not None and "connection" in outcome
        assert (1, 6) in pair.copies() and (1, 7) not in pair.copies()
    assert pair.save(7) is None
    assert pair.copies() == [(1, 6), (1, 7)]


def saved_table(pair: Pair) -> BlobTable:
    table = read_table(FileSource(pair.a / make_blob(pair.a, rank=0, step=7, payload_bytes=PAYLOAD_BYTES)))
    assert table is not None
    return table


def test_a_bit_flipped_on_the_way_is_found(pair: Pair, proxies) -> None:
    """In the greeting, its proof, the request, the head, the payload, the table."""
    size_bytes = len(table_bytes(saved_table(pair))) + HEAD_BYTES + PAYLOAD_BYTES
    request = json.dumps({"request": "put", **Offer(0, FIRST, 7, size_bytes, PAYLOAD_BYTES).to_json()})
    head_at = 72 + 4 + len(request.replace(" ", "")) + 32
    table_at = head_at + HEAD_BYTES + PAYLOAD_BYTES
    places = (3, 60, 100, head_at + 2, head_at + 12, head_at + 30, PAYLOAD_BYTES // 3, table_at - 1, table_at + 9)
    for step, flip_at in enumerate(places, 7):
        assert pair.save(step - 1) is None
        outcome = pair.save(step, through=proxies(pair.address_b, flip_at=flip_at).address)
        assert outcome is not None, flip_at
        assert (1, step - 1) in pair.copies() and (1, step) not in pair.copies()
    assert pair.save(step) is None
    assert pair.copies() == [(1, step - 1), (1, step)]


def test_a_stalled_network_is_an_error(hasty: Pair, proxies) -> None:
    assert hasty.save(5) is None
    for stall_after in (0, PAYLOAD_BYTES // 2):
        outcome = hasty.save(6, through=proxies(hasty.address_b, stall_after=stall_after).address)
        # The agent that waits for bytes gives up, or the one that waits for an answer, whichever is first.
        assert outcome is not None and re.search("did not move a byte|ended the connection|broke the", outcome)
    assert hasty.copies() == [(1, 5)]
    # The slot is not held by the transfer that stalled.
    assert hasty.save(6) is None
    assert hasty.copies() == [(1, 5), (1, 6)]


def test_a_slow_network_is_none(hasty: Pair, proxies) -> None:
    """Four pauses of 0.4 seconds are longer than the time-out, none of them by itself."""
    assert hasty.save(5, through=proxies(hasty.address_b, pause_seconds=0.4).address) is None
    assert hasty.copies() == [(1, 5)]


def test_a_stopped_agent_is_an_error(hasty: Pair) -> None:
    pid = pid_of(hasty.address_b)
    os.kill(pid, signal.SIGSTOP)
    try:
        outcome = hasty.save(5)
        assert outcome is not None and "did not move a byte" in outcome
        with pytest.raises(StorageError, match="did not move a byte"):
            hasty.client_b.ping()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert hasty.save(5) is None


def test_one_target_of_two_is_gone(pair: Pair) -> None:
    path = make_blob(pair.a, rank=0, step=5, payload_bytes=PAYLOAD_BYTES)
    with socket.create_server((HERE, 0)) as listener:
        nobody = AgentAddress(HERE, listener.getsockname()[1], "x")
    first, second = pair.client_a.replicate(path, [nobody, pair.address_b])
    assert first is not None and "Connection refused" in first
    assert second is None and pair.copies() == [(1, 5)]


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_too_little_memory_is_refused_with_figures(small_memory: Path, job, clients) -> None:
    client = clients(start_agent(small_memory, watch_pid=job.pid))
    with pytest.raises(StorageError, match=r"need 12\.00 MiB more .* found 4\.9\d MiB free.*--memory_tier_dir"):
        client.reserve({4: 3 * 2**20, 5: 3 * 2**20})
    assert client.held("memory") == []
    client.reserve({4: 2**20, 5: 2**20})
    assert [size for _, size in client.held("memory")] == [2**20] * 4
    client.reserve({4: 2**20, 5: 2**20})  # what is there is not claimed again
    client.reserve({4: 2**20 + 2**18})  # and empty slots of another size make room
    assert [size for _, size in client.held("memory")] == [2**20 + 2**18] * 2 + [2**20] * 2


def test_copies_of_an_earlier_start_stay_until_there_are_new_ones(pair: Pair) -> None:
    assert pair.save(5) is None
    assert pair.save(6) is None
    pair.client_b.reserve({0: SLOT_BYTES})
    assert pair.copies() == [(1, 5), (1, 6)]
    pair.client_b.reserve({0: SLOT_BYTES + 4096})
    assert pair.copies() == [(1, 5), (1, 6)]
    assert [size for _, size in pair.client_b.held("memory")] == [SLOT_BYTES + 4096] * 2 + [SLOT_BYTES] * 2
    assert pair.save(1, lineage=SECOND) is None
    assert pair.copies() == [(1, 5), (1, 6), (2, 1)]
    assert pair.save(2, lineage=SECOND) is None
    assert pair.copies() == [(2, 1), (2, 2)]
    assert [size for _, size in pair.client_b.held("memory")] == [SLOT_BYTES + 4096] * 2


def test_nothing_but_blobs_is_read(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = pair.b / "copies/rank-00000"
    (folder / "slot-7").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "slot-8")
    (pair.b / "own").symlink_to(tmp_path)
    (tmp_path / "rank-00000").mkdir()
    (tmp_path / "rank-00000/slot-0").write_text("secret")
    names = ["agent.json", "../secret", "copies/../agent.json", "copies/rank-00000/../../agent.json", str(tmp_path)]
    names += ["copies/rank-00000/slot-7", "copies/rank-00000/slot-8", "copies/rank-00000", "own/rank-00000/slot-0", ""]
    names += ["copies/rank-00000/slot-0\0", "copies/rank-00000/slot-0\n", "/copies/rank-00000/slot-0"]
    for name in names:
        with pytest.raises(StorageError, match=r"answered: "):
            pair.client_b.read("memory", name, 0, 100)
    with pytest.raises(StorageError, match="bytes from byte"):
        pair.client_b.read("memory", "copies/rank-00000/slot-0", -1, 100)
    held = [path for path, _ in pair.client_b.held("memory")]
    assert held == ["copies/rank-00000/slot-0", "copies/rank-00000/slot-1"]
    assert pair.client_b.read("memory", held[0], 0, 10) == bytes(10)


def test_it_ends_with_the_process_it_watches(tmp_path: Path, job: subprocess.Popen[bytes]) -> None:
    first = ensure_agent(tmp_path, disk_root=None, host=HERE, watch_pid=job.pid)
    pid = pid_of(first)
    second = sleeper()
    try:
        assert ensure_agent(tmp_path, disk_root=None, host=HERE, watch_pid=second.pid) == first
        job.kill()
        job.wait()
        assert pid_of(first) == pid
        second.kill()
        wait_for(lambda: not is_alive(pid))
    finally:
        second.kill()
        second.wait()
    assert not (tmp_path / "agent.json").exists()
    assert "is gone" in (tmp_path / "agent.log").read_text()


def test_writes_under_way_are_finished_at_the_end(mortal: Pair, job: subprocess.Popen[bytes], proxies) -> None:
    proxy = proxies(mortal.address_b, pause_seconds=0.3)
    pid_a, pid_b = pid_of(mortal.address_a), pid_of(mortal.address_b)
    path = make_blob(mortal.a, rank=0, step=5, payload_bytes=PAYLOAD_BYTES)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(mortal.client_a.replicate, path, [proxy.address])
        wait_for(lambda: proxy.num_forwarded > PAYLOAD_BYTES // 4)
        job.kill()
        with contextlib.suppress(StorageError):  # the agent may be gone before its answer is read
            assert outcome.result() == [None]
    wait_for(lambda: not is_alive(pid_a) and not is_alive(pid_b))
    assert mortal.copies() == [(1, 5)]


def test_it_survives_what_ends_trainers(tmp_path: Path, job: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, SIGTERM and SIGKILL for the trainers' process group, and signals a scheduler sends to every process."""
    script = (
        "import signal, sys, time; from pathlib import Path;"
        "signal.signal(signal.SIGINT, signal.SIG_DFL);"  # a shell's background jobs are started with it ignored
        "from hypershard.checkpoint.agent_client import ensure_agent;"
        f"ensure_agent(Path(sys.argv[1]), disk_root=None, host={HERE!r}, watch_pid=int(sys.argv[2]));"
        "print('started', flush=True); time.sleep(600)"
    )
    pids = set()
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        words = [sys.executable, "-c", script, str(tmp_path), str(job.pid)]
        trainer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0)
        with trainer:
            assert trainer.stdout is not None and trainer.stdout.readline() == b"started\n"
            os.killpg(trainer.pid, one)
            trainer.wait(timeout=60)
        pids.add(pid_of(address_of(tmp_path)))
    (pid,) = pids
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, one)
    assert pid_of(address_of(tmp_path)) == pid
    assert os.getsid(pid) == pid and Path(f"/proc/{pid}/fd/1").readlink() == Path("/dev/null")


def test_a_killed_agent_is_replaced_and_nothing_is_lost(mortal: Pair, job: subprocess.Popen[bytes]) -> None:
    assert mortal.save(5) is None
    pid = pid_of(mortal.address_b)
    os.kill(pid, signal.SIGKILL)
    outcome = mortal.save(6)
    assert outcome is not None
    new = ensure_agent(mortal.b, disk_root=None, host=HERE, watch_pid=job.pid)
    assert new == mortal.address_b and pid_of(new) != pid, "other nodes reach it as they reached the one before"
    assert mortal.copies() == [(1, 5)]
    assert mortal.save(6, through=new) is None
    assert mortal.copies() == [(1, 5), (1, 6)]
    source = AgentSource(new, "memory", "copies/rank-00000/slot-0")
    table = read_table(source)
    assert table is not None and table.step == 5 and blob_damage(source, table) is None


def test_an_agent_that_hangs_or_does_not_fit_is_replaced(tmp_path: Path, job, monkeypatch) -> None:
    monkeypatch.setattr("hypershard.checkpoint.agent_client._PING_SECONDS", 1.0)
    first = ensure_agent(tmp_path, disk_root=None, host=HERE, watch_pid=job.pid)
    pid = pid_of(first)
    elsewhere = ensure_agent(tmp_path, disk_root=None, host="127.0.0.2", watch_pid=job.pid)
    assert elsewhere.host == "127.0.0.2"
    wait_for(lambda: not is_alive(pid))
    with_disk = ensure_agent(tmp_path, disk_root=tmp_path / "disk", host="127.0.0.2", watch_pid=job.pid)
    assert with_disk != elsewhere
    pid = pid_of(with_disk)
    os.kill(pid, signal.SIGSTOP)
    new = ensure_agent(tmp_path, disk_root=tmp_path / "disk", host="127.0.0.2", watch_pid=job.pid)
    assert not is_alive(pid) and is_alive(pid_of(new))


def test_a_stale_address_kills_nobody(tmp_path: Path, job: subprocess.Popen[bytes]) -> None:
    with socket.create_server((HERE, 0)) as listener:
        port = listener.getsockname()[1]
    bystander = sleeper()
    stale = {"pid": bystander.pid, "host": HERE, "port": port, "token": "old", "version": "0"}
    (tmp_path / "agent.json").write_text(json.dumps(stale))
    try:
        assert is_alive(pid_of(ensure_agent(tmp_path, disk_root=None, host=HERE, watch_pid=job.pid)))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_why_it_does_not_start(tmp_path: Path, job: subprocess.Popen[bytes]) -> None:
    gone = sleeper()
    gone.kill()
    gone.wait()
    with pytest.raises(StorageError, match=r"did not start: .*No such process"):
        ensure_agent(tmp_path, disk_root=None, host=HERE, watch_pid=gone.pid)
    with pytest.raises(StorageError, match=r"did not start: .*Cannot assign requested address"):
        ensure_agent(tmp_path, disk_root=None, host="192.0.2.1", watch_pid=job.pid)
    assert not (tmp_path / "agent.json").exists()


def test_the_token_is_nowhere_but_in_its_file(pair: Pair, clients, proxies) -> None:
    proxy = proxies(pair.address_b)
    assert pair.save(5, through=proxy.address) is None
    assert clients(proxy.address).held("memory")
    for address, root in ((pair.address_a, pair.a), (pair.address_b, pair.b)):
        token = address.token.encode()
        process = Path(f"/proc/{pid_of(address)}")
        places = [(process / name).read_bytes() for name in ("cmdline", "environ")]
        places += [(root / "agent.log").read_bytes(), repr(address).encode(), bytes(proxy.seen)]
        places += [path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "agent.json"]
        assert not any(token in place for place in places)
        assert (root / "agent.json").stat().st_mode & 0o777 == 0o600


def test_it_listens_on_its_one_address_only(pair: Pair) -> None:
    socket.create_connection(("127.0.0.1", pair.address_b.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", pair.address_b.port), timeout=5)


def test_it_neither_imports_torch_nor_holds_much(pair: Pair) -> None:
    assert pair.save(5) is None
    pid = pid_of(pair.address_b)
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous_kib = int(status.split("RssAnon:")[1].split()[0])
    assert anonymous_kib < 64 * 1024


def test_a_connection_that_was_closed_meanwhile_is_made_anew(pair: Pair, proxies, clients) -> None:
    proxy = proxies(pair.address_b)
    client = clients(proxy.address)
    assert client.ping() == client.ping()
    assert proxy.num_connections == 1
    proxy.drop()
    assert client.ping()["host"] == HERE
    assert proxy.num_connections == 2
