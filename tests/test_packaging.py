"""What users install: the wheel holds what the tree holds, works from another folder, and imports lightly."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd, **environment):
    done = subprocess.run(
        arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist of a copy without the links, as from a checkout on a system that has none."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    for name in ("callbacks", "recipes", "configs"):
        (source / "sparse_train" / name).unlink()
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"  # as pip does
    run(sys.executable, "-c", build.format("sdist", str(folder)), cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    run(sys.executable, "-c", build.format("wheel", str(folder)), cwd=next((folder / "unpacked").iterdir()))
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_the_tree_holds(wheel):
    tree = set()
    for top in ("sparse_train", "callbacks", "recipes", "configs"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".typed", ".html") and not path.parent.is_symlink():
                inside = path.relative_to(ROOT).as_posix()
                tree.add(inside if top == "sparse_train" else f"sparse_train/{inside}")
    tree = {name for name in tree if "__pycache__" not in name}
    listing = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert listing == tree
    assert "sparse_train/callbacks/dynamic_pruning.py" in listing
    assert "sparse_train/configs/strategy/fsdp2.yaml" in listing


def test_the_wheel_works_from_another_folder_and_pruning_needs_torch_alone(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)  # what an installer does; ``make package`` has pip do it
    script = """if True:
        import sys, sparse_train
        assert "torch" not in sys.modules
        assert all(getattr(sparse_train, name) for name in sparse_train.__all__)
        import torch
        x = torch.randn(16, 8)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        print(sparse_train.prune(model, mask_structure="2:4", criterion=sparse_train.Magnitude()).sparsity)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        updater = sparse_train.MaskUpdater(model, "2:4", update_freq=1, total_steps=8)
        for _ in range(8):
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            updater.step()
        updater.finish()
        print(updater.report().sparsity)
        sparse_train.squash(model)
        heavy = {"lightning", "transformers", "datasets", "deepspeed", "lm_eval", "peft", "rich", "matplotlib",
                 "jsonargparse", "torchmetrics", "torchdata"}
        print(sorted(heavy & set(sys.modules)))
        import sparse_train.callbacks as c
        print(sparse_train.__file__, c.__file__)
        from sparse_train.callbacks import DynamicPruning
        print(DynamicPruning("2:4").config.mask_structure)
        from sparse_train.cli.main import main
        main(["fit", "--config=recipes/smollm2_2of4.yaml", "--config=configs/strategy/ddp.yaml", "--print_config"])
    """
    out = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert out.startswith("0.5\n0.5\n[]\n")
    assert out.count(str(target)) == 2
    assert "\n2:4\n" in out
    assert "strategy: ddp" in out


def test_bare_callbacks_is_the_same_package(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "callbacks", raising=False)
    assert importlib.import_module("callbacks") is importlib.import_module("sparse_train.callbacks")
