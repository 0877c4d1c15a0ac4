"""Small modules, data and trainers that the tests of callbacks run."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sparse_train import sparse_layers
from sparse_train.callbacks import DynamicPruning
from tests.conftest import VOCABULARY, shallow_llama


class Tokens(Dataset):
    """Forty different sequences of 16 tokens, as batches of dicts."""

    def __init__(self, padded=False):
        self.ids = torch.randint(3, VOCABULARY, (40, 16), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask[:, 12:] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.ids[i]}


def loader(batch_size=2, padded=False):
    return StatefulDataLoader(
        Tokens(padded), batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(2)
    )


class InInit(L.LightningModule):
    """Layers made in ``__init__``; knows nothing of sparse_train."""

    def __init__(self):
        super().__init__()
        self.net = shallow_llama()
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].sum().item())
        loss = self.net(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


class InConfigureModel(InInit):
    """The same, with layers made in ``configure_model``."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = shallow_llama()


class Classifier(L.LightningModule):
    """No language model at all: batches are tuples, blocks there are none."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ExactAfterEveryStep(L.Callback):
    """Asserts inside the run that every group of four keeps two, in training and in validation."""

    def __init__(self):
        self.checked = 0

    def check(self, pl_module):
        for layer in sparse_layers(pl_module).values():
            assert (layer.unpacked_mask().reshape(-1, 4).sum(1) == 2).all()
        assert sparse_layers(pl_module)
        self.checked += 1

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.check(pl_module)

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:  # before the first mask
            self.check(pl_module)


def trainer(tmp_path, *callbacks, max_steps=12, **settings):
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    } | settings
    return L.Trainer(max_steps=max_steps, callbacks=list(callbacks), default_root_dir=tmp_path, **settings)


def flip_rates(tmp_path, **arguments):
    model, logger = InInit(), L.pytorch.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, DynamicPruning(update_freq=4, **arguments), logger=logger).fit(model, loader())
    rows = (line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines())
    header, *values = rows
    table = [dict(zip(header, row, strict=True)) for row in values]
    return [row for row in table if row.get("sparsity/flip_rate")]


class Interrupt(L.Callback):
    """Stops a run in the middle of an epoch, after a checkpoint."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def zeros(model):
    weight = model.net.model.layers[0].mlp.up_proj.weight
    return float((weight == 0).float().mean())
