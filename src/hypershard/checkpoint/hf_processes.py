"""Several processes that write the files of an export, each whole files, started and ended by one."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

import torch

from ..errors import HypershardError
from .hf_export import Export, WeightFile, WriteFiles, write_file, write_here
from .stores import open_store


def writer(num_processes: int, advance: Callable[[int], None]) -> WriteFiles:
    """What writes files in so many processes; with one, in this one. `advance` is told of the bytes of each file.

    HypershardError: a process was killed. What a process raises is raised here; the others are ended then.
    """

    def write(export: Export, files: Sequence[WeightFile], done: Callable[[WeightFile], None]) -> None:
        def told(file: WeightFile) -> None:
            done(file)
            advance(file.size_bytes)

        if min(num_processes, len(files)) < 2:
            write_here(export, files, told)
        else:
            _write(export, files, told, min(num_processes, len(files)))

    return write


def _write(export: Export, files: Sequence[WeightFile], done: Callable[[WeightFile], None], num_processes: int) -> None:
    # Not forked: torch's threads and a bucket's client do not survive it.
    context = multiprocessing.get_context("spawn")
    # A process that is given much is waited for until it has started, and they would start one after the other.
    light = dataclasses.replace(export, small_files={})
    pipes: list[Connection] = []
    processes = []
    left = list(files)
    try:
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(light, num_processes, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
            ours.send(left.pop(0))
        working = set(pipes)
        while working:
            for pipe in wait(list(working)):
                assert isinstance(pipe, Connection)
                done(_answer(pipe))
                if left:
                    pipe.send(left.pop(0))
                else:
                    working.remove(pipe)
    except (EOFError, ConnectionError) as error:
        raise HypershardError(
            f"one of the {num_processes} processes that export was killed, mostly for lack of memory; fewer of them "
            f"(--num_workers) need less. The same command goes on where it stopped"
        ) from error
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _answer(pipe: Connection) -> WeightFile:
    """The file that a process has finished. Raises what the process met, or that its end of the pipe is gone."""
    answer = pipe.recv()
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, WeightFile)
    return answer


def _serve(export: Export, num_processes: int, pipe: Connection) -> None:
    """Write the files that come through the pipe, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that asked decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
    store = open_store(export.output)
    while True:
        file = pipe.recv()
        try:
            write_file(export, file, store)
            pipe.send(file)
        except Exception as error:  # whatever it is, it is raised where somebody waits
            pipe.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
