"""``CausalLM``: the LightningModule that the recipes train.

Shape suffixes: B batch, L sequence length, V vocabulary.
"""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sparse_train.architecture import all_blocks, dimensions
from sparse_train.distributed.zero import whole_first
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.sparsify import sparsify_like
from sparse_train.models.checkpoints import PRUNING_STATE
from sparse_train.models.distillation import CachedTeacher, Distillation, Teacher, cast_linear
from sparse_train.models.lora import LoRA, adapter_config
from sparse_train.models.losses import mean_over_tokens, next_token_loss
from sparse_train.models.sources import AUTOCAST_OF, ModelSource, as_model_source, load_sharded


class CausalLM(L.LightningModule):
    """A transformers causal language model with AdamW, linear warm-up and cosine decay to zero.

    The loss of a batch is the mean over its labelled tokens. Over micro-batches and processes it is the mean of these
    means: if they differ in the number of labels, as in conversations, a token of a batch with few labels counts more.

    Logs ``train/loss`` at every step, and ``val/loss`` and ``val/perplexity`` (token perplexity, exp of the mean loss
    over tokens) at every validation. With distillation, ``train/loss`` is the weighted sum that is trained on, and its
    terms are also logged, unweighted: ``train/loss_ce`` and ``train/loss_kldiv``.

    Args:
        model: a model source, or a Hugging Face id or local folder.
        lr: peak learning rate.
        weight_decay: of AdamW; applied only to matrices.
        betas: of AdamW.
        warmup: share of the run over which the learning rate rises.
        gradient_checkpointing: recompute activations in backward, to save memory.
        compile_blocks: compile the decoder blocks, also of the teacher (``torch.compile``). Tested in one process.
        lora: train peft's adapters on the frozen model; default: train the model.
        distillation: learn also from a teacher; default: only from the text.
        optimizer: another optimizer than AdamW, which then does not use lr, weight_decay and betas.
        lr_scheduler: another schedule of the learning rate, stepped with the optimizer.
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
        lora: LoRA | None = None,
        distillation: Distillation | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run, at least 0 and below 1, got {warmup}.")
        self.source = as_model_source(model)
        self.model: Any = None
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.lora, self.distillation = lora, distillation
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._teacher: Teacher | CachedTeacher | None = None
        self._eval_loss: MeanMetric | None = None

    def setup(self, stage: str) -> None:
        self._teacher = None  # drop that of an interrupted run, which may be on another device

    def configure_model(self) -> None:
        if self.model is None:
            if self.device_mesh is None:
                with whole_first():
                    model = self.source.load()
                    self.model = model if self.lora is None else self.lora.added_to(model)
            elif self.lora is not None:
                raise ValueError('LoRA of peft is not supported under FSDP2. Use strategy="ddp".')
            else:
                bfloat16 = self.trainer.precision == "bf16-mixed"
                self.model = load_sharded(self.source, self.device_mesh["data_parallel"], bfloat16=bfloat16)
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()

    def forward(self, **batch: Any) -> Any:
        return self.model(**{"use_cache": False, **batch})  # not set in the config, which is exported

    def on_fit_start(self) -> None:
        self._load_teacher()

    def _load_teacher(self) -> Teacher | CachedTeacher | None:
        """The teacher of the run, if it has one; loaded at the first call."""
        # Loaded from its source and not copied from the model, which is already masked and may hold weights of a
        # checkpoint; a resumed run thus has the same teacher.
        if self.distillation is not None and self._teacher is None:
            precision = str(self.trainer.precision)
            self._teacher = self.distillation.load_teacher(self.source, self.model, self._as_in_run, precision)
        return self._teacher

    def _as_in_run(self, teacher: Any) -> Any:
        """A teacher that computes where and as the model does."""
        teacher = self.trainer.precision_plugin.convert_module(teacher).to(self.device)
        autocast = AUTOCAST_OF.get(str(self.trainer.precision))
        if autocast is not None and next(self.model.parameters()).dtype == autocast:
            teacher = teacher.to(autocast)  # DeepSpeed casts the model and does not autocast
        elif autocast is not None:
            cast_linear(teacher, autocast)
        if self.compile_blocks:
            _compile_blocks(teacher)
        return teacher

    def on_train_start(self) -> None:
        if self.compile_blocks:  # not earlier, because one-shot pruning for a first mask calls blocks in other ways
            _compile_blocks(self.model)

    def on_fit_end(self) -> None:
        self._teacher = None  # not part of this module, so nothing else would free its memory
        for block in all_blocks(self.model):
            block._compiled_call_impl = None  # undo compile(), for export; torch has no public API for this

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        teacher = self._load_teacher()  # here too, as a learning rate finder trains before on_fit_start
        if self.distillation is None or teacher is None:
            loss, _ = next_token_loss(self(**inputs).logits, batch["labels"])
        else:
            taught = teacher(**inputs)  # first, before there are activations of the student
            loss, ce, kldiv = self.distillation.loss(self(**inputs).logits, taught, batch["labels"])
            self.log_dict({"train/loss_ce": ce, "train/loss_kldiv": kldiv})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        # a new one each time, because a trainer in true half precision casts what the module holds; sums need float32
        self._eval_loss = mean_over_tokens(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BLV = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, tokens = next_token_loss(logits_BLV, batch["labels"])
        assert self._eval_loss is not None
        self._eval_loss.update(loss, weight=tokens)

    def on_validation_epoch_end(self) -> None:
        assert self._eval_loss is not None
        stage, loss = "test" if self.trainer.testing else "val", self._eval_loss.compute()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp()}, prog_bar=True)
        self._eval_loss = None

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_start(self) -> None:
        self.teacher_cache()

    def teacher_cache(self) -> CachedTeacher:
        """The teacher's outputs that are kept. Raises ValueError if the run keeps none."""
        teacher = self._load_teacher()
        if not isinstance(teacher, CachedTeacher):
            raise ValueError(
                "The run keeps no outputs of a teacher. Name a folder for them (--model.distillation.cache FOLDER), in "
                "a recipe with distillation."
            )
        return teacher

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> int:
        """Ask the teacher alone, so that runs that share its cache find its answers; returns the number of tokens."""
        self.teacher_cache()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return batch["input_ids"].numel()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self._optimizer is not None:
            optimizer = self._optimizer(parameters)
        else:
            groups = [
                {"params": [p for p in parameters if dimensions(p) >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if dimensions(p) < 2], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas)
            for group in optimizer.param_groups:
                # One pass over the weights: a sixth of the time on CPUs. Set here, because Lightning refuses to clip
                # gradients for AdamW(fused=True), which it takes to unscale them itself.
                group["fused"] = True
        schedule = (self._lr_scheduler or self._warmup_and_decay)(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _warmup_and_decay(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        last = self.trainer.estimated_stepping_batches
        if not 0 <= last < math.inf:  # -1: a stream that only max_epochs ends
            raise ValueError("The learning rate decays over the whole run, so the run needs an end: set max_steps.")
        # an earlier fit of the same trainer still counts its steps
        total = last - (self.trainer.global_step if self.trainer.ckpt_path is None else 0)
        warmup_steps = max(1, int(self.warmup * total))

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # enough to build the model without its source, so that ``sparse-train export`` needs no hub
        checkpoint["model_config"] = self.model.config.to_dict()
        names = ("name", "hub_id", "license", "stages")
        checkpoint["model_source"] = {name: getattr(self.source, name) for name in names}
        checkpoint["generation_config"] = self.model.generation_config.to_dict()
        checkpoint["adapter_config"] = adapter_config(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("model_source", {}).get("name", self.source.name)
        if self._trainer and saved != self.source.name:
            rank_zero_warn(
                f"{self._trainer.ckpt_path} is of a run of {saved}, and this is one of {self.source.name}. Weights are "
                "those of the checkpoint. If this is another model, name a checkpoint of it (--ckpt_path FILE)."
            )
        # outside a sparse run (validate, load_from_checkpoint) the model is not sparsified yet
        before, in_fit = sparse_layers(self), self._trainer and self._trainer.state.fn == TrainerFn.FITTING
        if "state_dict" in checkpoint:
            sparsify_like(self, checkpoint["state_dict"])
            without_callback = in_fit and not before and bool(sparse_layers(self))
        else:  # FSDP2 and DeepSpeed have already loaded the weights, without the masks
            without_callback = not before and checkpoint.get("callbacks", {}).get(PRUNING_STATE)
        if without_callback:
            raise ValueError(
                "The checkpoint is of a sparse run, and this run has no DynamicPruning callback (in a recipe, no "
                "pruning): its masks would be lost, or never change. Add it, or export the checkpoint (sparse-train "
                "export) first."
            )


def _compile_blocks(model: nn.Module) -> None:
    for block in all_blocks(model):  # not the whole model: blocks are alike, so one compilation serves all of them
        block.compile()
