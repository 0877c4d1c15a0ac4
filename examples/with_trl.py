"""Sparse fine-tuning by TRL's SFTTrainer. What sparse-train adds is marked.

pip install trl
python examples/with_trl.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt
"""

from datasets import Dataset
from model_and_text import load
from trl import SFTConfig, SFTTrainer

from sparse_train import summary  # sparse-train
from sparse_train.integrations.transformers import SparseTrainerCallback  # sparse-train

model, tokenizer, text = load()
trainer = SFTTrainer(
    model,
    SFTConfig(
        "runs/with_trl",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=128,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=False,  # TRL's default needs a GPU
    ),
    train_dataset=Dataset.from_dict({"text": text.split("\n\n")}),
    processing_class=tokenizer,
    callbacks=[SparseTrainerCallback("2:4", update_freq=10)],  # sparse-train
)
trainer.train()  # prints sparsity/flip_rate, too: the share of the mask that changed
print(summary(model))  # sparse-train
