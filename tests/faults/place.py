"""Where it happens: nodes with memory and a disk each, a disk that all share, a bucket behind a proxy that breaks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.nodes import Node, _hub, cluster
from tests.s3_server import FaultProxy, Rule, _Handler, _Listener, environment, moto

from hypershard.s3 import S3, Deadline, S3Uri

BUCKET = "chaos"
S3_HOST, S3_PORT = "10.77.0.254", 9000  # on the nodes' network
_MEMORY_BYTES = 96 * 2**20  # of a node: some three times what a job of four ranks claims there
_SHARED_BYTES = 48 * 2**20  # of the shared disk: some twelve checkpoints
_CLONE_NEWNET = 0x40000000  # linux/sched.h


class Site:
    """Use `open_site` to make one. `root` is a folder on a real disk; what is below it is the same on all nodes, but
    for `local_dir`, where each node sees its own disk."""

    def __init__(self, root: Path, nodes: list[Node], proxy: FaultProxy):
        self.root = root
        self.nodes = nodes
        self.proxy = proxy
        self.bucket = S3()  # straight to the server: what lies there, whatever the proxy does
        self.uri = S3Uri.parse(f"s3://{BUCKET}")
        self._filler = self.shared / ".filler"
        for node in nodes:
            self._mount_disk(node)

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    @property
    def local_dir(self) -> Path:
        """The mount point of each node's own disk."""
        return self.root / "local"

    def disk(self, number: int) -> Path:
        """A node's own disk as this machine sees it."""
        return self.root / "disks" / str(number)

    def rank_environment(self) -> dict[str, str]:
        return environment(f"http://{S3_HOST}:{S3_PORT}") | {"NO_PROXY": S3_HOST}

    def _mount_disk(self, node: Node) -> None:
        self.disk(node.number).mkdir(parents=True, exist_ok=True)
        node.run(["mount", "--bind", str(self.disk(node.number)), str(self.local_dir)])

    # --- what can be lost ------------------------------------------------------------------------------------

    def clear_memory(self, number: int) -> None:
        _clear(self.nodes[number].shm)

    def clear_disk(self, number: int) -> None:
        _clear(self.disk(number))

    def replace_node(self, number: int, *, with_disk: bool) -> None:
        """The lost node comes back as after a new start, or as another machine."""
        if not with_disk:
            self.clear_disk(number)
        self.nodes[number].come_back()
        self._mount_disk(self.nodes[number])

    def fill_shared_disk(self) -> None:
        _fill(self._filler)

    def free_shared_disk(self) -> None:
        self._filler.unlink(missing_ok=True)

    def fill_memory(self, number: int) -> None:
        _fill(self.nodes[number].shm / "filler")

    def free_memory(self, number: int) -> None:
        (self.nodes[number].shm / "filler").unlink(missing_ok=True)

    def break_bucket(self, *rules: Rule) -> None:
        self.proxy.set(*rules)

    def mend_bucket(self) -> None:
        self.proxy.release()
        time.sleep(0.2)  # for those that stall to see it
        self.proxy.set()

    # --- objects ---------------------------------------------------------------------------------------------

    def objects(self, prefix: S3Uri) -> dict[str, int]:
        return self.bucket.list_objects(prefix, deadline=Deadline.after(30))

    def read_object(self, uri: S3Uri) -> bytes:
        return self.bucket.read(uri, deadline=Deadline.after(30))

    def write_object(self, uri: S3Uri, content: bytes) -> None:
        self.bucket.put(uri, content, deadline=Deadline.after(30))

    def delete_object(self, uri: S3Uri) -> None:
        self.bucket.delete([uri], deadline=Deadline.after(30))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    piece = bytes(2**16)
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        while piece:
            if not file.write(piece):
                return


@contextlib.contextmanager
def open_site(root: Path, *, num_nodes: int = 2) -> Iterator[Site]:
    """Build everything below `root`, and take it down again (the files stay, but those of the shared disk)."""
    shared = root / "shared"
    for folder in (shared, root / "local"):
        folder.mkdir(parents=True)
    # Before the nodes start, because a node sees the mounts there were then.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SHARED_BYTES}", "tmpfs", str(shared)], check=True)
    before = dict(os.environ)
    try:
        with (
            moto() as server,
            FaultProxy(server.endpoint) as proxy,
            cluster(num_nodes, shm_bytes=_MEMORY_BYTES) as nodes,
        ):
            os.environ.update(environment(server.endpoint))
            server.create_bucket(BUCKET)
            with _listening_to_nodes(proxy):
                yield Site(root, nodes, proxy)
    finally:
        os.environ.clear()
        os.environ.update(before)
        subprocess.run(["umount", "--lazy", str(shared)], check=True)


@contextlib.contextmanager
def _listening_to_nodes(proxy: FaultProxy) -> Iterator[None]:
    """Let the proxy answer on the nodes' network as well: a socket stays in the network it was made in."""
    subprocess.run(["ip", "-n", _hub(), "address", "add", f"{S3_HOST}/24", "dev", "bridge"], check=True)
    made: list[_Listener] = []

    def make() -> None:
        with open(f"/run/netns/{_hub()}") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET):  # of this thread alone
                raise OSError(ctypes.get_errno(), "setns")
        made.append(_Listener((S3_HOST, S3_PORT), _Handler))

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    listener = made[0]
    listener.proxy = proxy
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
