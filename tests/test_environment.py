import torch

from sparse_train import __version__, environment


def test_versions_are_those_that_run():
    found = environment.versions()
    assert found["sparse-train"] == __version__
    assert found["torch"] == torch.__version__
    assert "transformers" in found


def test_the_machine_is_a_kind_and_no_name(monkeypatch):
    found = environment.machine()
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert set(found) <= {"system", "processor", "cores", "threads", "memory", "accelerators"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert environment.machine()["accelerators"] == ["GPU 0", "GPU 1"]
