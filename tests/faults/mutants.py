"""Bugs planted one at a time: ``python -m tests.faults.mutants SEED START STOP MODULE ...`` says which no test notices.

A bug is one change of an operator, a condition, a constant or a statement in a module of ``TESTS``. Its tests then run
in a fork of this process, up to the first that fails: torch and transformers are imported once. They run in a copy of
the package, so that processes which they start have the bug, too.
Those from START to STOP are tried (default: all) of these modules (default: all), in an order that SEED draws. Messages
of errors and assertions get none.
"""

import ast
import importlib
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from transformers import LlamaForCausalLM  # noqa: F401  once, and not in each fork

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
_CPU_SECONDS = 100  # for a bug that never ends
_PAIRS: list[tuple[type, type]] = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift), (ast.And, ast.Or)),
]
_SWAPS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitXor: ast.BitAnd}


def places(node: ast.AST) -> Iterator[tuple[Any, Any, Any]]:
    """Each change that is possible below a node: where (an object, or a list), the name or index there, and what."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        parts = enumerate(value) if isinstance(value, list) else [(name, value)]
        holder = value if isinstance(value, list) else node
        for key, each in parts:
            if isinstance(each, (ast.Raise, ast.Assert)) or not isinstance(each, ast.AST):
                continue
            if type(each) in _SWAPS:
                yield holder, key, _SWAPS[type(each)]()
            elif isinstance(each, ast.UnaryOp):
                yield holder, key, each.operand
            elif isinstance(each, ast.Constant) and isinstance(each.value, bool):
                yield holder, key, ast.Constant(not each.value)
            elif isinstance(each, ast.Constant) and isinstance(each.value, (int, float)):
                yield holder, key, ast.Constant(each.value + 1)
            elif isinstance(each, ast.AugAssign) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)):
                yield holder, key, ast.Pass()
            elif name == "test":
                yield holder, key, ast.UnaryOp(ast.Not(), each)
            yield from places(each)


def planted(source: str, number: int) -> tuple[str, str]:
    """What is changed, and the changed source."""
    tree = ast.parse(source)
    holder, key, new = list(places(tree))[number]
    before = ast.unparse(tree).splitlines()
    if isinstance(holder, list):
        holder[key] = new
    else:
        setattr(holder, key, new)
    after = ast.unparse(ast.fix_missing_locations(tree)).splitlines()
    old, changed = next((a.strip(), b.strip()) for a, b in zip(before, after, strict=False) if a != b)
    return f"{old}  ->  {changed}", "\n".join(after)


def survives(module: str, source: str) -> bool:
    """Whether the tests of a module pass with this source, in a copy of the package and its tests."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sparse_train", "callbacks", "tests", "recipes", "configs"):
            shutil.copytree(_ROOT / name, Path(folder, name), symlinks=True)
        shutil.copy(_ROOT / "pyproject.toml", folder)
        Path(folder, "sparse_train", *module.split(".")).with_suffix(".py").write_text(source)
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
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
            os._exit(pytest.main(["-x", "-p", "no:cacheprovider", "-k", _CHOSEN.get(module, _FAST), *tests]))
        return os.waitpid(child, 0)[1] == 0


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
    for name, number in drawn:
        if not tried[name] and not survives(name, sources[name]):
            sys.exit(f"The tests of {name} fail without a bug.")
        said, source = planted(sources[name], number)
        tried[name] += 1
        if survives(name, source):
            alive[name] += 1
            print(f"{name} {number}: {said}  ({tried.total()} tried)", flush=True)
    for name in sorted(tried):
        print(f"{name}: {tried[name] - alive[name]} of {tried[name]} noticed")
    print(f"all: {tried.total() - alive.total()} of {tried.total()} noticed")


if __name__ == "__main__":
    main(*sys.argv[1:])
