import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_train.layers import masks

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_golden_bytes():
    mask = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    # bit b of byte j is input 8 j + b; the four spare bits are 0
    assert masks.pack(mask).tolist() == [[0b10000101, 0b00001001]]


@given(st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip_and_counts(out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(out_features, in_features, generator=generator) < 0.5
    b = torch.rand(out_features, in_features, generator=generator) < 0.5
    packed = masks.pack(a)
    assert packed.shape == (out_features, -(-in_features // 8))
    assert torch.equal(masks.unpack(packed, in_features), a)
    assert masks.count(packed) == int(a.sum())
    assert masks.count_differing(packed, masks.pack(b)) == int((a != b).sum())


@pytest.mark.parametrize("rows", range(1, 10))
def test_fingerprints_of_masks_of_any_number_of_bytes(rows):
    mask_OI = torch.zeros(rows, 5, dtype=torch.bool)
    other_OI = mask_OI.clone()
    other_OI[-1, -1] = True
    assert masks.fingerprint_number(masks.pack(mask_OI)) != masks.fingerprint_number(masks.pack(other_OI))


def test_fingerprints_tell_masks_apart_by_every_bit_and_its_place():
    mask = torch.rand(16, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    flipped = [mask.reshape(-1) ^ (torch.arange(mask.numel()) == at) for at in range(mask.numel())]
    packed = [masks.pack(each.view_as(mask)) for each in [mask.reshape(-1), *flipped]]
    packed.append(packed[0].roll(8, 0))  # the same words in other places
    numbers = [masks.fingerprint_number(each) for each in packed]
    assert len(set(numbers)) == len(packed) and max(numbers) < 2**32
    bits = torch.stack([masks.fingerprint(each) for each in packed])
    assert torch.equal((bits.long() << torch.arange(32)).sum(1), torch.tensor(numbers))
    assert ((bits.float().mean(0) - 0.5).abs() < 0.1).all()  # each bit is as often 0 as 1


@pytest.mark.parametrize("start", [0, 8, 60])
def test_a_part_of_a_longer_mask(start):
    whole = torch.rand(1, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    part = whole[:, start : start + 32].view(2, 16)
    assert torch.equal(masks.unpack(masks.pack(part), 16), part)
    row = torch.ones(3, 20, dtype=torch.bool)[:1, :16]
    assert torch.equal(masks.unpack(masks.pack(row), 16), row)


@pytest.mark.parametrize("in_features", [4, 12, 20, 576])
def test_full_keeps_everything_and_leaves_spare_bits_zero(in_features):
    full = masks.full(8, in_features)
    assert torch.equal(full, masks.pack(torch.ones(8, in_features, dtype=torch.bool)))
    assert masks.count(full) == masks.count(full.t()) == 8 * in_features


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("in_features", [4, 12, 20, 64])
def test_apply_is_where(dtype, in_features):
    weight = torch.randn(6, in_features).to(dtype)
    weight[0, 0], weight[1, 0], weight[2, 0], weight[3, 0] = torch.inf, torch.nan, -1.0, -torch.inf
    mask = torch.rand(6, in_features) < 0.5
    mask[:4, 0] = False
    applied = masks.apply(weight, masks.pack(mask))
    assert applied.dtype == dtype
    assert torch.equal(applied, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert not applied[:4, 0].signbit().any()  # a product would give NaN and -0.0


def test_apply_in_another_dtype_rounds_as_a_cast_does():
    weight, mask = torch.randn(8, 24), torch.rand(8, 24) < 0.5
    expected = torch.where(mask, weight.bfloat16(), torch.zeros((), dtype=torch.bfloat16))
    assert torch.equal(masks.apply(weight, masks.pack(mask), torch.bfloat16), expected)


def test_a_mask_takes_an_eighth_of_a_byte_a_weight():
    assert masks.full(576, 576).nbytes / 576**2 == 0.125
    assert all(masks.full(8, width).nbytes / (8 * width) <= 0.13 for width in range(64, 2000, 8))


def test_tables_made_under_inference_mode_serve_training():
    masks._byte_table.cache_clear()
    weight = torch.randn(2, 8, requires_grad=True)
    with torch.inference_mode():
        masks.apply(weight.detach(), masks.full(2, 8))
    assert masks.apply(weight.detach(), masks.full(2, 8)).sum() is not None
    assert not masks._byte_table(torch.int32, torch.device("cpu")).is_inference()
