import multiprocessing
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_train import selection as selection
from sparse_train.statistics import sum_of_squares
from tests.reference import row_mask

WAYS = {
    "blocks on CPU": selection.keep_highest,
    "threshold in torch": selection.by_threshold,
    "comparison in torch": selection.by_comparison,
}


def reference(scores, kept):
    keep = torch.ones_like(scores, dtype=torch.bool)
    order = torch.sort(scores, dim=1, stable=True).indices
    return keep.scatter_(1, order[:, : scores.shape[1] - kept], False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@given(
    groups=st.integers(1, 6),
    members=st.sampled_from([2, 4, 8]) | st.integers(2, 40),
    share=st.floats(0, 1),
    levels=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_equals_a_stable_sort_ties_included(way, groups, members, share, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (groups, members), generator=generator).float()
    scores *= torch.randint(0, 2, scores.shape, generator=generator) * 2 - 1  # negative ones, and both zeros
    kept = min(members - 1, max(1, round(share * members)))
    assert torch.equal(way(scores, kept), reference(scores, kept))


def test_all_and_none():
    scores = torch.randn(3, 8)
    assert selection.keep_highest(scores, 8).all()
    assert not selection.keep_highest(scores, 0).any()


def test_many_blocks_equal_one(monkeypatch):
    scores = torch.randint(0, 50, (257, 96)).float()
    expected = selection.keep_highest(scores, 48)
    monkeypatch.setattr(selection, "CHUNK", 500)
    assert torch.equal(selection.keep_highest(scores, 48), expected)
    assert torch.equal(expected, row_mask(scores, 0.5))


def test_minus_infinity_goes_first():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]])
    assert selection.keep_highest(scores, 2).tolist() == [[False, True, False, True]]
    assert selection.keep_highest(scores, 3).tolist() == [[False, True, True, True]]


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_inside_threads_torch_uses_one_and_elsewhere_as_many_as_before():
    selection._pool.cache_clear()
    inside = selection.in_threads(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(8))
    assert set(inside) == {(1, False)}  # a call of in_threads in there would otherwise wait for itself
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2]


@pytest.mark.usefixtures("_two_threads")
def test_a_forked_process_has_threads_of_its_own():
    scores, x = torch.rand(64, 2**14), torch.rand(4096, 520)  # large enough for threads
    selection.keep_highest(scores, 100)
    sum_of_squares(x)

    def child():
        selection._in_chunks(selection._threshold_chunk, scores, 100)
        sum_of_squares(x)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("shape", [(5, 3), (4096, 520), (4099, 513), (1, 2**21)])
def test_sums_of_squares_in_threads_and_without(shape):
    x = torch.randn(shape)
    assert torch.allclose(sum_of_squares(x).double(), x.double().square().sum(0), rtol=1e-6)
