"""Sparse training in a loop of your own. What sparse-train adds is marked.

python examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt
"""

import torch
from model_and_text import blocks, load
from torch.utils.data import DataLoader

from sparse_train import MaskUpdater, squash, summary  # sparse-train

model, tokenizer, text = load()
loader = DataLoader(blocks(tokenizer, text), batch_size=2, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=len(loader))  # sparse-train

for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if report := updater.step():  # sparse-train
        print(f"step {report.step}: loss {loss:.2f}, {report.flip_rate:.1%} of the mask changed")  # sparse-train

updater.finish()  # sparse-train
squash(model)  # sparse-train: pruned weights become zeros
print(summary(model))  # sparse-train
