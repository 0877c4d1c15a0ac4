"""Runs that go on from a checkpoint, and runs that begin again."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    default_data_collator,
)

from sparse_train import FirstWindow, Magnitude, keep_zeros, prune, sparse_layers, squash
from sparse_train.integrations import trainer_checkpoints
from sparse_train.integrations.trainer_checkpoints import STATE_FILE
from sparse_train.oneshot.batches import random_batches
from tests.conftest import shallow_llama
from tests.integrations.runs import Tokens, pruning, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "whole", pruning(squash=False), **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    stored = AutoModelForCausalLM.from_pretrained(checkpoint)  # the checkpoint is a sparse model by itself
    assert ((stored.model.layers[1].mlp.down_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()

    (tmp_path / "again").mkdir()
    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-5")
    again = trainer(tmp_path / "again", pruning(squash=False), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    pruned = ~sparse_layers(whole.model)["model.layers.0.mlp.up_proj"].unpacked_mask()
    assert whole.model.model.layers[0].mlp.up_proj.weight[pruned].any()  # shadow values were there to be compared


def test_resuming_from_another_folder(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    trainer(tmp_path / "a", pruning(), **settings).train()
    other = trainer(tmp_path / "b", pruning(), model=shallow_llama(initializer_range=0.03), seed=5, **settings)
    other.train()
    folder = str(tmp_path / "a" / "checkpoint-5")
    run = trainer(tmp_path / "b", pruning(), resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))  # unread
    run.train(resume_from_checkpoint=folder)
    assert run.state.global_step == 12
    shutil.copy(tmp_path / "b" / "checkpoint-5" / STATE_FILE, folder)
    with pytest.raises(ValueError, match="does not belong to the weights that were loaded"):
        trainer(tmp_path / "c", pruning()).train(resume_from_checkpoint=folder)


def test_the_state_of_another_step_is_refused_where_kept_weights_cannot_tell(tmp_path):
    """Under adapters of peft the weights that are pruned are frozen, and the same at each step."""

    def run(**settings):
        model = get_peft_model(shallow_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        return trainer(tmp_path, pruning(), model=model, save_strategy="steps", save_steps=4, **settings)

    run().train()
    run(max_steps=14).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    shutil.copy(tmp_path / "checkpoint-4" / STATE_FILE, tmp_path / "checkpoint-8")
    with pytest.raises(ValueError, match="written after 4 steps, and the checkpoint after 8"):
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_what_cannot_be_resumed_says_why(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    for callbacks, more in (((), {}), ((pruning(),), {"save_only_model": True})):
        trainer(tmp_path, *callbacks, **settings, **more).train()
        with pytest.raises(ValueError, match="no sparse_training_state.pt.* without SparseTrainerCallback, or with"):
            trainer(tmp_path, pruning()).train(resume_from_checkpoint=True)
        shutil.rmtree(tmp_path / "checkpoint-5")
    trainer(tmp_path, pruning(), **settings).train()
    assert (tmp_path / "checkpoint-5" / STATE_FILE).is_file()
    with pytest.raises(ValueError, match="is of a sparse run, and the Trainer has no SparseTrainerCallback"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="update_freq = 4, and this run has 3"):
        trainer(tmp_path, pruning(update_freq=3)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="in only one of them"):
        trainer(tmp_path, pruning(ignore=["re:.*down_proj"])).train(resume_from_checkpoint=True)


def test_a_folder_that_has_lost_a_file_is_refused(tmp_path):
    """Without some of them the Trainer would go on, to another result."""
    trainer(tmp_path, pruning(), save_strategy="steps", save_steps=5, max_steps=5).train()
    folder, run = tmp_path / "checkpoint-5", trainer(tmp_path, pruning())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"checkpoint-5 is not complete: {name[:9]}.* from an earlier"):
            run.train(resume_from_checkpoint=True)
        (folder / name).write_bytes(content)
    (folder / name).write_bytes(content[:100])
    with pytest.raises(ValueError, match="not complete: trainer_state.json missing or cut off"):
        run.train(resume_from_checkpoint=True)
    (folder / name).write_bytes(content)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 12


def test_masks_that_are_set_after_a_run_that_failed_are_kept(tmp_path):
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    run = trainer(tmp_path, pruning(first_mask=FirstWindow()), load_best_model_at_end=True, **settings)
    with pytest.raises(ValueError, match="or prune the model before the run"):
        run.train()
    prune(run.model, random_batches(Tokens(), 2, default_data_collator, 32), "2:4", squash=False)
    run.train()
    assert ((run.model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_an_older_checkpoint_stays_until_the_next_one_is_whole(tmp_path, monkeypatch):
    replacing, written = trainer_checkpoints.replacing, []

    def fills_the_disk(path):
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        written.append(path)
        return replacing(path)

    monkeypatch.setattr(trainer_checkpoints, "replacing", fills_the_disk)
    settings = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, pruning(), **settings).train()
    assert written == [tmp_path / "checkpoint-4" / STATE_FILE]
    monkeypatch.undo()
    run = trainer(tmp_path, pruning(), **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert run.state.global_step == 12


def test_a_trainer_that_saves_models_in_its_own_way_gets_the_state_too(tmp_path):
    class Own(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            self.model.save_pretrained(output_dir or self.args.output_dir)

    settings = {"save_strategy": "steps", "save_steps": 4}
    args = trainer(tmp_path, **settings).args
    run = Own(shallow_llama(), args, train_dataset=Tokens(), callbacks=[pruning()])
    for _ in range(2):  # into the same folder
        run.train()
        assert (tmp_path / "checkpoint-12" / STATE_FILE).is_file()
        shutil.rmtree(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("best", [False, True])
def test_a_run_on_kept_zeros_reads_its_own_checkpoints(tmp_path, best):
    model = shallow_llama()
    prune(model, None, "unstructured", 0.6, criterion=Magnitude())
    keep_zeros(model)
    settings = {"save_strategy": "steps", "save_steps": 4}
    if best:
        settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4}
    run = trainer(tmp_path, model=model, **settings)
    run.train(resume_from_checkpoint=None)
    again = trainer(tmp_path, model=model, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    squash(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert 0.59 < float((weight == 0).float().mean()) < 0.61
