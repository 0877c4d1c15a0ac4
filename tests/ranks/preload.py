"""Imported once, by the server from which the processes of tests are forked."""

import contextlib
import gc
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import lightning
import peft
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
import transformers.trainer

import sparse_train.callbacks
import sparse_train.cli.export
import sparse_train.cli.lightning_cli
import sparse_train.cli.prune
import sparse_train.integrations.transformers
import sparse_train.oneshot
import tests.conftest
import tests.integrations.runs

# What an engine imports when it starts, two seconds of it in each process; newer versions may have it elsewhere.
for name in (
    "deepspeed.compile.backend",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.distributed.checkpoint",
    "torch.profiler",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

# On CPUs DeepSpeed would compile a faster reduce in shared memory first, for minutes, and fail without a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

gc.freeze()  # ZeRO-3 calls gc.collect, which would walk through all of this in each process

__all__ = ["deepspeed", "lightning", "peft", "sparse_train", "tests", "torch", "transformers"]
