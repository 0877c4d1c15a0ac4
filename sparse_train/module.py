"""``CausalLM``: the LightningModule that the recipes train.

Shape suffixes: B batch, L sequence length, V vocabulary.
"""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric

from sparse_train.layers import sparse_layers, sparsify_like
from sparse_train.losses import next_token_loss
from sparse_train.sharding import shard_blocks, whole_first
from sparse_train.sources import ModelSource, as_model_source
from sparse_train.targets import dimensions


class CausalLM(L.LightningModule):
    """A transformers causal language model with AdamW, linear warm-up and cosine decay to zero.

    Logs ``train/loss`` every step, ``val/loss`` and ``val/perplexity`` (token perplexity, exp of the mean loss over
    tokens; the loss in float32) every validation.

    Args:
        model: a model source, or a Hugging Face id or local folder.
        lr: peak learning rate.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        warmup: share of the run over which the learning rate rises.
        gradient_checkpointing: recompute activations in backward, to save memory.
    """

    def __init__(
        self,
        model: ModelSource | str,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run, at least 0 and below 1, got {warmup}.")
        self.source = as_model_source(model)
        self.model: Any = None
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup
        self.gradient_checkpointing = gradient_checkpointing
        self._val_loss = MeanMetric()

    def configure_model(self) -> None:
        if self.model is None:
            with whole_first():
                self.model = self.source.load()
            self.model.config.use_cache = False
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
            if self.device_mesh is not None:  # under ModelParallelStrategy
                bfloat16 = self.trainer.precision == "bf16-mixed"
                shard_blocks(self.model, self.device_mesh["data_parallel"], bfloat16=bfloat16)

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits_BLV = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, _ = next_token_loss(logits_BLV, batch["labels"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BLV = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, tokens = next_token_loss(logits_BLV, batch["labels"])
        self._val_loss.update(loss, weight=tokens)

    def on_validation_epoch_end(self) -> None:
        loss = self._val_loss.compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, prog_bar=True)
        self._val_loss.reset()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if dimensions(p) >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if dimensions(p) < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("The learning rate decays over the whole run, so the run needs an end: set max_steps.")
        warmup_steps = max(1, int(self.warmup * total))

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # enough to build the model again without its source: ``sparse-train export`` needs no hub
        checkpoint["model_config"] = self.model.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # outside a sparse run (validate, load_from_checkpoint) nobody has sparsified the model yet
        before = len(sparse_layers(self))
        if "state_dict" in checkpoint:
            sparsify_like(self, checkpoint["state_dict"])
        elif not before and checkpoint.get("callbacks", {}).get("DynamicPruning"):
            # FSDP2 and DeepSpeed have loaded the weights already, and masks had no place to go
            raise ValueError(
                "The checkpoint is of a sparse run, and this run has no DynamicPruning callback, so its shadow values "
                "would be taken for weights. Add the callback, or export the checkpoint (sparse-train export)."
            )
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if fitting and len(sparse_layers(self)) > before:
            raise ValueError(
                "The checkpoint is of a sparse run, and this run has no DynamicPruning callback: its masks would never "
                "change and never be folded in. Add the callback, or export the checkpoint and train what that gives."
            )
