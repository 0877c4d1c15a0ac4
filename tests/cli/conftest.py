"""Fixtures of tests that call ``sparse-train`` as a user does."""

import json

import pytest


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparse-train"])


@pytest.fixture
def without_pictures(monkeypatch):
    """In the report that fit leaves: they take longer than a short run. test_json.py has them."""
    monkeypatch.setattr("sparse_train.cli.lightning_cli.write_run_report", lambda runs: "not drawn")


@pytest.fixture
def text(text_file):
    """A text source, as an argument."""
    files = {"train": [str(text_file)], "validation": [str(text_file)], "test": [str(text_file)]}
    return json.dumps({"class_path": "TextFiles", "init_args": files})
