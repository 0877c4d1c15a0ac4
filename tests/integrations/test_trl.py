"""TRL's ``SFTTrainer``, a subclass of the Trainer, needs nothing of its own."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.conftest import shallow_llama, tiny_tokenizer
from tests.integrations.runs import pruning

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_supervised_fine_tuning_ends_sparse_and_its_masks_move(tmp_path, text_file):
    lines = [line for line in text_file.read_text().splitlines() if len(line) > 30]
    settings = trl.SFTConfig(
        str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        max_length=32,
        save_strategy="no",
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    callback = pruning()
    trainer = trl.SFTTrainer(
        shallow_llama(),
        settings,
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "sparse"))
    assert any(row.get("sparsity/flip_rate", 0) > 0 for row in trainer.state.log_history)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for layer in saved.model.layers:
        assert ((layer.mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
