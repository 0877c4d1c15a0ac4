"""Starts a job, sends a signal at a random moment, starts it again until it ends, and compares what it leaves."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

TIMEOUT = 150  # seconds for one start: far above what it takes, so that a hanging one ends
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MEMORY = Path("/dev/shm")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.preload"])  # one server for all tests of a process


class Start(NamedTuple):
    """What a user runs in the folder of a job, to begin it or to go on with it."""

    work: Callable[[], Any]
    checkpoint: Path | None = None
    """That it goes on from; if the start is refused as incomplete, the message has to name it."""


@dataclass(frozen=True)
class Job:
    """Something that takes a while and has a result.

    Args:
        starts: of a folder, what may be run there next, the best first; none if the job has ended.
        result: of a folder in which the job has ended, the digests of what it has left, by name.
        continues: what a start says that goes on with earlier work; a start that begins anew has the same result.
        is_command: of ``sparse-train``, which has to end an interruption with one line.
    """

    name: str
    starts: Callable[[Path], list[Start]]
    result: Callable[[Path], dict[str, str]]
    continues: str | None = None
    is_command: bool = True


class Ended(NamedTuple):
    status: int
    """As a shell shows it: 128 + the number of a signal."""
    said: str
    seconds: float
    was_hit: bool
    """Whether it still ran when the signal was due."""


class Outcome(NamedTuple):
    kind: str
    """"equal" or "refused" (an incomplete checkpoint, by name, and then equal from the one before), or "lost"."""
    why: str = ""
    continued: bool = False
    """Whether earlier work was used: none is kept of a job that was interrupted at its beginning."""


class Whole(NamedTuple):
    """The job without interruption."""

    digests: dict[str, str]
    seconds: float


def run(work: Callable[[], Any], folder: Path, sent: signal.Signals | None = None, after: float = 0.0) -> Ended:
    """Run ``work`` in a process of its own, in ``folder``, and send it a signal after so many seconds."""
    reader, writer = _context.Pipe(duplex=False)
    # Lightning writes a checkpoint as a temporary file first and moves it. From another file system that is a copy,
    # which can be interrupted: the harder case, and the usual one on clusters.
    beside = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside) as temporary, tempfile.NamedTemporaryFile() as said:
        process = _context.Process(target=_work, args=(work, folder, said.name, temporary, writer), daemon=True)
        process.start()
        writer.close()
        with contextlib.suppress(EOFError):  # it ended at once
            reader.recv()
        began = time.monotonic()
        process.join(TIMEOUT if sent is None else after)
        was_hit = process.is_alive()
        if sent is not None and was_hit:
            os.kill(process.pid, sent)
            process.join(TIMEOUT)
        seconds = time.monotonic() - began
        if process.is_alive():
            process.kill()
            process.join()
            return Ended(-1, f"it did not end in {TIMEOUT} seconds", seconds, was_hit)
        status = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode
        return Ended(status, Path(said.name).read_text(errors="replace"), seconds, was_hit)


def _work(work: Callable[[], Any], folder: Path, said: str, temporary: str, started: Any) -> None:
    os.chdir(folder)
    sys.argv = ["sparse-train"]
    tempfile.tempdir = temporary
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    started.send(None)
    status: Any = 0
    try:  # as the interpreter would end
        work()
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def whole(job: Job, folder: Path) -> Whole:
    """Run a job without interruption, in a new folder."""
    folder.mkdir(parents=True)
    (start,) = job.starts(folder)
    ended = run(start.work, folder)
    if ended.status != 0:
        raise RuntimeError(f"{job.name} fails without interruption:\n{ended.said}")
    return Whole(job.result(folder), ended.seconds)


def trial(job: Job, reference: Whole, folder: Path, sent: signal.Signals, chance: random.Random) -> Outcome:
    """Interrupt a job at a random moment, and bring it to its end."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (start,) = job.starts(folder)
        after = chance.uniform(0.0, 2 * reference.seconds)  # it may be slower than when it was measured
        ended = run(start.work, folder, sent, after)
        if ended.was_hit:
            break
    if job.is_command and sent != signal.SIGKILL and (fault := _fault_of_ending(ended, sent)):
        return Outcome("lost", f"{fault}, {sent.name} after {after:.3f} s:\n{ended.said}")
    outcome = go_on(job, reference, folder)
    return outcome._replace(why=f"{sent.name} after {after:.3f} s: {outcome.why}") if outcome.why else outcome


def _fault_of_ending(ended: Ended, sent: signal.Signals) -> str:
    if "Traceback" in ended.said:
        return "a traceback"
    if ended.status not in (0, 1, 128 + sent):  # 0: it was at its end; its result is compared all the same
        return f"exit status {ended.status}"
    return ""


def go_on(job: Job, reference: Whole, folder: Path) -> Outcome:
    """Bring a job to its end that was interrupted."""
    kind, continued = "equal", False
    starts = job.starts(folder)
    for start in starts:
        ended = run(start.work, folder)
        if ended.status == 0:
            continued = job.continues is not None and job.continues in ended.said
            if start.checkpoint is not None and not continued:
                return Outcome("lost", f"it begins anew:\n{ended.said}")
            break
        named = start.checkpoint is not None and str(start.checkpoint.relative_to(folder)) in ended.said
        if not named or "not complete" not in ended.said:
            return Outcome("lost", f"it does not go on:\n{ended.said}")
        kind = "refused"
    else:
        if starts:
            return Outcome("lost", f"every start is refused:\n{ended.said}")
    found = job.result(folder)
    different = [name for name in reference.digests if found.get(name) != reference.digests[name]]
    if different or found.keys() != reference.digests.keys():
        return Outcome("lost", f"{different or sorted(found.keys() ^ reference.digests.keys())} differ")
    return Outcome(kind, continued=continued)
