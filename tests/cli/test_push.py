"""``export --push``, by the real client of the hub against a stand-in for its server."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from sparse_train import Magnitude, prune
from sparse_train.cli.main import main
from tests.conftest import tiny_llama


class Hub(BaseHTTPRequestHandler):
    """Answers what the upload of small files asks; takes one token, and keeps what it gets in ``server``."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        url = f"http://{self.headers['Host']}/me/sparse"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": url})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/sparse/preupload/main":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        assert self.path == "/api/models/me/sparse/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"})

    def answer(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files = [], {}
    Thread(target=server.serve_forever, args=[0.01]).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _checkpoint(elsewhere):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    source = {"name": "HuggingFaceTB/SmolLM2-135M", "hub_id": "HuggingFaceTB/SmolLM2-135M"}
    torch.save({"state_dict": state, "model_config": model.config.to_dict(), "model_source": source}, "x.ckpt")


def test_the_hub_gets_the_folder_in_a_private_repository(hub, monkeypatch, model_folder, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    main(["export", "x.ckpt", "out", f"--tokenizer={model_folder}", "--push=me/sparse"])
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "sparse")
    assert created.get("private") or created.get("visibility") == "private"  # the older and the newer way to say it
    assert hub.files == {file.name: file.read_bytes() for file in Path("out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= hub.files.keys()
    card = ModelCard(hub.files["README.md"].decode()).data
    assert card.base_model == "HuggingFaceTB/SmolLM2-135M" and {"sparse-train", "2:4"} <= set(card.tags)
    assert capsys.readouterr().out.endswith("/me/sparse\n")


@pytest.mark.usefixtures("hub")
def test_who_is_not_logged_in_still_has_the_folder(monkeypatch, model_folder):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit, match="(?s)sparse-train export: .*Invalid username or password") as error:
        main(["export", "x.ckpt", "out", f"--tokenizer={model_folder}", "--push=me/sparse"])
    assert Path("out/model.safetensors").exists()
    assert "hf upload me/sparse out --private" in str(error.value)
