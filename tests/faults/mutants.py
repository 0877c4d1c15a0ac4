"""Bugs planted one at a time: ``python -m tests.faults.mutants SEED START STOP MODULE ...`` says which no test notices.

A bug is one change of an operator, a condition, a constant or a statement in a module of ``TESTS``. Its tests that run
the changed line then run in a fork of this process, the shortest first, up to the first that fails: other libraries are
imported once. They run in a copy of the package, so that processes which they start have the bug, too.
Those from START to STOP are tried (default: all) of these modules (default: all), in an order that SEED draws. Messages
of errors and assertions get none.
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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import lightning  # noqa: F401  once, and not in each fork
import pytest
import torchdata.stateful_dataloader  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

TESTS = {
    "criteria": "test_criteria.py",
    "patterns": "test_patterns.py test_selection.py test_criteria.py",
    "selection": "test_selection.py test_patterns.py",
    "statistics": "test_statistics.py test_numbers.py",
    "layers.masks": "layers/test_masks.py layers/test_sparse_linear.py",
    "layers.functional": "layers/test_sparse_linear.py layers/test_second_derivatives.py layers/test_low_rank.py",
    "distributions": "distributions pruning/test_layer_sparsities.py",
    "policies": "pruning/test_regrow.py pruning/test_policies.py",
    "pruning.update": "distributions/test_owl.py pruning/test_updater.py pruning/test_layer_sparsities.py",
    "pruning.updater": "pruning/test_updater.py pruning/test_resuming.py pruning/test_running_norms.py",
    "pruning.recording": "pruning/test_running_norms.py pruning/test_updater.py pruning/test_resuming.py",
    "distributed.collectives": "ranks/test_norms.py ranks/test_failures.py ranks/test_equality.py",
    "distributed.fsdp2": "ranks/test_failures.py::test_other_ways_to_shard_are_refused_before_the_first_step "
    "ranks/test_features.py ranks/test_equality.py",
    "distributed.layout": "layers/test_sparsify.py pruning/test_updater.py pruning/test_policies.py",
    "distributed.zero": "ranks/test_features.py ranks/test_equality.py",
}
"""Modules of the package, and the tests that belong to them."""
_ROOT = Path(__file__).parents[2]
_FAST = "not and_ranks and not sharded_engines and not compiled"  # a minute each
_CHOSEN = {  # one launch trains all cases of an engine
    "distributed.collectives": "",
    "distributed.fsdp2": "not ddp and not zero1 and not zero2 and not zero3",
    "distributed.zero": "not ddp and not fsdp2",
}
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
ELSEWHERE = 0
"""Stands for the lines that other processes run, which are not watched."""


class Watch:
    """A plugin of pytest: how long each test takes, and which lines of a file it runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = str(path), dict[str, tuple[float, list[int]]]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines = set[int]()

        def line(frame: Any, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        def call(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code in _STARTS:
                lines.add(ELSEWHERE)
            return line if frame.f_code.co_filename == self.path else None

        threading.settrace(call)
        sys.settrace(call)
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seen[item.nodeid] = time.perf_counter() - began, sorted(lines)

    def pytest_sessionfinish(self) -> None:
        Path("seen.json").write_text(json.dumps(self.seen))


class Only:
    """A plugin of pytest: only these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {name: place for place, name in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda i: self.place[i.nodeid])


def passes(module: str, source: str, plugin: Callable[[Path], Any], seconds: int = 600) -> tuple[bool, Any]:
    """Whether the tests of a module pass with this source, in a copy of the package; and what ``Watch`` has seen."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sparse_train", "callbacks", "tests", "recipes", "configs"):
            shutil.copytree(_ROOT / name, Path(folder, name), symlinks=True)
        shutil.copy(_ROOT / "pyproject.toml", folder)
        path = Path(folder, "sparse_train", *module.split(".")).with_suffix(".py")
        path.write_text(source)
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.chdir(folder)
            sys.path[:] = [folder, *(path for path in sys.path if path not in ("", str(_ROOT)))]
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            importlib.import_module("tests.conftest")  # loads another profile
            hypothesis.settings.load_profile("mutants")
            os.environ["PYTHONPATH"] = folder  # for processes that tests start
            tests = [f"tests/{name}" for name in TESTS[module].split()]
            args = ["-x", "-p", "no:cacheprovider", "-k", _CHOSEN.get(module, _FAST), *tests]
            os._exit(pytest.main(args, plugins=[plugin(path)]))
        done, seen = os.waitpid(child, 0)[1] == 0, Path(folder, "seen.json")
        return done, json.loads(seen.read_text()) if seen.exists() else {}


def survives(module: str, source: str, lines: range, seen: dict[str, tuple[float, list[int]]]) -> bool:
    """Whether all tests of a module that run one of these lines pass with this source."""
    tests = [name for name, (_, ran) in seen.items() if not lines or not {ELSEWHERE, *lines}.isdisjoint(ran)]
    tests.sort(key=lambda name: seen[name][0])
    limit = 30 + 3 * round(sum(seen[name][0] for name in tests))  # for a bug that never ends
    return not tests or passes(module, source, lambda _: Only(tests), limit)[0]


def main(seed: str = "0", start: str = "0", stop: str = "9999", *modules: str) -> None:
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough, it need not be small
    hypothesis.settings.register_profile(
        "mutants", deadline=None, database=None, derandomize=True, phases=phases, max_examples=50
    )
    sources = {name: (_ROOT / "sparse_train" / f"{name.replace('.', '/')}.py").read_text() for name in modules or TESTS}
    numbers = [(name, n) for name, text in sources.items() for n in range(len(list(places(ast.parse(text)))))]
    random.Random(int(seed)).shuffle(numbers)
    drawn = numbers[int(start) : int(stop)]
    print(f"{len(drawn)} of {len(numbers)} bugs", flush=True)
    tried, alive = Counter[str](), Counter[str]()
    watched: dict[str, Any] = {}
    for name, number in drawn:
        if name not in watched:
            passed, watched[name] = passes(name, sources[name], Watch)
            if not passed:
                sys.exit(f"The tests of {name} fail without a bug.")
        said, source, lines = planted(sources[name], number)
        tried[name] += 1
        if survives(name, source, lines, watched[name]):
            alive[name] += 1
            print(f"{name} {number}: {said}  ({tried.total()} tried)", flush=True)
    for name in sorted(tried):
        print(f"{name}: {tried[name] - alive[name]} of {tried[name]} noticed")
    print(f"all: {tried.total() - alive.total()} of {tried.total()} noticed")


if __name__ == "__main__":
    main(*sys.argv[1:])
