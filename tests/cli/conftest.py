"""Fixtures of tests that call ``sparse-train`` as a user does."""

import json

import pytest

from tests.conftest import without_pictures


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparse-train"])


@pytest.fixture(name="without_pictures")
def _without_pictures():
    with without_pictures():
        yield


@pytest.fixture
def text(text_file):
    """A text source, as an argument."""
    files = {"train": [str(text_file)], "validation": [str(text_file)], "test": [str(text_file)]}
    return json.dumps({"class_path": "TextFiles", "init_args": files})
