"""One process that takes itself for rank 0 of many: nothing is sent, and no tensor has content.

The device is the CPU: fake tensors of a GPU end the process where torch finds none. FSDP2 runs on it with streams that
do nothing but tell which one is meant, and that is all that is asked of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext, FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from ..distributed.env import Ranks
from ..distributed.process_group import World
from ..parallel import offload
from ..train import setup
from .allocator import NO_LAYER
from .tape import Tape

DEVICE = torch.device("cpu")
END_OF_BACKWARD = "end of backward"


def start(*, world_size: int, local_world_size: int) -> World:
    """The process group of `world_size` ranks of which this process is the first, once per process."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    assert dist.get_world_size() == world_size, "one process traces one size of world"
    assert dist.group.WORLD is not None
    return World(Ranks(world_size=world_size, local_world_size=local_world_size), DEVICE, dist.group.WORLD)


@contextlib.contextmanager
def recording(tape: Tape, *, keeps_weights_on_host: bool) -> Iterator[None]:
    """Inside, tensors are fake and `tape` runs, told by FSDP2's own steps what memory is for."""
    with contextlib.ExitStack() as stack:
        for patch in _patches(tape, keeps_weights_on_host=keeps_weights_on_host):
            stack.enter_context(patch)
        stack.enter_context(tape.following_resizes())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tape)
        yield


def _patches(tape: Tape, *, keeps_weights_on_host: bool) -> list[Any]:
    def told(category: str, *, on_host: bool = False) -> Callable[..., Any]:
        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with tape.within(category), tape.on_host(on_host):
                    return method(*args, **kwargs)

            return call

        return wrap

    def name_streams(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(context: FSDPCommContext, device: torch.device) -> None:
            method(context, device)
            tape.name_stream(context.all_gather_copy_in_stream, "gather")
            tape.name_stream(context.reduce_scatter_stream, "reduce")
            tape.name_stream(context.all_reduce_stream, "all-reduce")

        return call

    def for_real(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return method(*args, **kwargs)

        return call

    def at_the_end(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tape.window, tape.category, tape.layer = END_OF_BACKWARD, "backward", NO_LAYER
            return method(*args, **kwargs)

        return call

    wrapped = (
        (FSDPParamGroup, "unshard", told("gathered weights")),
        (FSDPParamGroup, "wait_for_unshard", told("gathered weights")),
        (FSDPParamGroup, "post_backward", told("gradients")),
        # Beside a frozen embedding nothing else tells that backward has left the first block.
        (FSDPState, "_root_post_backward_final_callback", at_the_end),
        # It pads rows that do not divide evenly.
        (FSDPParam, "reset_sharded_param", told("weights", on_host=keeps_weights_on_host)),
        (FSDPCommContext, "lazy_init", name_streams),
        (setup, "build_mesh", for_real),  # a mesh reads its own numbers
        # It works out the shapes of whole tensors, which nobody allocates.
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", for_real),
        (offload, "_to_host", told("activations", on_host=True)),
        (torch.Tensor, "to", _copying(tape)),
    )
    return [mock.patch.object(owner, name, wrap(getattr(owner, name))) for owner, name, wrap in wrapped]


def _copying(tape: Tape) -> Callable[..., Any]:
    """`Tensor.to` between host and GPU. Here both are the CPU, and it would give back the tensor itself."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], torch.device) and not isinstance(tensor, DTensor):
                if tape.holds_on_host(tensor):
                    return tensor.clone()
                if tape.category == "gradients":  # reduced, and on their way to where the optimizer is
                    with tape.on_host():
                        return tensor.clone()
            return method(tensor, *args, **kwargs)

        return to

    return wrap
