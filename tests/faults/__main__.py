"""``python -m tests.faults [TRIALS] [SEED]``: so many trials of each job, and a table of what became of them."""

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests.faults import harness
from tests.faults.jobs import jobs


def main(trials: int = 100, seed: int = 0) -> int:
    """Run the trials, print the table. Returns 1 if a run was lost."""
    lost: list[str] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared"
        shared.mkdir()
        for job in jobs(shared).values():
            reference = harness.whole(job, shared / job.name)
            counts = {sent: Counter[str]() for sent in harness.SIGNALS}
            chance = random.Random(f"{seed} {job.name}")
            for number in range(trials):
                sent = harness.SIGNALS[number % len(harness.SIGNALS)]
                outcome = harness.trial(job, reference, Path(folder) / "trial", sent, chance)
                counts[sent][outcome.kind] += 1
                counts[sent]["continued"] += outcome.continued
                if outcome.kind == "lost":
                    lost.append(f"{job.name}, trial {number}: {outcome.why}")
                    print(lost[-1], file=sys.stderr, flush=True)
            for sent, found in counts.items():
                kinds = [found[kind] for kind in ("equal", "refused", "lost")]
                rows.append([job.name, sent.name, *map(str, (sum(kinds), found["continued"], *kinds))])
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["job", "signal", "trials", "continued", "equal", "refused", "lost"]
    print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
