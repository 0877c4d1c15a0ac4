"""One trial of each job, and what a checkpoint that was cut off leads to. ``make faults`` runs many trials."""

import functools
import os
import random
import shutil
import signal

import pytest

from tests.faults import harness
from tests.faults.jobs import checkpoints, jobs

NAMES = {  # each signal once, as far as there are jobs
    "fit": signal.SIGKILL,
    "prune --streaming": signal.SIGINT,
    "export": signal.SIGTERM,
    "transformers.Trainer": signal.SIGKILL,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def all_jobs(shared):
    return jobs(shared, short=True)


@pytest.fixture(scope="module")
def whole(all_jobs, shared):
    """The folder in which a job ran without interruption, and what it left; each runs once."""

    @functools.cache
    def of(name):
        if name == "export":
            of("fit")  # leaves what is exported
        return shared / name, harness.whole(all_jobs[name], shared / name)

    return of


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_job_ends_as_the_uninterrupted_one(all_jobs, whole, name, tmp_path):
    job = all_jobs[name]
    _, reference = whole(name)
    outcome = harness.trial(job, reference, tmp_path / "trial", NAMES[name], random.Random(0))
    assert outcome.kind in ("equal", "refused"), outcome.why


def test_a_checkpoint_that_was_cut_off_is_refused_by_name_and_the_one_before_is_used(all_jobs, whole, tmp_path):
    job = all_jobs["fit"]
    folder, reference = whole("fit")
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("out"))
    (last,) = checkpoints(tmp_path / "run")
    cut = last.with_name("epoch=0-step=26.ckpt")
    cut.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    os.utime(cut, ns=(last.stat().st_atime_ns, last.stat().st_mtime_ns + 1))
    first, second, _ = job.starts(tmp_path / "run")
    assert (first.checkpoint, second.checkpoint) == (cut, last)
    outcome = harness.go_on(job, reference, tmp_path / "run")
    assert outcome.kind == "refused", outcome.why
