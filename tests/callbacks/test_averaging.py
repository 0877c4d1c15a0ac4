"""Weight averaging of Lightning: the averaged model is as sparse as the model in training."""

import lightning as L
import pytest
import torch

from sparse_train import IHT, Fixed, OneShot, sparse_layers
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import InConfigureModel, InInit, loader, trainer, zeros

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class WithSetup(InInit):
    """Lightning copies it before this hook, after which it gets masks."""

    def setup(self, stage):
        pass


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("module", [InInit, InConfigureModel, WithSetup])
def test_averaged_weights_are_sparse_too(tmp_path, module, first):
    seen = []

    class Validated(module):
        def validation_step(self, batch, batch_idx):  # which sees the averaged model
            if self.trainer.global_step:
                seen.append(max(int(m.unpacked_mask().view(-1, 4).sum(1).max()) for m in sparse_layers(self).values()))
                seen.append(squashed_zeros(self))

    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5)
    model, pruning = Validated(), DynamicPruning("2:4", update_freq=4, squash=False)
    callbacks = (pruning, averaging) if first else (averaging, pruning)
    run = trainer(tmp_path, *callbacks, val_check_interval=4, limit_val_batches=1)
    run.fit(model, loader(), loader())
    assert set(seen) == {2, 0.5}
    masks = {name: layer.weight_mask for name, layer in sparse_layers(model).items()}
    averaged = {name: layer.weight_mask for name, layer in sparse_layers(averaging._average_model.module).items()}
    assert all(torch.equal(mask, averaged[name]) for name, mask in masks.items())
    assert len(masks) == len(averaged) == 14

    model, pruning = module(), DynamicPruning("2:4", update_freq=4)
    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5)
    trainer(tmp_path, pruning, averaging).fit(model, loader())
    assert zeros(model) == 0.5


@pytest.mark.parametrize("settings", [{"update_starting_at_step": 100}, {"update_every_n_steps": 13}])
def test_an_average_that_is_older_than_the_masks_has_them_too(tmp_path, settings):
    """Lightning copies masks only together with weights."""
    seen = []

    class Validated(InInit):
        def validation_step(self, batch, batch_idx):
            seen.append(squashed_zeros(self))

    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5, **settings)
    model, pruning = Validated(), DynamicPruning("2:4", update_freq=4)
    run = trainer(tmp_path, pruning, averaging, val_check_interval=4, limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(model, loader(), loader())
    assert len(seen) >= 3 and set(seen) == {0.5}
    assert zeros(model) == 0.5


def test_an_average_begins_with_the_weights_of_a_solved_first_mask(tmp_path):
    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5, update_starting_at_step=100)
    model, pruning = InInit(), DynamicPruning("2:4", first_mask=OneShot(IHT()), policy=Fixed(), squash=False)
    begun = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            begun.update(begun or {n: layer.masked_weight() for n, layer in sparse_layers(pl_module).items()})

    trainer(tmp_path, pruning, averaging, Look(), max_steps=2).fit(model, loader())
    averaged = sparse_layers(averaging._average_model.module)
    assert begun and all(torch.equal(averaged[name].masked_weight(), weight) for name, weight in begun.items())


def squashed_zeros(module):
    found = [layer.masked_weight() == 0 for layer in sparse_layers(module).values()]
    return sum(int(each.sum()) for each in found) / sum(each.numel() for each in found)


def test_averaging_that_would_spoil_masks_says_what_to_do(tmp_path):
    averaging = L.pytorch.callbacks.EMAWeightAveraging()
    with pytest.raises(ValueError, match="average the bytes of the masks. Give it use_buffers=False"):
        trainer(tmp_path, DynamicPruning("2:4"), averaging).fit(InInit(), loader())
