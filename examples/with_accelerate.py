"""Sparse training by accelerate, on one device or with DDP on several. What sparse-train adds is marked.

python examples/with_accelerate.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt
"""

import torch
from accelerate import Accelerator
from model_and_text import blocks, load
from torch.utils.data import DataLoader

from sparse_train import MaskUpdater, squash, summary  # sparse-train

accelerator = Accelerator(gradient_accumulation_steps=2)
model, tokenizer, text = load()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = accelerator.prepare(DataLoader(blocks(tokenizer, text), batch_size=1, shuffle=True))
updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=len(loader) // 2)  # sparse-train: before DDP wraps it
wrapped, optimizer = accelerator.prepare(model, optimizer)

for batch in loader:
    with accelerator.accumulate(wrapped):
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and (report := updater.step()):  # sparse-train: once per step of the optimizer
        accelerator.print(f"step {report.step}: {report.flip_rate:.1%} of the mask changed")  # sparse-train

updater.finish()  # sparse-train
squash(model)  # sparse-train: pruned weights become zeros
accelerator.print(summary(model))  # sparse-train
