"""Sparse training by the Trainer of transformers. What sparse-train adds is marked.

python examples/with_trainer.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt
"""

from model_and_text import blocks, load
from transformers import Trainer, TrainingArguments

from sparse_train import summary  # sparse-train
from sparse_train.integrations.transformers import SparseTrainerCallback  # sparse-train

model, tokenizer, text = load()
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/with_trainer",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=blocks(tokenizer, text),
    callbacks=[SparseTrainerCallback("2:4", update_freq=10)],  # sparse-train
)
trainer.train()  # prints sparsity/flip_rate, too: the share of the mask that changed
print(summary(model))  # sparse-train
