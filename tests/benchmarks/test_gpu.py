"""The page that waits for a GPU, made without one."""

import sys
from pathlib import Path

import pytest
import torch

from sparse_train import sparse_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="the parts that fail without a GPU would run")
def test_a_part_that_fails_is_on_the_page_and_the_next_one_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "numbers", lambda device, small: "42 ms")
    page = tmp_path / "gpu.md"
    gpu.main("cpu", small=True, parts=["products", "numbers"], out=str(page))
    text = page.read_text()
    assert "# On 0 x no GPU" in text and "## Numbers\n\n42 ms" in text
    failed = text.partition("## Products")[2].partition("## Numbers")[0]
    assert "**Failed:**" in failed and "Only CUDA tensors are currently supported" in failed


def test_the_memory_of_a_dense_run_is_that_of_a_dense_model(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu.Student, "step", lambda student, batch: seen.append(bool(sparse_layers(student.model))))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20 * len(seen))
    monkeypatch.setattr(gpu.MaskUpdater, "step", lambda updater: None)
    assert "| dense | 3 |\n| re-pruned | 6 |" in gpu.memory("cpu", small=True)
    assert seen == 3 * [False] + 3 * [True]


def test_the_error_of_a_command_has_its_last_lines():
    with pytest.raises(RuntimeError, match="exit status 3\nthe reason"):
        gpu.shell("-c", "import sys; print('the reason'); sys.exit(3)")
