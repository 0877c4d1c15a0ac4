"""``CausalLM``: the LightningModule that the recipes train.

Shape suffixes: B batch, L sequence length, V vocabulary.
"""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sparse_train.layers.blocks import block_lists, dimensions
from sparse_train.layers.sharding import whole_first
from sparse_train.layers.sparse_linear import sparse_layers, sparsify_like
from sparse_train.models.checkpoints import PRUNING_STATE
from sparse_train.models.distillation import Distillation, Teacher
from sparse_train.models.loading import load_sharded
from sparse_train.models.lora import LoRA, adapter_config
from sparse_train.models.losses import next_token_loss
from sparse_train.models.sources import ModelSource, as_model_source


class CausalLM(L.LightningModule):
    """A transformers causal language model with AdamW, linear warm-up and cosine decay to zero.

    A batch's loss is the mean over its labelled tokens, and over micro-batches and processes the mean of their means:
    where those differ in labels, as in conversations, a token of a batch with few counts more.

    Logs ``train/loss`` every step, ``val/loss`` and ``val/perplexity`` (token perplexity, exp of the mean loss over
    tokens; the loss in float32) every validation. With distillation ``train/loss`` is the weighted sum that is trained
    on, and its terms are logged beside it, unweighted: ``train/loss_ce``, ``train/loss_kldiv`` and, where it has a
    weight, ``train/loss_squarehead``. Validation is on the text alone.

    Args:
        model: a model source, or a Hugging Face id or local folder.
        lr: peak learning rate.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        warmup: share of the run over which the learning rate rises.
        gradient_checkpointing: recompute activations in backward, to save memory.
        compile_blocks: compile the decoder blocks, of the teacher too (``torch.compile``, which wants a C++ compiler on
            CPU). Layers that share an input then record it each for itself. Tested in one process.
        distillation: learn from a teacher, too; default: from the text alone.
    """

    def __init__(
        self,
        model: ModelSource | str,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run, at least 0 and below 1, got {warmup}.")
        self.source = as_model_source(model)
        self.model: Any = None
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.distillation = distillation
        self._teacher: Teacher | None = None
        self._val_loss = MeanMetric()

    def setup(self, stage: str) -> None:
        self._teacher = None  # of a run that was interrupted, perhaps on another device

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._load()
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()

    def _load(self) -> Any:
        if self.device_mesh is not None:  # under ModelParallelStrategy
            if isinstance(self.source, LoRA):
                raise ValueError(
                    "LoRA of peft is not supported under ModelParallelStrategy (FSDP2), which shards the model as it "
                    'is loaded, without adapters. Take strategy="ddp".'
                )
            bfloat16 = self.trainer.precision == "bf16-mixed"
            return load_sharded(self.source, self.device_mesh["data_parallel"], bfloat16=bfloat16)
        with whole_first():
            return self.source.load()

    def forward(self, **batch: Any) -> Any:
        return self.model(**{"use_cache": False, **batch})  # not in its config, which is exported

    def on_fit_start(self) -> None:
        if self.distillation is not None:
            self._load_teacher(self.distillation)

    def _load_teacher(self, distillation: Distillation) -> Teacher:
        # From its source and not from the model here, which is masked by now and may hold weights of a checkpoint: a
        # resumed run has the teacher that it had. A learning rate finder trains before on_fit_start.
        if self._teacher is None:
            teacher = distillation.load_teacher(self.source, self.model)
            teacher.model = self.trainer.precision_plugin.convert_module(teacher.model).to(self.device)
            if self.compile_blocks:
                _compile_blocks(teacher.model)
            self._teacher = teacher
        return self._teacher

    def on_train_start(self) -> None:
        if self.compile_blocks:  # not before: one-shot pruning, for a first mask, calls blocks in ways of its own
            _compile_blocks(self.model)

    def on_fit_end(self) -> None:
        self._teacher = None  # no part of this module, so nothing else would take it off the device
        for block in _blocks(self.model):
            block._compiled_call_impl = None  # torch has no word for it; a compiled block is not what gets exported

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.distillation is None:
            logits_BLV = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss, _ = next_token_loss(logits_BLV, batch["labels"])
        else:
            loss = self._distillation_loss(self.distillation, batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _distillation_loss(self, distillation: Distillation, batch: dict[str, Tensor]) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if distillation.uses_hidden_states:
            inputs["output_hidden_states"] = True
        taught = self._load_teacher(distillation)(**inputs)  # first, while the student's activations are not there yet
        losses = distillation.losses(self(**inputs), taught, batch)
        self.log_dict({f"train/loss_{name}": loss for name, loss in losses.items()})
        return distillation.total(losses)

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
        checkpoint["generation_config"] = self.model.generation_config.to_dict()
        checkpoint["adapter_config"] = adapter_config(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # outside a sparse run (validate, load_from_checkpoint) nobody has sparsified the model yet
        before = len(sparse_layers(self))
        if "state_dict" in checkpoint:
            sparsify_like(self, checkpoint["state_dict"])
        elif not before and checkpoint.get("callbacks", {}).get(PRUNING_STATE):
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


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [block for blocks in block_lists(model).values() for block in blocks]


def _compile_blocks(model: nn.Module) -> None:
    for block in _blocks(model):  # and not the model whole: they are alike, so that one compilation serves them all
        block.compile()
