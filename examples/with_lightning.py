"""Sparse training by Lightning. What sparse-train adds is marked.

python examples/with_lightning.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt
"""

import lightning as L
import torch
from model_and_text import blocks, load
from torch.utils.data import DataLoader

from sparse_train import summary  # sparse-train
from sparse_train.callbacks import DynamicPruning  # sparse-train


class Module(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


model, tokenizer, text = load()
loader = DataLoader(blocks(tokenizer, text), batch_size=2, shuffle=True)
pruning = DynamicPruning("2:4", update_freq=10)  # sparse-train
trainer = L.Trainer(
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    callbacks=[pruning],  # sparse-train
)
trainer.fit(Module(model), loader)

print(f"{pruning.last_report.initial_flip_rate:.1%} of the first mask has changed.")  # sparse-train
print(summary(model))  # sparse-train
