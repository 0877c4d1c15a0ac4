"""Dropping by score and growing by gradient: by hand, against a reference, and what the optimizer sees of it."""

import copy

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import Magnitude, MaskUpdater, Regrow, Unstructured, prune, sparse_layers, squash
from sparse_train.patterns import NM
from sparse_train.policies import Optimizers, regrow
from sparse_train.schedules import Linear
from tests.conftest import VOCABULARY, shallow_llama
from tests.pruning.loops import assert_exact, groups_of
from tests.ranks import engines, launch
from tests.test_contract import PATTERNS

INF = float("inf")


def mask_of(scores, gradients, pattern, sparsity, fraction):
    scores, gradients = torch.tensor(scores), torch.tensor(gradients)
    return regrow(scores, gradients, pattern, sparsity, fraction).int().tolist()


def test_rows_by_hand():
    scores = [[4.0, 3, 2, 1, -INF, -INF, -INF, -INF], [1.0, 2, 3, 4, -INF, -INF, -INF, -INF]]
    # The first row keeps 4 and 3, and takes 7 and 5: the one with 5 was dropped, and is taken back. The second keeps 3
    # and 4, and takes 9 and 8.
    gradients = [[99.0, 99, 5, 1, 7, 2, 0, 0], [0.0, 1, 0, 0, 2, 8, 9, 3]]
    expected = [[1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1, 0]]
    assert mask_of(scores, gradients, Unstructured("row"), 0.5, 0.5) == expected


def test_a_layer_by_hand():
    scores = [[4.0, 3, -INF, -INF], [1.0, 2, -INF, -INF]]
    gradients = [[0.0, 0, 5, 6], [1.0, 2, 3, 4]]
    assert mask_of(scores, gradients, Unstructured("layer"), 0.5, 0.5) == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_two_of_four_by_hand():
    scores = [[4.0, 3, -INF, -INF, 1, -INF, 2, -INF]]
    gradients = [[99.0, 99, 99, 99, 1, 3, 2, 4]]
    # The row drops 1 and 2, both of the second group, which grows its two largest. The first group has lost none.
    assert mask_of(scores, gradients, NM(2, 4), 0.5, 0.5) == [[1, 1, 0, 0, 0, 1, 0, 1]]


def test_a_schedule_takes_its_part_first():
    scores = [[4.0, 3, 2, 1, 5, -INF, -INF, -INF]]
    gradients = [[0.0, 0, 0, 0, 0, 1, 3, 2]]
    # From 5 kept to 4: 1 goes. Half of the four are dropped, 2 and 3, and two are grown.
    assert mask_of(scores, gradients, Unstructured("row"), 0.5, 0.5) == [[1, 0, 0, 0, 1, 0, 1, 1]]


@given(
    case=st.sampled_from([*PATTERNS, (NM(3, 4), 0.25), (NM(2, 4), 0.4), (NM(2, 4), 0.49)]),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_in_every_group(case, fraction, seed):
    pattern, sparsity = case
    generator = torch.Generator().manual_seed(seed)
    raw, gradients = torch.rand(2, 8, 16, generator=generator)
    gradients = (gradients * 4).floor()  # with ties and zeros
    old = pattern.mask(raw, sparsity)
    scores = torch.where(old, torch.rand(8, 16, generator=generator), -INF)
    new = regrow(scores, gradients, pattern, sparsity, fraction)
    assert torch.equal(groups_of(pattern, new).sum(1), groups_of(pattern, old).sum(1))
    gone = int((old & ~new).sum())
    rounded = old.shape[0] if isinstance(pattern, NM) or pattern.group == "row" else 1
    assert gone <= fraction * int(old.sum()) + rounded
    assert torch.equal(new, regrow(scores, gradients, pattern, sparsity, fraction))


def fraction_at(progress):
    policy = Regrow(0.4)
    policy.begin({}, Optimizers(), 1)
    policy.before_step(progress)
    return policy.fraction


def test_the_fraction_falls_along_a_cosine():
    fractions = [fraction_at(progress) for progress in (0, 1 / 3, 0.5, 2 / 3, 1)]
    assert fractions == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    assert fraction_at(1.0) == fraction_at(None) == 0


def fresh(structure="unstructured", optimizer=None, model=None, **changes):
    torch.manual_seed(0)
    model = model or shallow_llama()
    if structure == "unstructured":
        changes = {"sparsity": 0.6} | changes
    prune(
        model, list(torch.randint(3, VOCABULARY, (2, 2, 16))), structure, sparsity=changes.get("sparsity"), squash=False
    )
    arguments = {"policy": Regrow(), "update_freq": 4, "total_steps": 20, "end_step": 1.0, "norm_decay": 0.0} | changes
    made = (optimizer or (lambda parameters: AdamW(parameters, lr=3e-3)))(model.parameters())
    known = [made] if "state" in changes else []  # otherwise before_optimizer_step tells
    return model, MaskUpdater(model, structure, optimizers=known, **arguments), made


def backward(model, generator, scale=1.0, count=2):
    batch = torch.randint(3, VOCABULARY, (count, 16), generator=generator)
    (model(input_ids=batch, labels=batch).loss * scale).backward()
    return batch


def step(model, updater, optimizer, generator):
    backward(model, generator)
    updater.before_optimizer_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return updater.step()


def by_sorting(weight, norms, mask, gradient, sparsity, fraction):
    """RigL over rows, one at a time, with Wanda scores."""
    new = torch.zeros_like(mask)
    for row in range(len(mask)):
        scores = weight[row].abs() * norms
        kept = sorted(mask[row].nonzero().flatten().tolist(), key=lambda i: float(scores[i]))
        columns = mask.shape[1]
        survivors = columns - int(columns * (1 - (1 - sparsity) * (1 - fraction)) + 1e-6)
        remaining = kept[len(kept) - survivors :]
        others = sorted(set(range(columns)) - set(remaining), key=lambda i: float(gradient[row, i]))
        new[row, remaining + others[len(others) - (len(kept) - survivors) :]] = True
    return new


def test_an_update_is_rigl_on_the_gradient_of_the_masked_model():
    model, updater, optimizer = fresh(policy=Regrow(0.4), window=1.0)
    inputs: dict[str, list] = {}
    for name, layer in updater.layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(model, updater, optimizer, generator)
    plain = copy.deepcopy(model)
    squash(plain)
    batch = backward(model, generator)
    old = {name: layer.unpacked_mask() for name, layer in updater.layers.items()}
    updater.before_optimizer_step(optimizer)
    optimizer.step()
    weights = {name: layer.weight.detach().clone() for name, layer in updater.layers.items()}
    report = updater.step()
    assert report.step == 4
    norm = {name: torch.cat([x.flatten(0, 1) for x in own]).square().sum(0).sqrt() for name, own in inputs.items()}
    plain(input_ids=batch, labels=batch).loss.backward()
    flips = 0
    for name, layer in updater.layers.items():
        gradient = plain.get_submodule(name).weight.grad.abs()
        fraction = fraction_at(4 / 20)
        expected = by_sorting(weights[name], norm[name], old[name], gradient, 0.6, fraction)
        new = layer.unpacked_mask()
        assert torch.equal(new, expected), name
        grown = new & ~old[name]
        assert not layer.weight.detach()[grown].any()
        assert torch.equal(layer.weight.detach()[~grown], weights[name][~grown])
        assert report.layers[name].zeros == int((layer.masked_weight() == 0).sum())
        flips += int(grown.sum())
    assert flips > 50


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4:8", Unstructured("layer"), Unstructured("model")])
def test_a_run_is_exact_and_pruned_weights_get_no_gradient(structure):
    changes = {"sparsity": 0.6} if isinstance(structure, Unstructured) else {}
    model, updater, optimizer = fresh(structure, **changes)
    generator = torch.Generator().manual_seed(1)
    flips = {}
    for number in range(1, 21):
        backward(model, generator)
        updater.before_optimizer_step(optimizer)
        for layer in updater.layers.values():
            # asked of the step before an update alone; at the last update nothing is grown
            assert layer.straight_through == (number in (4, 8, 12, 16))
            assert not layer.weight.grad[~layer.unpacked_mask()].any()
            assert layer.weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
        if report := updater.step():
            flips[number] = report.flip_rate
        if not isinstance(structure, Unstructured) or structure.group == "row":
            assert_exact(model, updater)
    assert list(flips) == [4, 8, 12, 16, 20]
    assert all(flips[number] > 0 for number in (4, 8, 12))
    assert flips[20] == 0
    if isinstance(structure, Unstructured):
        masks = [layer.unpacked_mask() for layer in sparse_layers(model).values()]
        groups = masks if structure.group == "layer" else [torch.cat([mask.flatten() for mask in masks])]
        assert all(int((~group).sum()) == int(group.numel() * 0.6) for group in groups)


def test_sparsity_may_rise_meanwhile():
    model = shallow_llama()
    updater = MaskUpdater(
        model, "unstructured", schedule=Linear(0.7, 0.2), policy=Regrow(), update_freq=4, total_steps=20
    )
    optimizer, generator = AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for _ in range(20):
        step(model, updater, optimizer, generator)
        if updater.sparsity is not None:
            assert_exact(model, updater)
    assert updater.sparsity == 0.7


OPTIMIZERS = [
    lambda p: AdamW(p, lr=3e-3, amsgrad=True),
    lambda p: AdamW(p, lr=3e-3, foreach=True),
    lambda p: AdamW(p, lr=3e-3, fused=True),
    lambda p: Adam(p, lr=3e-3, weight_decay=0.1),
    lambda p: SGD(p, lr=0.01, momentum=0.9),
    lambda p: SGD(p, lr=0.01),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["amsgrad", "foreach", "fused", "adam", "momentum", "sgd"])
def test_moments_are_cleared_exactly_where_masks_changed(optimizer):
    model, updater, optimizer = fresh("2:4", optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(model, updater, optimizer, generator)
    backward(model, generator)
    updater.before_optimizer_step(optimizer)
    optimizer.step()
    before = copy.deepcopy({name: (m.unpacked_mask(), optimizer.state[m.weight]) for name, m in updater.layers.items()})
    updater.step()
    cleared = 0
    for name, layer in updater.layers.items():
        changed = before[name][0] ^ layer.unpacked_mask()
        for key, value in before[name][1].items():
            now = optimizer.state[layer.weight][key]
            if value is None or value.dim() == 0:
                assert now is None or torch.equal(now, value)
                continue
            assert torch.equal(now, torch.where(changed, 0, value))
            cleared += int((value[changed] != 0).sum())
    assert cleared > 0 or not any(isinstance(v, torch.Tensor) for v in optimizer.state[layer.weight].values())


def test_an_optimizer_that_accelerate_has_wrapped_is_cleared_too():
    model, updater, optimizer = fresh("2:4", lambda p: AdamW(p, lr=3e-3))
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    for _ in range(4):
        backward(model, torch.Generator().manual_seed(1))
        updater.before_optimizer_step(wrapped)
        optimizer.step()
        updater.step()
    grown = [layer.unpacked_mask() & (layer.weight == 0) for layer in updater.layers.values()]
    assert sum(int(each.sum()) for each in grown) > 0
    for layer, new in zip(updater.layers.values(), grown, strict=True):
        assert not optimizer.state[layer.weight]["exp_avg"][new].any()


def test_gradients_add_up_over_micro_batches_and_their_scale_does_not_matter():
    def masks(accumulate, scale, clip):
        model, updater, optimizer = fresh(optimizer=lambda parameters: SGD(parameters, lr=0.0), criterion=Magnitude())
        generator = torch.Generator().manual_seed(1)
        taken = None
        for number in range(4):
            for _ in range(accumulate):
                backward(model, generator, scale, count=4 // accumulate)
            wanted = {name: layer.weight.grad.clone() for name, layer in updater.layers.items()}
            updater.before_optimizer_step(optimizer)
            if number == 3:
                taken = dict(updater.policy.gradients)
                assert all(torch.equal(taken[name], gradient) for name, gradient in wanted.items())
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            updater.step()
        return {name: layer.weight_mask.clone() for name, layer in updater.layers.items()}

    plain = masks(1, 1.0, None)
    for other in (masks(1, 1024.0, None), masks(1, 1.0, 1e-3)):
        assert all(torch.equal(mask, other[name]) for name, mask in plain.items())
    accumulated = masks(2, 1.0, None)
    differing = sum(int((mask != accumulated[name]).sum()) for name, mask in plain.items())
    assert differing < 0.01 * sum(mask.numel() for mask in plain.values())  # sums in another order


def test_weights_stored_the_other_way_round():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    model, updater, optimizer = fresh("2:4", model=GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        old = {name: layer.unpacked_mask() for name, layer in updater.layers.items()}
        backward(model, generator)
        updater.before_optimizer_step(optimizer)
        for layer in updater.layers.values():
            assert not layer.weight.grad.t()[~layer.unpacked_mask()].any()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    changed = {name: old[name] ^ layer.unpacked_mask() for name, layer in updater.layers.items()}
    assert sum(int(each.sum()) for each in changed.values()) > 0
    for name, layer in updater.layers.items():
        assert not layer.weight_OI.detach()[changed[name] & layer.unpacked_mask()].any()
        assert not optimizer.state[layer.weight]["exp_avg"].t()[changed[name]].any()


def test_a_gradient_that_is_not_finite_grows_nothing():
    model, updater, optimizer = fresh("2:4")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(model, updater, optimizer, generator)
    masks = {name: layer.weight_mask.clone() for name, layer in updater.layers.items()}
    backward(model, generator)
    updater.layers["model.layers.0.mlp.up_proj"].weight.grad[0, 0] = torch.inf
    updater.before_optimizer_step(optimizer)
    report = updater.step()  # and the optimizer has skipped its step
    for name, layer in updater.layers.items():
        assert torch.equal(masks[name], layer.weight_mask) == (report.layers[name].flips == 0)
    assert report.layers["model.layers.0.mlp.up_proj"].flips == 0
    assert report.flip_rate > 0


def test_interrupted_equals_uninterrupted_between_the_optimizer_and_the_update():
    def prepare(model, updater, optimizer):
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            step(model, updater, optimizer, generator)
        backward(model, generator)
        updater.before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def go_on(model, updater, optimizer):
        updater.step()
        generator = torch.Generator().manual_seed(2)
        for _ in range(6):
            step(model, updater, optimizer, generator)

    whole = fresh()
    prepare(*whole)
    resumed = fresh(state=copy.deepcopy(whole[1].state_dict()))
    for at in (0, 2):
        resumed[at].load_state_dict(copy.deepcopy(whole[at].state_dict()))
    go_on(*whole)
    go_on(*resumed)
    found = resumed[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole[0].state_dict().items())


def test_gradients_do_not_outlive_their_update():
    model, updater, optimizer = fresh("2:4")
    generator = torch.Generator().manual_seed(1)
    for number in range(7):
        assert not updater.state_dict()["policy"]
        report = step(model, updater, optimizer, generator)
        assert (report is not None) == (number == 3)
    backward(model, generator)
    with pytest.raises(ValueError, match="grows weights by their gradient, but none was seen"):
        updater.step()


def test_compiled_forwards_make_the_same_masks():
    def masks(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        updater = MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=8, policy=Regrow(1.0))
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = SGD(model.parameters(), lr=0.5)
        for _ in range(4):
            forward(torch.randn(8, 16)).square().mean().backward()
            updater.before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            report = updater.step()
        assert report.flip_rate > 0
        return {name: layer.weight_mask for name, layer in updater.layers.items()}

    plain, compiled = masks(False), masks(True)
    assert all(torch.equal(mask, compiled[name]) for name, mask in plain.items())


def test_what_is_missing_is_named():
    model, updater, optimizer = fresh("2:4")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(model, updater, optimizer, generator)
    backward(model, generator)
    with pytest.raises(ValueError, match="grows weights by their gradient, but none was seen"):
        updater.step()
    model, updater, optimizer = fresh("2:4")
    next(iter(updater.layers.values())).requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(3):
        step(model, updater, optimizer, generator)
    backward(model, generator)
    updater.before_optimizer_step(optimizer)
    with pytest.raises(ValueError, match="Leave layers that are frozen"):
        updater.step()
    with pytest.raises(ValueError, match=r"RMSprop: Regrow clears .* can do that for torch's AdamW, Adam and SGD"):
        updater.before_optimizer_step(torch.optim.RMSprop(model.parameters()))
    for fraction in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="drop_fraction is the share of kept weights"):
            Regrow(fraction)


def refused(engine, folder):
    from sparse_train import FirstWindow
    from sparse_train.callbacks import DynamicPruning

    pruning = DynamicPruning("2:4", policy=Regrow(), update_freq=5, first_mask=FirstWindow())
    with pytest.raises(ValueError) as error:
        engines.trainer(engine, folder, pruning).fit(engines.Module(), engines.loader())
    return str(error.value)


def test_sharded_engines_are_refused(tmp_path):
    for messages in launch.each(refused, [("fsdp2", tmp_path), ("zero2", tmp_path)]).values():  # shards, and masters
        assert all("needs whole gradients" in message for message in messages)
