"""Which data a first mask reads."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.oneshot.batches import training_batches
from sparse_train.recorder import Recorder
from tests.conftest import shallow_llama
from tests.integrations.runs import Tokens, pruning, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Four(Sampler):
    """Of a user's own."""

    def __iter__(self):
        return iter(range(4))

    def __len__(self):
        return 4


class FirstHalf(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return Four()


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        return [default_data_collator([Tokens()[0], Tokens()[1]])] * 12


class Watched(Tokens):
    def __init__(self):
        super().__init__()
        self.read = set()

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("kind", [FirstHalf, OwnLoader])
def test_a_first_mask_reads_nothing_that_a_loader_leaves_out(tmp_path, caplog, kind):
    data = Watched()
    settings = TrainingArguments(str(tmp_path), max_steps=6, report_to=[], use_cpu=True, save_strategy="no")
    run = kind(model=shallow_llama(), args=settings, train_dataset=data, callbacks=[pruning(update_freq=2)])
    run.train()
    assert data.read <= set(range(4))
    assert "no sampler of its own" in caplog.text
    assert ((run.model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_the_trainers_own_samplers_read_everything(tmp_path, strategy):
    began = pruning()
    trainer(tmp_path, began, max_steps=1, train_sampling_strategy=strategy).train()
    assert began.updater.timing.start_step == 0


class FirstBatches(BatchSampler):
    """May leave some out."""


class Skipping:
    """Of the user's own, around a batch sampler that reads everything."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return iter(self.batch_sampler)


def whole(data, kind=BatchSampler):
    return kind(SequentialSampler(data), batch_size=2, drop_last=False)


def test_only_wrappers_that_leave_nothing_out_are_looked_into():
    data = Tokens()
    share = BatchSamplerShard(whole(data), num_processes=2, process_index=1)
    found = training_batches(DataLoader(data, batch_sampler=share), 6, 2)
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 2]
    rest = SkipBatchSampler(whole(data), skip_batches=5)
    assert training_batches(DataLoader(data, batch_sampler=rest), 6, 2) is None
    assert training_batches(DataLoader(data, batch_sampler=BatchSamplerShard(rest)), 6, 2) is None
    assert training_batches(DataLoader(data, sampler=RandomSampler(range(3))), 6, 2) is None
    for other in (whole(data, FirstBatches), Skipping(whole(data))):
        assert training_batches(DataLoader(data, batch_sampler=other), 6, 2) is None


class CountsTwelve(SparseTrainerCallback):
    """Of each sequence, the first 12 tokens of 16 count."""

    def token_mask(self, inputs):
        return torch.arange(16).lt(12).expand(inputs["input_ids"].shape)


def test_an_own_token_mask_holds_for_the_first_mask_and_in_training(tmp_path, monkeypatch):
    callback, seen = CountsTwelve("2:4", update_freq=4), {False: [], True: []}

    def watched(self, x):
        seen[callback.updater is not None].append(self.token_mask)
        return self.token_mask

    monkeypatch.setattr(Recorder, "token_mask_for", watched)
    trainer(tmp_path, callback, max_steps=4).train()
    for masks in seen.values():
        assert masks and all(mask.sum() == 12 * len(mask) for mask in masks)
