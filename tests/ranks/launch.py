"""Runs a function in several processes that form one process group, and brings back what each returns.

Processes are forked from a server that has imported torch, Lightning, transformers and DeepSpeed already, so that a
test pays for its work and not for imports. They meet through a file: no port can be taken by somebody else.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import queue
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 150  # seconds for a whole test: far above what they take, so that a hanging one ends

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.preload"])


class RankFailed(Exception):
    """A process raised, died, or did not come back in time; its traceback is the message."""


def run(
    function: Any,
    *args: Any,
    ranks: int = 2,
    survivors: bool = False,
    timeout: float = TIMEOUT,
    backend: str = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """``function(*args, **kwargs)`` in ``ranks`` processes; its results in their order, or only the ``survivors``'.

    ``function`` is one of a module of the tests, and its arguments and results can be pickled. No process outlives
    this call.
    """
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(
                target=_work,
                args=(
                    functools.partial(function, *args, **kwargs),
                    rank,
                    ranks,
                    backend,
                    f"{folder}/store",
                    results,
                    not survivors,
                ),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, survivors, time.monotonic() + timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it may end in between
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(processes: list[Any], results: Any, survivors: bool, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        if survivors and all(not process.is_alive() for process in processes) and results.empty():
            break
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank, p in enumerate(processes) if not p.is_alive() and rank not in found]
            if dead and results.empty() and not survivors:
                raise RankFailed(f"rank {dead[0]} ended with {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                raise RankFailed(f"ranks {set(range(len(processes))) - set(found)} did not come back") from None
            continue
        if error:
            raise RankFailed(f"rank {rank}:\n{error}")
        found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [found[rank] for rank in sorted(found)]


def _work(work: Any, rank: int, ranks: int, backend: str, store: str, results: Any, wait: bool) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        if ranks > 1:
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
        value = work()
        if ranks > 1 and wait:
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
        results.put((rank, _packed(value), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # engines leave threads behind that would wait for each other


def _packed(value: Any) -> bytes:
    # as bytes: a tensor in a queue is shared memory of a process that is about to end
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def alone(function: Any, *args: Any, **kwargs: Any) -> Any:
    """``function`` in one process without a process group."""
    return run(function, *args, ranks=1, **kwargs)[0]


def each(function: Any, cases: Iterable[tuple[Any, ...]], **kwargs: Any) -> dict[tuple[Any, ...], list[Any]]:
    """The results of ``function(*case)`` by case, from one start of processes: it takes longer than a small run."""
    cases = list(cases)
    found = run(_each, function, cases, **kwargs)
    return {case: [of_rank[index] for of_rank in found] for index, case in enumerate(cases)}


def _each(function: Any, cases: list[tuple[Any, ...]]) -> list[Any]:
    return [function(*case) for case in cases]
