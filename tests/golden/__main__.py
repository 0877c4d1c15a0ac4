"""``python -m tests.golden record`` writes ``digests.json``; ``check [SCENARIO ...]`` compares with it."""

import argparse
import os
import sys


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tests.golden import digests
    from tests.golden.outcome import quiet

    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("command", choices=["record", "check"])
    parser.add_argument("scenarios", nargs="*", help="only check these; default: all", metavar="SCENARIO")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.scenarios if name not in digests.NAMES]:
        parser.error(f"there is no scenario {unknown[0]!r}, but: {'; '.join(digests.NAMES)}")
    if arguments.command == "record" and arguments.scenarios:
        parser.error("record writes all scenarios")
    quiet()
    if arguments.command == "record":
        digests.record()
        return 0
    try:
        differing = digests.check(arguments.scenarios or digests.NAMES)
    except digests.NotComparable as error:
        print(error)
        return 1
    print(differing or "All digests are the recorded ones.")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
