"""Real ranks for tests: processes with a gloo process group, started once and given functions to run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

ANSWER_SECONDS = 240  # a rank that says nothing for so long hangs


class RankPool:
    """`num_ranks` processes that share one process group, on the host unless `gpu`.

    `run` calls a module-level function on each.
    """

    def __init__(self, num_ranks: int, *, gpu: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, port, gpu, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(world, *arguments)` on every rank; results in rank order, or AssertionError with what failed."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(ANSWER_SECONDS), f"rank {rank} hangs"
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, num_ranks: int, port: int, gpu: bool, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on a machine with GPUs as on one without
    import torch

    from hypershard.distributed.env import Ranks
    from hypershard.distributed.process_group import start

    torch.set_num_threads(1)
    # As if all ranks were on one node, started by a launcher without an agent's store.
    world = start(Ranks(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "srun"))
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(world, *arguments)))
        except BaseException:  # a test's failure of any kind belongs in its report
            pipe.send((False, traceback.format_exc()))
