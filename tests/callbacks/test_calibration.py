"""Which data a first mask is calibrated on: never what a loader leaves out."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SubsetRandomSampler, get_worker_info

from sparse_train import FirstWindow
from sparse_train.callbacks import DynamicPruning
from sparse_train.oneshot.batches import random_batches
from sparse_train.recorder import Recorder
from tests.callbacks.runs import InInit, Tokens, loader, trainer
from tests.callbacks.test_first_mask import Start

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Watched(Tokens):
    def __init__(self):
        super().__init__()
        self.touched = set()

    def __getitem__(self, i):
        self.touched.add(int(i))
        return super().__getitem__(i)


class Pairs(Sampler):
    """Of a user's own: batches of the first twenty."""

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 20, 2)])

    def __len__(self):
        return 10


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Tokens()[i] for i in range(20)])


class With(L.LightningDataModule):
    def __init__(self, calibration):
        super().__init__()
        self.calibration = calibration

    def train_dataloader(self):
        return loader()

    def calibration_dataloader(self):
        return self.calibration


def first_update(folder, data):
    pruning = DynamicPruning("2:4", update_freq=4)
    trainer(folder, pruning, max_steps=8).fit(InInit(), data)
    return pruning.updater.timing.start_step


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"batch_size": 2, "sampler": SubsetRandomSampler(range(20))}, 0),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(20)), 2, drop_last=False)}, 0),
        ({"batch_sampler": Pairs()}, 2),  # from the first window
    ],
)
def test_what_a_sampler_leaves_out_is_left_out(settings, first, tmp_path):
    data = Watched()
    assert first_update(tmp_path, DataLoader(data, **settings)) == first
    assert data.touched <= set(range(20))


def test_a_plain_loader_is_calibrated_on_whatever_its_batches_are_made_by(tmp_path):
    assert first_update(tmp_path, DataLoader(Tokens(), batch_sampler=BatchSampler(range(40), 2, False))) == 2
    plain = BatchSampler(torch.utils.data.SequentialSampler(Tokens()), 2, drop_last=False)
    assert first_update(tmp_path, DataLoader(Tokens(), batch_sampler=plain)) == 0


def test_a_loader_for_calibration_is_taken_as_it_is(tmp_path):
    data = Watched()
    assert first_update(tmp_path, With(DataLoader(data, batch_size=2, sampler=SubsetRandomSampler(range(4))))) == 0
    assert data.touched == set(range(4))
    assert first_update(tmp_path, With(DataLoader(Stream(), batch_size=2))) == 0
    assert first_update(tmp_path, With([Tokens()[i]["input_ids"][None] for i in range(8)])) == 0


def test_its_random_numbers_are_its_own(tmp_path):
    state = torch.get_rng_state()
    calibration = DataLoader(Tokens(), batch_size=2, shuffle=True)
    trainer(tmp_path, DynamicPruning("2:4"), max_steps=1).fit(InInit(), With(calibration))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    trainer(tmp_path, DynamicPruning("2:4", first_mask=FirstWindow()), max_steps=1).fit(InInit(), With(None))
    assert torch.equal(torch.get_rng_state(), after)


def test_a_loader_that_no_model_could_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Calibration data is .* This has a list"):
        first_update(tmp_path, With([[1, 2]]))


class Unmarked(Tokens):
    """Padding is 0 among the ids, and no mask says so."""

    def __getitem__(self, i):
        return {"input_ids": self.ids[i] * self.mask[i], "labels": self.ids[i]}


class Marked(Unmarked):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "attention_mask": self.mask[i]}


class CountsIds(DynamicPruning):
    def token_mask(self, batch):
        assert super().token_mask(batch) is None
        return batch["input_ids"] != 0


class MarksOnTransfer(InInit):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def test_the_first_mask_counts_the_tokens_that_training_counts(tmp_path):
    def first_mask(data, module=InInit):
        callback, start = DynamicPruning("2:4", update_freq=4, squash=False), Start()
        trainer(tmp_path, callback, start, max_steps=1).fit(module(), DataLoader(data, batch_size=2))
        return torch.cat([mask.flatten() for mask in start.masks.values()])

    marked = first_mask(Marked(padded=True))
    assert not torch.equal(first_mask(Unmarked(padded=True)), marked)
    assert torch.equal(first_mask(Unmarked(padded=True), module=MarksOnTransfer), marked)


def test_an_own_token_mask_holds_for_the_first_mask(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Recorder, "token_mask_for", lambda self, x: seen.append(self.token_mask) or self.token_mask)
    trainer(tmp_path, CountsIds("2:4", update_freq=4), max_steps=1).fit(
        InInit(), DataLoader(Unmarked(padded=True), batch_size=2)
    )
    assert seen and all(mask.shape == (2, 16) and mask.sum() == 24 for mask in seen)


class FilledInWorkers(Tokens):
    def __init__(self):
        super().__init__()
        self.kept, self.ids = self.ids, None

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}

    def __len__(self):
        return 40


def fill(_):
    data = get_worker_info().dataset
    data.ids = data.kept


def test_a_data_set_that_workers_read_is_read_by_a_worker(tmp_path):
    """Here it would have no ids; one that opens a file when it is first read would share it with the workers."""
    data = DataLoader(FilledInWorkers(), batch_size=2, shuffle=True, num_workers=2, worker_init_fn=fill)
    assert first_update(tmp_path, data) == 0


class Drawing(Tokens):
    """Augments, with all three generators."""

    def __getitem__(self, i):
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(i)


def test_calibration_on_a_data_set_takes_random_samples():
    found = torch.cat([batch["input_ids"] for batch in random_batches(Tokens(), 2, None, 6)])
    assert not torch.equal(found, Tokens().ids[:6])


def test_reading_for_calibration_moves_no_generator():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    assert len(random_batches(Drawing(), 2, None, 6)) == 3
    assert states() == before
