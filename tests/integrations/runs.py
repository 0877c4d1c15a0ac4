"""Short runs of a ``Trainer`` on a tiny model."""

import torch
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from sparse_train.integrations.transformers import SparseTrainerCallback
from tests.conftest import VOCABULARY, shallow_llama


class Tokens(Dataset):
    """Forty different sequences of 16 tokens; the last ones of ``padded`` are padding."""

    def __init__(self, padded=0):
        self.ids = torch.randint(3, VOCABULARY, (40, 16), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones_like(self.ids)
        self.mask[:, 16 - padded :] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.ids[i]}


def trainer(folder, *callbacks, model=None, data=None, **settings):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    made = Trainer(
        model=model or shallow_llama(),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=data or Tokens(),
        eval_dataset=Tokens(),
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


def pruning(**changes):
    return SparseTrainerCallback("2:4", **({"update_freq": 4, "end_step": 1.0} | changes))
