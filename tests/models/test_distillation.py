"""Runs with a teacher beside a model being pruned."""

import copy
import math
import shutil
from contextlib import nullcontext
from functools import partial

import lightning as L
import pytest
import torch

from sparse_train import Magnitude, prune, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.data.texts import TextFiles
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.distillation import CachedTeacher, Distillation, Teacher, cast_linear, digest
from sparse_train.models.losses import top_k
from sparse_train.models.sources import Pretrained
from tests.conftest import shallow_llama, tiny_tokenizer
from tests.faults.disks import FULL, failing
from tests.models.test_causal_lm import fit
from tests.reference import distillation_losses

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hardness_ce": -1}, "hardness_ce is the weight of a loss, at least 0 and finite, got -1"),
        ({"hardness_kldiv": math.nan}, "hardness_kldiv must be above 0 and finite, got nan"),
        ({"hardness_kldiv": 0}, "leave distillation out"),
        ({"temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"cache": "x", "top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_mistakes_are_found_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)


def test_a_teacher_is_frozen_and_in_eval_mode(ids):
    teacher = Teacher(shallow_llama(attention_dropout=0.5).train())
    first, second = (teacher(input_ids=ids[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_weights_that_are_cast_ahead_compute_the_same_under_autocast(ids):
    model = shallow_llama()  # its embeddings are tied
    with torch.autocast("cpu", torch.bfloat16):
        before = Teacher(model)(input_ids=ids[0])
        cast_linear(model, torch.bfloat16)
        assert torch.equal(Teacher(model)(input_ids=ids[0]), before)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.model.embed_tokens.weight.dtype == torch.float32


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(model_folder, text_file):
    files = [str(text_file)]
    return lambda: TextBlocks(
        str(model_folder),
        TextFiles(train=files, validation=files),
        block_size=32,
        batch_size=4,
        max_validation_blocks=6,
    )


class Watch(L.Callback):
    """Looks at a run from inside: the teacher and what is logged, at each step."""

    def __init__(self):
        self.teachers, self.metrics, self.batches, self.tokens = [], [], [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch
        self.batches.append(batch)
        self.tokens += int(batch["attention_mask"].sum())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.teachers.append(pl_module._teacher)
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


class Interrupt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


class ExactAfterEveryStep(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        layers = sparse_layers(pl_module)
        assert len(layers) == 14
        assert all((layer.unpacked_mask().reshape(-1, 4).sum(1) == 2).all() for layer in layers.values())


def test_the_teacher_stays_the_dense_model_and_outside_the_student(model_folder, data, tmp_path):
    module = CausalLM(str(model_folder), lr=1e-2, distillation=Distillation())
    watch, pruning = Watch(), DynamicPruning("2:4", update_freq=4)
    inside = {}

    class Inside(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                inside["parameters"] = len(list(pl_module.parameters()))
                inside["optimized"] = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)

    fit(module, data(), pruning, ExactAfterEveryStep(), watch, Inside())

    start = shallow_llama()
    parameters = len(list(start.parameters()))
    assert inside == {"parameters": parameters, "optimized": parameters}
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=False)
    names = {f"model.{name}" for name in start.state_dict()}
    assert {name for name in checkpoint["state_dict"] if not name.endswith("weight_mask")} == names

    (teacher,) = set(watch.teachers)
    assert isinstance(teacher, Teacher)
    assert not sparse_layers(teacher.model)
    assert not any(each.training for each in teacher.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name
    assert not torch.equal(module.model.model.norm.weight, start.model.norm.weight)
    weight = module.model.model.layers[1].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert module._teacher is None  # given back


def test_activations_of_the_teacher_do_not_count(model_folder, data):
    counted = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            counted.append(max(int(layer.statistics.tokens) for layer in sparse_layers(pl_module).values()))

    watch = Watch()
    module = CausalLM(str(model_folder), distillation=Distillation())
    fit(
        module,
        data(),
        DynamicPruning("2:4", update_freq=100, window=100, end_step=100, norm_decay=0.0),
        watch,
        Count(),
        max_steps=3,
    )
    assert counted[-1] == watch.tokens == 3 * 4 * 32


@pytest.mark.parametrize("at", [6, 8], ids=["in a window", "at an update"])
def test_resumed_equals_uninterrupted_bit_for_bit(model_folder, data, tmp_path, at):
    def run(*callbacks, **settings):
        module = CausalLM(str(model_folder), lr=3e-3, distillation=Distillation())
        watch = Watch()
        fit(module, data(), DynamicPruning("2:4", update_freq=4, squash=False), watch, *callbacks, **settings)
        return module, watch

    whole, whole_watch = run()
    with pytest.raises(SystemExit):
        run(Interrupt(at, tmp_path / "middle.ckpt"))
    resumed, resumed_watch = run(ckpt_path=tmp_path / "middle.ckpt")
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert any(key.endswith("weight_mask") for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert resumed_watch.metrics[-1] == whole_watch.metrics[-1]
    dense = shallow_llama().state_dict()
    taught = resumed_watch.teachers[0].model.state_dict()
    assert all(torch.equal(taught[key], dense[key]) for key in dense)


def test_a_sparse_checkpoint_trained_further_learns_from_the_dense_model(model_folder, data, tmp_path):
    settings = {"distillation": Distillation()}
    trainer = fit(CausalLM(str(model_folder), **settings), data(), DynamicPruning("2:4", squash=False), max_steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", model=str(model_folder), weights_only=False, **settings)
    assert module._teacher is None
    watch = Watch()
    fit(module, data(), DynamicPruning("2:4"), watch, max_steps=2)
    taught, dense = watch.teachers[0].model.state_dict(), shallow_llama().state_dict()
    assert all(torch.equal(taught[key], dense[key]) for key in dense)


def test_a_run_after_an_interrupted_one_gets_a_teacher_of_its_own(model_folder, data, tmp_path):
    module, watch = CausalLM(str(model_folder), distillation=Distillation()), Watch()
    with pytest.raises(SystemExit):
        fit(module, data(), watch, Interrupt(2, tmp_path / "x.ckpt"))
    fit(module, data(), watch, precision="bf16-true", max_steps=2)
    first, second = watch.teachers[0].model, watch.teachers[-1].model
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_teacher_computes_as_the_student_does(model_folder, data, precision):
    module, watch = CausalLM(str(model_folder), distillation=Distillation()), Watch()
    fit(module, data(), watch, precision=precision, max_steps=2)
    first, second = watch.metrics
    assert first["train/loss_kldiv"] == pytest.approx(0, abs=1e-6)  # nothing is pruned or trained yet
    assert second["train/loss_kldiv"] > 1e-6
    teacher = watch.teachers[0].model
    assert teacher.model.layers[0].mlp.up_proj.weight.dtype == (torch.float32 if "32" in precision else torch.bfloat16)
    assert teacher.model.norm.weight.dtype == (torch.bfloat16 if "true" in precision[4:] else torch.float32)


def test_what_is_logged(model_folder, data):
    weights = {"hardness_ce": 0.5, "hardness_kldiv": 2.0, "temperature": 2.0}
    module, watch = CausalLM(str(model_folder), distillation=Distillation(**weights)), Watch()
    trainer = fit(module, data(), DynamicPruning("2:4", update_freq=4), watch, max_steps=6)
    for metrics in watch.metrics:
        terms = [metrics[f"train/loss_{name}"] for name in ("ce", "kldiv")]
        assert all(term > 0 for term in terms)
        assert metrics["train/loss"] == pytest.approx(0.5 * terms[0] + 2.0 * terms[1], rel=1e-5)
    plain = CausalLM(str(model_folder))
    plain.model = copy.deepcopy(module.model)
    expected = trainer.validate(plain, data(), verbose=False)[0]
    assert trainer.validate(module, data(), verbose=False)[0] == expected
    assert module._teacher is None  # evaluation needs none


def test_another_teacher_is_named_by_its_source(model_folder, data, tmp_path):
    other = shallow_llama()
    for parameter in other.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    source = str(tmp_path / "other")
    module, watch = CausalLM(str(model_folder), distillation=Distillation(source, temperature=2.0)), Watch()
    assert module.distillation.teacher == Pretrained(source)
    fit(module, data(), watch, max_steps=1)
    with torch.no_grad():
        student, teacher = (
            model.eval()(input_ids=watch.batch["input_ids"]).logits for model in (shallow_llama(), other)
        )
    expected = distillation_losses(student, teacher, watch.batch["labels"], 2.0)
    logged = [watch.metrics[0][f"train/loss_{name}"] for name in ("ce", "kldiv")]
    assert logged == pytest.approx([loss.item() for loss in expected], rel=1e-4)


def test_a_learning_rate_finder_in_front_has_the_teacher_too(model_folder, data):
    finder = L.pytorch.callbacks.LearningRateFinder(num_training_steps=6)
    module, watch = CausalLM(str(model_folder), distillation=Distillation()), Watch()
    fit(module, data(), finder, DynamicPruning("2:4", update_freq=4), watch)
    assert len(set(watch.teachers)) == 1


def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(model_folder, data, tmp_path):
    shallow_llama(vocab_size=160).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    module, watch = CausalLM(str(model_folder), distillation=Distillation(str(tmp_path / "other"))), Watch()
    with pytest.raises(ValueError, match="a vocab_size of 160 and the student .* one of 128"):
        fit(module, data(), watch)
    assert not watch.metrics


def test_a_model_that_was_pruned_before_does_not_teach_itself(data, tmp_path):
    model = shallow_llama()
    prune(model, mask_structure="2:4", criterion=Magnitude())
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    watch = Watch()
    with pytest.raises(ValueError, match=r"was pruned before \(14 of its layers\), so it would teach itself"):
        fit(CausalLM(str(tmp_path), distillation=Distillation()), data(), watch)
    assert not watch.metrics


def test_logits_need_no_teacher_of_the_same_shape(model_folder, data, tmp_path):
    shallow_llama(num_hidden_layers=4, hidden_size=64).save_pretrained(tmp_path / "larger")
    module, watch = CausalLM(str(model_folder), distillation=Distillation(str(tmp_path / "larger"))), Watch()
    fit(module, data(), watch, max_steps=2)
    assert watch.metrics[-1]["train/loss_kldiv"] > 0


# --- Cached teachers -------------------------------------------------------------------------------------------------


def cached_run(model_folder, data, tmp_path, monkeypatch, precision="bf16-mixed", **settings):
    """The losses of a run, and how many batches its teacher saw."""
    asked = []
    monkeypatch.setattr(Teacher, "__call__", counted(Teacher.__call__, asked))
    distillation = Distillation(cache=str(tmp_path / "cache"), **{"top_k": 8, **settings})
    module, watch = CausalLM(str(model_folder), lr=1e-2, distillation=distillation), Watch()
    fit(module, data(), DynamicPruning("2:4", update_freq=4), watch, max_steps=6, precision=precision)
    monkeypatch.undo()
    return [step["train/loss"] for step in watch.metrics], asked, watch


def counted(call, asked):
    def counting(self, **inputs):
        asked.append(len(inputs["input_ids"]))
        return call(self, **inputs)

    return counting


def test_a_second_run_reads_what_the_first_one_asked(model_folder, data, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    run = partial(cached_run, folder, data, tmp_path, monkeypatch)
    first, asked, watch = run()
    assert sum(asked) == len({tuple(row.tolist()) for batch in watch.batches for row in batch["input_ids"]})
    second, asked, watch = run()
    assert second == first and not asked
    assert watch.teachers[0]._teacher is None  # it is not in memory
    _, asked, _ = run(temperature=2.0)
    assert asked  # another temperature has entries of its own
    other = shallow_llama()
    other.model.norm.weight.data += 0.1
    other.save_pretrained(folder)  # another model under the same name
    third, asked, _ = run()
    assert asked and third != first


def test_what_was_asked_in_an_interrupted_run_is_not_asked_again(model_folder, data, tmp_path, monkeypatch):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    asked = []
    monkeypatch.setattr(Teacher, "__call__", counted(Teacher.__call__, asked))
    for callback in (Stop(), L.Callback()):
        module = CausalLM(str(model_folder), distillation=Distillation(cache=str(tmp_path / "cache"), top_k=8))
        with pytest.raises((KeyboardInterrupt, SystemExit)) if isinstance(callback, Stop) else nullcontext():
            fit(module, data(), callback, max_steps=2)
    assert len(asked) == 2


def test_a_cache_that_is_filled_before_serves_the_run(model_folder, data, tmp_path, monkeypatch):
    text, distillation = data(), Distillation(cache=str(tmp_path / "cache"), top_k=8)
    trainer = L.Trainer(accelerator="cpu", logger=False, limit_predict_batches=6, precision="bf16-mixed")
    trainer.predict(CausalLM(str(model_folder), distillation=distillation), datamodule=text)
    filled = cached_run(model_folder, data, tmp_path, monkeypatch)
    assert not filled[1]
    shutil.rmtree(tmp_path / "cache")
    assert cached_run(model_folder, data, tmp_path, monkeypatch)[0] == filled[0]
    with pytest.raises(ValueError, match="keeps no outputs of a teacher"):
        trainer.predict(CausalLM(str(model_folder), distillation=Distillation()), datamodule=text)


def test_teachers_of_one_cache_have_the_same_weights_and_compute_alike():
    teacher = shallow_llama()
    moved, other, trained = (copy.deepcopy(teacher) for _ in range(3))
    moved.config._name_or_path, moved.config.use_cache = "elsewhere", False
    other.config.rms_norm_eps = 0.1
    with torch.no_grad():
        next(trained.parameters())[0, 0] += 1
    assert digest(moved) == digest(teacher)
    assert len({digest(each) for each in (teacher, other, trained)}) == 3


def test_with_all_tokens_a_cache_changes_nothing(model_folder, data, tmp_path, monkeypatch):
    cached, _, _ = cached_run(model_folder, data, tmp_path, monkeypatch, "32-true", top_k=128)
    module, watch = CausalLM(str(model_folder), lr=1e-2, distillation=Distillation()), Watch()
    fit(module, data(), DynamicPruning("2:4", update_freq=4), watch, max_steps=6)
    assert cached == pytest.approx([step["train/loss"] for step in watch.metrics], rel=1e-3)


def test_a_cache_is_found_by_content_and_padding(tmp_path, ids):
    """In any order and batch size; the same tokens under another mask are another block."""
    model, asked = shallow_llama(), []

    def load():
        asked.append(True)
        return Teacher(model)

    inputs, masks = torch.cat(list(ids)), torch.ones_like(torch.cat(list(ids)))
    masks[0, -2:] = 0
    cache = CachedTeacher(tmp_path, load, k=4, temperature=1.0)
    whole = cache(input_ids=inputs, attention_mask=masks)
    again = CachedTeacher(tmp_path, load, k=4, temperature=1.0)
    rows = torch.arange(len(inputs)).flip(0)
    for one, row in zip(rows.split(1), rows, strict=True):
        found = again(input_ids=inputs[one], attention_mask=masks[one])
        assert all(torch.equal(part[0], of_all[row]) for part, of_all in zip(found, whole, strict=True))
    assert len(asked) == 1
    again(input_ids=inputs[:1], attention_mask=torch.ones_like(masks[:1]))
    assert len(asked) == 2
    expected = top_k(Teacher(model)(input_ids=inputs, attention_mask=masks), 4)
    for ours, theirs in zip(whole, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_runs_may_share_a_cache_and_a_damaged_file_is_named(tmp_path, ids):
    inputs = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])}
    caches = [CachedTeacher(tmp_path, lambda: Teacher(shallow_llama()), k=4, temperature=1.0) for _ in range(2)]
    first, second = (cache(**inputs) for cache in caches)
    assert all(map(torch.equal, first, second))
    files = list(tmp_path.iterdir())
    assert len(files) == len(ids[0]) and all(file.suffix == ".safetensors" for file in files)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{files[0].name}.*remove it, and it is made anew"):
        caches[0](**inputs)


def test_an_answer_that_does_not_fit_on_the_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, ids):
    monkeypatch.chdir(tmp_path)
    cache = CachedTeacher(tmp_path, lambda: Teacher(shallow_llama()), k=4, temperature=1.0)
    with failing(2, FULL), pytest.raises(OSError, match="safetensors could not be written: .*No space left"):
        cache(input_ids=ids[0], attention_mask=torch.ones_like(ids[0]))
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
