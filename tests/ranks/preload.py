"""Imported once, by the server from which the processes of tests are forked."""

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

# On CPUs DeepSpeed would compile a faster reduce in shared memory first, for minutes, and fail without a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed", "lightning", "peft", "sparse_train", "tests", "torch", "transformers"]
