"""What a training allocates and frees, in order, on which stream and for what: recorded while it runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .allocator import NO_LAYER, Event

# An operation's workspace in bytes, from its arguments: what a GPU's kernel allocates inside, where nobody sees it.
Workspaces = Mapping[Any, Callable[..., int]]
COMPUTE = "compute"


class Tape(TorchDispatchMode):
    """Records storages as they come and go. Enter it after FakeTensorMode, so that it sees what that answers.

    `window`, `layer` and `category` are written to every event, and stay what they were last set to. Memory made inside
    `on_host` is a host's and leaves no event.
    """

    def __init__(self, workspaces: Workspaces) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.window, self.layer, self.category = "start", NO_LAYER, "other"
        self._workspaces = workspaces
        self._num_blocks = 0
        self._is_host = False
        # By address of the storage: its number, 0 for a host's; the bytes it has; what tells of its end.
        self._alive: dict[int, tuple[int, int, str, str, Any]] = {}
        self._streams: dict[int, str] = {id(torch.cpu.current_stream()): COMPUTE}
        self._named: list[Any] = []  # streams known by id, which must not be given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it asks again, with the tensors that this rank holds
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._see(value)
        workspace = self._workspaces.get(func)
        if workspace is not None:
            self._pass(workspace(*args, **kwargs))
        return result

    @contextlib.contextmanager
    def within(self, category: str) -> Iterator[None]:
        """What comes to be inside is `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    @contextlib.contextmanager
    def on_host(self, is_host: bool = True) -> Iterator[None]:
        """What comes to be inside is the host's, where `is_host`."""
        before, self._is_host = self._is_host, is_host or self._is_host
        try:
            yield
        finally:
            self._is_host = before

    def block_of(self, tensor: torch.Tensor) -> int:
        """The number of the block that `tensor` lies in; 0 for a host's, and for what was never seen."""
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return 0 if known is None else known[0]

    def holds_on_host(self, tensor: torch.Tensor) -> bool:
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return known is not None and known[0] == 0

    def name_stream(self, stream: Any, name: str) -> None:
        self._streams[id(stream)] = name
        self._named.append(stream)

    @contextlib.contextmanager
    def following_resizes(self) -> Iterator[None]:
        """See storages grow and shrink, which is how FSDP2 gives gathered weights back: no operation does it."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    # --- storages

    def _see(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        watch = weakref.ref(storage, lambda _: self._gone(address))
        stream = self._stream()
        self._alive[address] = (self._begin(storage.nbytes(), stream), storage.nbytes(), stream, self.category, watch)

    def _gone(self, address: int) -> None:
        block, num_bytes, stream, category, _ = self._alive.pop(address)
        self._end(block, num_bytes, stream, category)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            return
        block, num_bytes, stream, category, watch = self._alive[address]
        if block == 0 or storage.nbytes() == num_bytes:
            return
        self._end(block, num_bytes, stream, category)
        stream = self._stream()
        block = self._begin(storage.nbytes(), stream, category=category)
        self._alive[address] = (block, storage.nbytes(), stream, category, watch)

    def _pass(self, num_bytes: int) -> None:
        """A workspace: it comes and goes."""
        stream = self._stream()
        self._end(self._begin(num_bytes, stream), num_bytes, stream, self.category)

    def _begin(self, num_bytes: int, stream: str, *, category: str | None = None) -> int:
        if self._is_host:
            return 0
        self._num_blocks += 1
        if num_bytes:
            kind = category or self.category
            self.events.append(Event(True, self._num_blocks, num_bytes, stream, kind, self.window, self.layer))
        return self._num_blocks

    def _end(self, block: int, num_bytes: int, stream: str, category: str) -> None:
        if block and num_bytes:
            self.events.append(Event(False, block, num_bytes, stream, category, self.window, self.layer))

    def _stream(self) -> str:
        current = torch.cpu.current_stream()
        if id(current) not in self._streams:
            self.name_stream(current, f"stream {len(self._streams)}")
        return self._streams[id(current)]
