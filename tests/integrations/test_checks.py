"""What a ``Trainer`` is refused."""

import pytest

from sparse_train import Cubic, FirstWindow, Regrow, sparse_layers
from sparse_train.integrations.transformers import SparseTrainerCallback
from tests.integrations.runs import pruning, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    "changes",
    [{"schedule": Cubic(final_sparsity=0.5)}, {"start_step": 4}, {"first_mask": FirstWindow()}],
    ids=["gradual", "later start", "the first steps run dense"],
)
def test_the_best_model_is_refused_where_it_would_be_a_denser_one(tmp_path, changes):
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    with pytest.raises(ValueError, match="would load an earlier checkpoint"):
        trainer(tmp_path, pruning(**changes), load_best_model_at_end=True, **settings).train()


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed_plugin", "_n_gpu"])
def test_engines_whose_checkpoints_it_cannot_follow_are_refused(tmp_path, engine):
    run = trainer(tmp_path)
    setattr(run.args, engine, 2)
    with pytest.raises(ValueError, match="FSDP or DeepSpeed.*DataParallel"):
        pruning().on_init_end(run.args, run.state, run.control, model=run.model)


def test_a_run_that_would_begin_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set a smaller per_device_train_batch_size"):
        trainer(tmp_path, pruning(), auto_find_batch_size=True)


@pytest.mark.parametrize("option", ["use_vllm", "sync_ref_model"])
def test_copies_of_the_weights_without_their_masks_are_refused(tmp_path, option):
    run = trainer(tmp_path)
    setattr(run.args, option, True)  # of TRL's arguments
    with pytest.raises(ValueError, match=f"{option}=True copies the model's weights without the masks"):
        pruning().on_init_end(run.args, run.state, run.control, model=run.model)


def test_a_second_callback_is_refused(tmp_path):
    run = trainer(tmp_path, pruning(targets=["re:.*self_attn.*"]))
    run.add_callback(pruning(targets=["re:.*mlp.*"]))
    with pytest.raises(ValueError, match="has 2 SparseTrainerCallbacks"):
        run.train()


def test_a_policy_that_reads_gradients_is_refused():
    with pytest.raises(ValueError, match="before clipping, where the Trainer has no hook for "):
        SparseTrainerCallback("2:4", policy=Regrow())


def test_checkpoints_that_callbacks_are_not_told_of_are_refused(tmp_path):
    run = trainer(tmp_path)
    run.args.enable_jit_checkpoint = True  # as an argument it would handle SIGTERM from here on
    with pytest.raises(ValueError, match='enable_jit_checkpoint.*Leave it out, and save .* save_strategy="steps"'):
        pruning().on_init_end(run.args, run.state, run.control, model=run.model)


def test_what_is_refused_is_also_refused_of_a_callback_that_is_added_later(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.add_callback(pruning())
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="runs on FSDP or DeepSpeed"):
            run.train()
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    best = trainer(tmp_path, load_best_model_at_end=True, **settings)
    best.add_callback(pruning(start_step=4))
    with pytest.raises(ValueError, match="would load an earlier checkpoint"):
        best.train()


def test_a_callback_that_is_added_later_prunes(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(pruning(squash=False))
    run.train()
    assert len(sparse_layers(run.model)) == 14
    for layer in sparse_layers(run.model).values():
        assert (layer.unpacked_mask().reshape(-1, 4).sum(1) == 2).all()
