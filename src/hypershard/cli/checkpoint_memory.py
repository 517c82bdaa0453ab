"""`hypershard checkpoint prune --memory`: what runs left in this node's memory, and giving it back."""

from __future__ import annotations

from ..checkpoint.node_blobs import RECENT_SECONDS, RunMemory, forget_run, runs_in
from ..config.schema import SETTINGS
from ..errors import CheckpointError
from ..storage import local_path
from ..units import format_bytes, format_seconds


def prune_memory(directory: str | None, *, runs: list[str] | None, delete: bool) -> int:
    """Show every run's memory below `directory` (None: where training puts it) and delete what nobody needs.

    `runs` limits it to these; a run that is named may have been used a moment ago. Raises CheckpointError.
    """
    where = local_path(directory or str(SETTINGS["memory_tier_dir"][1].default), flag="--memory_tier_dir")
    held = [memory for memory in runs_in(where) if runs is None or memory.run in runs]
    if unknown := sorted(set(runs or ()) - {memory.run for memory in held}):
        raise CheckpointError(f"--run={unknown[0]}: holds nothing of this user in {where}")
    freed_bytes = 0
    for memory in held:
        size = format_bytes(memory.size_bytes)
        step = "no whole blob" if memory.newest_step is None else f"up to step {memory.newest_step}"
        outcome = _outcome(memory, is_named=runs is not None, delete=delete)
        freed_bytes += memory.size_bytes if outcome in _FREED else 0
        print(f"{memory.run:<16}  {size:>10}  {step:<20}  {outcome}")
    free = f"{'freed' if delete else 'could be freed'}: {format_bytes(freed_bytes)}"
    print(f"{len(held)} runs in {where}; {free}" + ("" if delete or not freed_bytes else " with --yes"))
    return 0


_IDLE, _DELETED = "idle", "deleted"
_FREED = (_IDLE, _DELETED)


def _outcome(memory: RunMemory, *, is_named: bool, delete: bool) -> str:
    if memory.needed_by is not None:
        return f"in use: {memory.needed_by}"
    if memory.seconds_since_use < RECENT_SECONDS and not is_named:
        ago = format_seconds(memory.seconds_since_use)
        return f"used {ago} ago, its job may come back for it; --run {memory.run} if it will not"
    if not delete:
        return _IDLE
    return _DELETED if forget_run(memory) else "in use since just now"
