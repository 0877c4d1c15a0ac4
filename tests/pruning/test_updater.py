"""``MaskUpdater`` over a run."""

import copy
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_train import (
    NM,
    RIA,
    Criterion,
    Fixed,
    FromZeros,
    Magnitude,
    MaskUpdater,
    Regrow,
    StraightThrough,
    Unstructured,
    Wanda,
    prune,
    sparse_layers,
    squash,
)
from sparse_train.layers.masked_layer import SparseLinear
from sparse_train.layers.sparsify import sparsify
from sparse_train.pruning.update import Rules, update_masks
from sparse_train.recorder import Recorder
from sparse_train.schedules import Cubic, Linear, Schedule
from sparse_train.statistics import ActivationNorm
from tests.conftest import VOCABULARY, shallow_llama
from tests.pruning.loops import equal, snapshot, train
from tests.reference import row_mask


@pytest.mark.parametrize(
    ("structure", "sparsity"), [("2:4", None), ("1:4", None), ("4:8", None), ("unstructured", 0.6)]
)
def test_dynamic_masks_change_and_stay_exact(structure, sparsity):
    model = shallow_llama()
    updater = MaskUpdater(model, structure, sparsity=sparsity, update_freq=4, total_steps=20)
    began = time.perf_counter()
    reports = train(model, updater, 2)
    first = {name: layer.unpacked_mask() for name, layer in updater.layers.items()}
    reports += train(model, updater, 18, seed=1)
    assert 0 < sum(report.seconds for report in reports) < time.perf_counter() - began
    assert [report.step for report in reports] == [2, 6, 10, 14, 15]
    assert all(report.flip_rate > 0 for report in reports)
    assert reports[0].initial_flip_rate == 0
    flips = [(first[n] ^ m.unpacked_mask())[:: m.out_features // 4] for n, m in updater.layers.items()]  # of four rows
    differing = sum(rows.double().mean() * first[n].numel() for n, rows in zip(first, flips, strict=True))
    assert reports[-1].initial_flip_rate == pytest.approx(differing / sum(mask.numel() for mask in first.values()))
    assert reports[-1].initial_flip_rate > 0
    for report in reports:
        weights = [layer.masked_weight() for layer in sparse_layers(model).values()]
        counted = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert report.sparsity == pytest.approx(counted)
    frozen = {n: m.weight_mask.clone() for n, m in sparse_layers(model).items()}
    assert train(model, updater, 10) == []
    assert all(torch.equal(frozen[n], m.weight_mask) for n, m in sparse_layers(model).items())


@dataclass(frozen=True)
class Pull(Criterion):
    """Reads all that a criterion can look at, row by row."""

    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def scores(self, layer):
        momentum_OI = layer.optimizer_state.get("exp_avg", torch.zeros_like(layer.weight_OI))
        return (layer.weight_OI.abs() + momentum_OI.abs() + layer.keep_OI) * layer.norm_I


@pytest.mark.parametrize(
    ("structure", "sparsity", "options"),
    [
        ("2:4", None, {}),
        ("unstructured", 0.6, {"criterion": Pull()}),
        ("unstructured", None, {"policy": Fixed(), "schedule": Linear(0.6)}),
        ("unstructured", 0.6, {"criterion": RIA()}),
        ("2:4", None, {"policy": Regrow(0.3)}),
    ],
)
def test_masks_are_the_same_row_by_row(structure, sparsity, options, monkeypatch):
    """Where rows need nothing from each other, a layer is chosen in blocks of rows; small ones are one block."""

    def run():
        model = shallow_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        updater = MaskUpdater(model, structure, sparsity=sparsity, update_freq=4, total_steps=8, **options)
        return model, [report.layers for report in train(model, updater, 8, optimizer)]

    whole, reports = run()
    monkeypatch.setattr("sparse_train.selection.CHUNK", 1)
    in_rows, reports_in_rows = run()
    assert equal(snapshot(whole), snapshot(in_rows))
    assert reports == reports_in_rows


@pytest.mark.parametrize("together", [1, 700, 1 << 24])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_masks_and_counts_are_the_same_in_two_threads(pattern, together, monkeypatch):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(8, 10), nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight[3:9] = model[0].weight[3:9].round(decimals=1)  # ties and zeros
    sparsify(model, list(model))
    layers = dict(model.named_children())
    for layer in model:
        layer.statistics = ActivationNorm(layer.in_features)
        layer.statistics.add(torch.randn(8, layer.in_features))

    def update():
        for layer in model:
            layer.keep_all()
        found = update_masks(layers, Rules(Wanda(), pattern, dict.fromkeys(layers, 0.5)))
        return found, [layer.weight_mask.clone() for layer in model]

    report, masks = update()
    monkeypatch.setattr("sparse_train.selection.CHUNK", 80)
    monkeypatch.setattr("sparse_train.pruning.update.PORTION", together)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, own = update()
    finally:
        torch.set_num_threads(threads)
    assert found == report and all(map(torch.equal, own, masks))


def test_a_report_before_the_first_mask_is_not_taken_for_it():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=20)
    assert updater.report().initial_flip_rate == 0
    assert train(model, updater, 4)[0].initial_flip_rate == 0


def test_masks_are_the_papers_on_the_recorded_activations():
    model = shallow_llama(num_hidden_layers=1)
    seen: dict[str, list] = {}
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    updater = MaskUpdater(model, "unstructured", sparsity=0.5, update_freq=4, window=2, start_step=4, end_step=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, 5):
        batch = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = updater.step()
        assert (report is not None) == (step == 4)
    for name, layer in sparse_layers(model).items():
        inputs = torch.cat([x.detach().reshape(-1, layer.in_features) for x in seen[name][-2:]])  # the window: 2 steps
        scores = layer.weight.detach().abs() * inputs.square().sum(0).sqrt()
        assert torch.equal(layer.unpacked_mask(), row_mask(scores, 0.5))


def test_fixed_with_a_constant_schedule_never_changes():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", policy=Fixed(), criterion=Magnitude(), update_freq=2, total_steps=20)
    before = {n: m.weight_mask.clone() for n, m in sparse_layers(model).items()}
    shadow = {n: m.weight.detach()[~m.unpacked_mask()].clone() for n, m in sparse_layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    reports = train(model, updater, 20, optimizer)
    assert [report.step for report in reports] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert {report.flip_rate for report in reports} == {report.initial_flip_rate for report in reports} == {0}
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight_mask, before[name])
        assert torch.equal(layer.weight.detach()[~layer.unpacked_mask()], shadow[name])  # and no gradient came


@pytest.mark.parametrize("criterion", [Wanda(), Magnitude()])
def test_fixed_with_a_rising_schedule_only_loses_weights(criterion):
    model = shallow_llama()
    updater = MaskUpdater(
        model, "unstructured", policy=Fixed(), schedule=Cubic(0.7), criterion=criterion, update_freq=3, total_steps=20
    )
    pruned = {n: ~m.unpacked_mask() for n, m in sparse_layers(model).items()}
    rates = []
    for _ in range(20):
        reports = train(model, updater, 1)
        rates += [report.sparsity for report in reports]
        for name, layer in sparse_layers(model).items():
            now = ~layer.unpacked_mask()
            assert (now | ~pruned[name]).all()
            pruned[name] = now
    assert rates == sorted(rates)
    assert rates[0] < 0.6 < rates[-1]


class Falling(Schedule):
    def sparsity(self, progress):
        return 0.75 - 0.25 * progress


def test_fixed_brings_nothing_back_where_a_users_schedule_falls():
    model = shallow_llama()
    updater = MaskUpdater(
        model, "unstructured", schedule=Falling(), policy=Fixed(), criterion=Magnitude(), update_freq=2, total_steps=20
    )
    before = {name: layer.weight_mask.clone() for name, layer in updater.layers.items()}
    assert all(report.flip_rate == 0 for report in train(model, updater, 20))
    assert all(torch.equal(layer.weight_mask, before[name]) for name, layer in updater.layers.items())


def test_a_rising_n_of_m_schedule_steps_through_kept_counts():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", schedule=Linear(0.5), update_freq=2, total_steps=20, end_step=1.0)
    sparsities = [report.sparsity for report in train(model, updater, 20)]
    assert sorted(set(sparsities)) == [0.0, 0.25, 0.5]
    assert sparsities == sorted(sparsities)
    with pytest.raises(ValueError, match="2:4 is a sparsity of 0.5, in conflict with 0.6"):
        MaskUpdater(shallow_llama(), "2:4", schedule=Linear(0.6), total_steps=20)


def test_scores_come_from_shadow_values():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", criterion=Magnitude(), update_freq=1, total_steps=10)
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    row, column = (~layer.unpacked_mask()).nonzero()[0].tolist()
    with torch.no_grad():
        layer.weight[row, column] = 100.0
    assert layer.masked_weight()[row, column] == 0
    updater.step()
    assert layer.masked_weight()[row, column] == 100


def test_what_runs_while_paused_does_not_count(ids):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, total_steps=20)
    model(input_ids=ids[0])
    tokens = [int(layer.statistics.tokens) for layer in updater.layers.values()]
    with updater.paused():
        model(input_ids=ids[1])
    assert [int(layer.statistics.tokens) for layer in updater.layers.values()] == tokens
    model(input_ids=ids[2])
    assert all(int(layer.statistics.tokens) == 2 * tokens[0] for layer in updater.layers.values())


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_text_that_is_generated_in_train_mode_does_not_count(ids, adapters, use_reentrant):
    llama = shallow_llama()
    llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    llama.enable_input_require_grads()
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])) if adapters else llama
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, total_steps=20)
    model.train()
    for step in range(1, 3):
        with torch.no_grad():
            model.generate(input_ids=ids[0], max_new_tokens=4, pad_token_id=0, use_cache=False)
        assert model.training
        model(input_ids=ids[step], use_cache=False).logits.sum().backward()
        assert {int(layer.statistics.tokens) for layer in updater.layers.values()} == {step * ids[step].numel()}


def test_a_pause_outlasts_a_step_that_starts_recording():
    recorder = Recorder()
    with recorder.paused():
        recorder.when = "training"
        assert not recorder.wants(training=True)
    assert recorder.wants(training=True)


def test_non_finite_activations_and_unreached_targets_stop_at_the_update_and_change_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x))

    def run(x, **arguments):
        model = Model()
        updater = MaskUpdater(model, "2:4", update_freq=1, total_steps=10, **arguments)
        model(x).sum().backward()
        with pytest.raises(ValueError) as error:
            updater.step()
        assert all(layer.unpacked_mask().all() for layer in sparse_layers(model).values())
        return str(error.value)

    assert "unused is a target, but no token reached it" in run(torch.randn(2, 8), targets=["Linear"])
    x = torch.randn(2, 8)
    x[1, 3] = torch.inf
    message = run(x, targets=["a", "b"])
    assert "a: the input activations are not finite" in message


def test_a_step_that_a_loss_scaler_skips_does_not_count(caplog):
    torch.manual_seed(0)
    batches = [torch.randn(8, 32) for _ in range(12)]
    batches[5] = batches[5] * 1e6  # the second layer's input overflows float16

    def run(batches, **settings):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=2.0)
        settings = {"update_freq": 4, "window": 4} | settings
        updater = MaskUpdater(model, "2:4", total_steps=40, targets=["2"], **settings)
        for batch in batches:
            with torch.autocast("cpu", torch.float16):
                loss = model(batch).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            updater.step()
        return updater

    skipped = run(batches)
    message = "2: in 1 forwards since the last mask update, the input activations were not finite"
    assert [record.message[: len(message)] for record in caplog.records] == [message]
    # as if the batch had not been there, but for the steps that updates are counted in
    assert int(skipped.layers["2"].statistics.tokens) == 8 * 11
    with pytest.raises(ValueError, match="2: the input activations are not finite"):
        run(batches[:4] + [batches[5]] * 4, norm_decay=0.0)  # there is nothing to score with
    assert run(batches, update_freq=1, window=1).steps == 12  # earlier windows are remembered


def test_a_non_finite_weight_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0: scores are not finite"):
        MaskUpdater(model, "2:4", criterion=Magnitude(), total_steps=10)


def test_layers_that_read_the_same_input_have_equal_norms_of_their_own():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=20)
    train(model, updater, 1)
    assert len({id(layer.statistics) for layer in updater.layers.values()}) == 14
    norms = [tuple(layer.statistics.norm_I.tolist()) for layer in updater.layers.values()]
    assert len(set(norms)) == 2 * 4  # q/k/v, o, gate/up, down


def test_squash_after_a_loop_too_short_for_a_mask_says_that_the_model_is_dense(caplog):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=20)
    train(model, updater, 3)
    squash(model)
    assert "None of the 14 masked layers has a pruned weight, so squash leaves a dense model" in caplog.text
    caplog.clear()
    prune(model, [torch.randint(3, VOCABULARY, (2, 8))], "2:4", squash=False)
    squash(model)
    assert not caplog.text


def test_squash_after_a_run():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=8)
    train(model, updater, 8)
    squash(model)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_what_follows_the_end_of_a_run_is_not_in_its_state(ids):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, total_steps=20)
    train(model, updater, 5)
    updater.finish()
    before = copy.deepcopy(updater.state_dict()["norms"])
    model(input_ids=ids[0])
    tokens = [int(layer.statistics.tokens) for layer in updater.layers.values()]
    assert tokens == [int(norm["tokens"]) for norm in before["norms_by_rank"][0].values()] != [0] * len(tokens)


def test_decay_counts_the_steps_since_the_last_update():
    model = shallow_llama()
    updater = MaskUpdater(
        model,
        "2:4",
        criterion=Magnitude(),
        policy=StraightThrough(srste_decay=0.1),
        update_freq=10,
        end_step=15,
        total_steps=20,
    )
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    before, mask = layer.weight.detach().clone(), layer.unpacked_mask()
    for _ in range(20):
        updater.step()
    torch.testing.assert_close(layer.weight.detach(), before * torch.where(mask, 1.0, 0.9**15))


def test_an_error_in_the_middle_changes_no_mask_and_no_kept_weight():
    model = shallow_llama()
    policy = StraightThrough(srste_decay=0.1)
    updater = MaskUpdater(model, "2:4", criterion=Magnitude(), policy=policy, update_freq=2, total_steps=20)
    updater.step()
    layers = list(sparse_layers(model).values())
    with torch.no_grad():
        layers[0].weight.mul_(-2)
        layers[10].weight[0, 0] = torch.nan

    def kept():
        return [(layer.weight_mask.clone(), layer.masked_weight().nan_to_num(7)) for layer in layers]

    before = kept()
    with pytest.raises(ValueError, match="scores are not finite"):
        updater.step()
    for (mask, weight), (new_mask, new_weight) in zip(before, kept(), strict=True):
        assert torch.equal(mask, new_mask) and torch.equal(weight, new_weight)
    assert updater.state_dict()["steps"] == 1  # a checkpoint that is written now, as Lightning can, makes the update

    for group in ("row", "model"):
        dense = shallow_llama()
        dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: scores are not finite"):
            MaskUpdater(dense, Unstructured(group), 0.5, criterion=Magnitude(), total_steps=20)
        assert not sparse_layers(dense)


def test_padding_that_cannot_be_told_apart_is_said_once(caplog):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=20)
    for step in range(4):
        updater.token_mask = torch.ones(5) if step == 0 else torch.tensor([1, 1, 1, 1, 0])
        batch = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        updater.step()
        assert step or not caplog.text  # without padding, there is nothing to tell apart
    assert caplog.text.count("does not fit a layer's input of shape (2, 16, 32)") == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_that_a_forward_is_told_of_does_not_count(compiled):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=10, window=1.0, total_steps=20)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    ids, mask = torch.randint(3, VOCABULARY, (2, 16)), torch.ones(2, 16, dtype=torch.long)

    def counted(**inputs):
        before = int(updater.layers["model.layers.0.mlp.up_proj"].statistics.tokens)
        forward(input_ids=ids, **inputs).logits.sum().backward()
        updater.step()
        return int(updater.layers["model.layers.0.mlp.up_proj"].statistics.tokens) - before

    mask[1, 4:] = 0
    assert [counted(attention_mask=mask), counted(), counted(attention_mask=mask)] == [20, 32, 20]
    copied = copy.deepcopy(model)
    copied(input_ids=ids, attention_mask=mask)
    assert updater.norms.recorder.token_mask is not None
    updater.token_mask = torch.ones(2, 16)  # from now on, what the loop says
    assert [counted(attention_mask=mask), counted()] == [32, 32]
    updater.token_mask = None
    assert counted(attention_mask=mask) == 32
    updater.finish()
    assert not model._forward_pre_hooks


def test_a_run_may_end_at_a_sparsity_of_less_than_a_weight_per_group():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", schedule=Cubic(0.5), update_freq=2, total_steps=40)
    train(model, updater, 3)
    assert 0 < updater.sparsity < 0.25 and all(layer.is_dense() for layer in updater.layers.values())
    updater.finish()


class ReadsItself(nn.Module):
    """Its first layer's weight is read without that layer's forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        return self.c(self.b(nn.functional.linear(x, self.a.weight)))


@pytest.mark.parametrize("static", [True, False])
def test_a_mask_without_effect_is_said(static, caplog):
    model = ReadsItself()
    settings = {"criterion": Magnitude()}
    if static:
        prune(model, criterion=Magnitude())
        settings = {"policy": Fixed(), "first_mask": FromZeros()}
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=8, **settings)
    for _ in range(8):
        model(torch.randn(2, 8)).sum().backward()
        updater.step()
    assert caplog.text.count("reached no forward of 1 targets, such as a.") == 1
    assert (updater.layers["a"].statistics is None) != static
