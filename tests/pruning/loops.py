"""Training loops around ``MaskUpdater``, and what must hold after each of their steps."""

import copy

import torch

from sparse_train import NM, Unstructured, sparse_layers
from tests.conftest import VOCABULARY


def train(model, updater, steps, optimizer=None, seed=0):
    """A plain loop; checks after every step that every group has its count. Returns the update reports."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    reports = []
    for _ in range(steps):
        batch = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
        model(input_ids=batch, labels=batch).loss.backward()
        updater.before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        report = updater.step()
        if report is not None:
            reports.append(report)
        if updater.sparsity is not None:
            assert_exact(model, updater)
    return reports


def assert_exact(model, updater):
    pattern = updater.config.pattern
    for layer in sparse_layers(model).values():
        mask = layer.unpacked_mask()
        if isinstance(pattern, Unstructured):
            assert ((~mask).sum(1) == int(layer.in_features * updater.sparsity)).all()
        else:
            pruned = int(updater.sparsity * pattern.m + 1e-6)
            assert (mask.reshape(-1, pattern.m).sum(1) == pattern.m - pruned).all()
        assert not layer.masked_weight()[~mask].any()


def groups_of(pattern, mask_OI):
    """The mask as one row per group of the pattern, within a layer."""
    if isinstance(pattern, NM):
        return mask_OI.reshape(-1, pattern.m)
    return mask_OI if pattern.group == "row" else mask_OI.reshape(1, -1)


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
