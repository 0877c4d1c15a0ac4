"""Bugs planted one at a time: ``python -m tests.faults.mutants SEED START STOP MODULE ...`` says which no test notices.

A bug is one change of an operator, a condition, a constant or a statement. A run without a bug tells which tests run
which lines. Those that run the changed line then run in a fork of this process, so that other libraries are imported
once: the shortest first, up to the first that fails, or up to ``SECONDS`` in sum. They run in a copy of the package, so
that processes which they start have the bug, too.
Of each module, those from START to STOP are tried, in an order that SEED draws. Messages of errors and assertions get
none.
"""

import ast
import importlib
import json
import multiprocessing.process
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import lightning  # noqa: F401  once, and not in each fork
import pytest
import torchdata.stateful_dataloader  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

_FILES = (
    "layers distributions pruning callbacks/test_distribution.py callbacks/test_dynamic_pruning.py "
    "callbacks/test_run_record.py export/test_hf_folder.py export/test_verify.py oneshot/test_calibration.py "
    "oneshot/test_first_mask.py oneshot/test_float32.py oneshot/test_prune.py test_criteria.py test_inspection.py "
    "test_numbers.py test_patterns.py test_schedules.py test_selection.py test_solvers.py test_statistics.py"
)
_FAST = "not and_ranks and not sharded_engines and not compiled"  # a minute each
TESTS = {
    "distributed.collectives": ("ranks/test_norms.py ranks/test_failures.py ranks/test_equality.py", ""),
    "distributed.fsdp2": (
        "ranks/test_failures.py::test_other_ways_to_shard_are_refused_before_the_first_step "
        "ranks/test_features.py ranks/test_equality.py",
        "not ddp and not zero1 and not zero2 and not zero3",  # one launch trains all cases of an engine
    ),
    "distributed.zero": ("ranks/test_features.py ranks/test_equality.py", "not ddp and not fsdp2"),
}
"""Files of tests, and which tests in them, for modules that need several processes; others have ``_FILES``."""
SECONDS = 60
_ROOT = Path(__file__).parents[2]
_PAIRS: list[tuple[type, type]] = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift), (ast.And, ast.Or)),
]
_SWAPS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitXor: ast.BitAnd}


class Change(NamedTuple):
    """One change of a syntax tree."""

    holder: Any
    """An object, or a list."""
    key: Any
    """The name or index there."""
    new: Any
    lines: range
    """The lines that run the changed place; empty if it runs at import, or if a cache may hide that it does."""


def places(node: ast.AST, lazy: bool = False) -> Iterator[Change]:
    """Each change that is possible below a node; ``lazy`` if it is in a function."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if isinstance(node, ast.FunctionDef) and name == "body":
            lazy = not any("cache" in ast.unparse(each) for each in node.decorator_list)
        parts = enumerate(value) if isinstance(value, list) else [(name, value)]
        holder = value if isinstance(value, list) else node
        for key, each in parts:
            if isinstance(each, (ast.Raise, ast.Assert)) or not isinstance(each, ast.AST):
                continue
            placed: Any = each if hasattr(each, "lineno") else node
            lines = range(placed.lineno, placed.end_lineno + 1) if lazy else range(0)
            if type(each) in _SWAPS:
                yield Change(holder, key, _SWAPS[type(each)](), lines)
            elif isinstance(each, ast.UnaryOp):
                yield Change(holder, key, each.operand, lines)
            elif isinstance(each, ast.Constant) and isinstance(each.value, bool):
                yield Change(holder, key, ast.Constant(not each.value), lines)
            elif isinstance(each, ast.Constant) and isinstance(each.value, (int, float)):
                yield Change(holder, key, ast.Constant(each.value + 1), lines)
            elif isinstance(each, ast.AugAssign) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)):
                yield Change(holder, key, ast.Pass(), lines)
            elif name == "test":
                yield Change(holder, key, ast.UnaryOp(ast.Not(), each), lines)
            yield from places(each, lazy)


def planted(source: str, number: int) -> tuple[str, str, range]:
    """What is changed, the changed source, and the ``Change.lines``."""
    tree = ast.parse(source)
    holder, key, new, lines = list(places(tree))[number]
    before = ast.unparse(tree).splitlines()
    if isinstance(holder, list):
        holder[key] = new
    else:
        setattr(holder, key, new)
    after = ast.unparse(ast.fix_missing_locations(tree)).splitlines()
    old, changed = next((a.strip(), b.strip()) for a, b in zip(before, after, strict=False) if a != b)
    return f"{old}  ->  {changed}", "\n".join(after), lines


_STARTS = {multiprocessing.process.BaseProcess.start.__code__, subprocess.Popen.__init__.__code__}
ELSEWHERE = "in other processes"
"""Stands for the lines that processes of a test run, which are not watched."""
Seen = dict[str, tuple[float, list[str]]]
"""Of each test: its seconds, and the lines of the package that it runs, as "criteria.py:12"."""


class Watch:
    """A plugin of pytest that writes ``Seen`` of the tests that pass."""

    def __init__(self, package: Path) -> None:
        self.package, self.seen, self.failed = f"{package}/", Seen(), set[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines = set[str]()

        def line(frame: Any, event: str, _: Any) -> Any:
            lines.add(f"{frame.f_code.co_filename.removeprefix(self.package)}:{frame.f_lineno}")
            return line

        def call(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code in _STARTS:
                lines.add(ELSEWHERE)
            return line if frame.f_code.co_filename.startswith(self.package) else None

        threading.settrace(call)
        sys.settrace(call)
        began, began_wall = time.process_time(), time.perf_counter()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            took = time.perf_counter() - began_wall if ELSEWHERE in lines else time.process_time() - began
            self.seen[item.nodeid] = took, sorted(lines)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        Path("seen.json").write_text(json.dumps({n: each for n, each in self.seen.items() if n not in self.failed}))


class Only:
    """A plugin of pytest: only these tests, in this order, up to the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {name: place for place, name in enumerate(tests)}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.option.maxfail = 1

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda i: self.place[i.nodeid])


def passes(folder: Path, plugin: Any, files: Iterable[str], which: str, seconds: int) -> bool:
    """Whether tests pass, in a fork, with the copy of the package that is in a folder."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(_ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        importlib.import_module("tests.conftest")  # loads another profile
        hypothesis.settings.load_profile("mutants")
        os.environ["PYTHONPATH"] = str(folder)  # for processes that tests start
        os._exit(pytest.main(["-p", "no:cacheprovider", "-k", which, *files], plugins=[plugin]))
    return os.waitpid(child, 0)[1] == 0


def survives(base: Path, module: str, source: str, lines: range, seen: Seen, which: str) -> bool:
    """Whether the tests that run one of these lines pass with this source in a copy of ``base``."""
    wanted = {ELSEWHERE, *(f"{_file(module)}:{line}" for line in lines)}
    tests, sum_of_seconds = list[str](), 0.0
    for name, (seconds, ran) in sorted(seen.items(), key=lambda item: item[1][0]):
        if (not lines or not wanted.isdisjoint(ran)) and (not tests or sum_of_seconds + seconds <= SECONDS):
            tests.append(name)
            sum_of_seconds += seconds
    files = {name.partition("::")[0]: None for name in tests}
    limit = 30 + 3 * round(sum_of_seconds)  # for a bug that never ends
    if not tests:
        return True
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, symlinks=True, dirs_exist_ok=True)
        Path(folder, "sparse_train", _file(module)).write_text(source)
        return passes(Path(folder), Only(tests), files, which, limit)


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def main(seed: str, start: str, stop: str, *modules: str) -> None:
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough, it need not be small
    hypothesis.settings.register_profile(
        "mutants", deadline=None, database=None, derandomize=True, phases=phases, max_examples=50
    )
    watched: dict[tuple[str, str], Seen] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("sparse_train", "callbacks", "tests", "recipes", "configs"):
            shutil.copytree(_ROOT / name, base / name, symlinks=True)
        shutil.copy(_ROOT / "pyproject.toml", base)
        sys.dont_write_bytecode = False  # most of the time of a bug was that of compiling all files
        for module in modules:
            files, which = chosen = TESTS.get(module, (_FILES, _FAST))
            if chosen not in watched:
                watch = Watch(base / "sparse_train")
                passed = passes(base, watch, [f"tests/{name}" for name in files.split()], which, 1800)
                watched[chosen] = json.loads((base / "seen.json").read_text())
                print(f"{len(watched[chosen])} tests{'' if passed else ', without those that fail'}", flush=True)
            source = (base / "sparse_train" / _file(module)).read_text()
            numbers = list(range(len(list(places(ast.parse(source))))))
            random.Random(int(seed)).shuffle(numbers)
            drawn, alive = numbers[int(start) : int(stop)], 0
            for number in drawn:
                said, changed, lines = planted(source, number)
                if survives(base, module, changed, lines, watched[chosen], which):
                    alive += 1
                    print(f"{module} {number}: {said}", flush=True)
            print(f"{module}: {len(drawn) - alive} of {len(drawn)} noticed, {len(numbers)} possible", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
