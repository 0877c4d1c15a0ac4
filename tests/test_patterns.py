import pytest
import torch

from sparse_train.patterns import NM, Unstructured, detect_pattern, parse_pattern
from tests.reference import nm_mask, row_mask

SCORES = torch.tensor(
    [
        [1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, 9.0, 0.0, 9.0, 2.0, 2.0, 3.0, 3.0],
        [5.0, 5.0, 1.0, 5.0, 1.0, 1.0, 1.0, 5.0],
    ]
)


def picture(mask):
    return ["".join("x" if kept else "." for kept in row) for row in mask.tolist()]


def test_golden_2_of_4():
    assert picture(NM(2, 4).mask(SCORES, 0.5)) == [
        "..xxxx..",
        "..xx..xx",  # among equals the lower index is pruned
        ".x.x..xx",
        ".x.x..xx",
    ]


def test_golden_1_of_4_and_3_of_4():
    assert picture(NM(1, 4).mask(SCORES, 0.75))[0] == "...xx..."
    assert picture(NM(3, 4).mask(SCORES, 0.25))[0] == ".xxxxxx."


def test_golden_rows():
    assert picture(Unstructured().mask(SCORES, 0.5)) == ["....xxxx", "....xxxx", ".x.x..xx", "xx.x...x"]


def test_golden_layer_and_model():
    one_row = SCORES[:2].clone()
    assert picture(Unstructured("layer").mask(one_row, 0.5)) == [".xxxxxxx", ".......x"]
    assert picture(Unstructured("model").mask(one_row.reshape(1, -1), 0.5)) == [".xxxxxxx.......x"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [4, 12, 20, 576])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5])
def test_rows_equal_the_papers_sort_bit_for_bit(dtype, in_features, sparsity):
    scores = (torch.randn(16, in_features).to(dtype).abs().float()) * torch.rand(in_features)
    assert torch.equal(Unstructured().mask(scores, sparsity), row_mask(scores, sparsity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "group"), [(1, 4), (2, 4), (4, 8), (3, 4), (1, 2), (16, 32)])
def test_n_of_m_equals_the_loop_over_groups(dtype, kept, group):
    for in_features in (4, 12, 20, 576):
        if in_features % group:
            continue
        scores = torch.randn(16, in_features).to(dtype).abs().float()
        mask = NM(kept, group).mask(scores, 1 - kept / group)
        assert torch.equal(mask, nm_mask(scores, kept, group))
        assert (mask.reshape(-1, group).sum(1) == kept).all()


@pytest.mark.parametrize("group", ["row", "layer"])
def test_counts_round_down_as_the_reference_does(group):
    for sparsity in (0.1, 0.29, 1 / 3, 0.5, 0.7):
        mask = Unstructured(group).mask(torch.rand(7, 10), sparsity)
        pruned = (~mask).sum(1) if group == "row" else (~mask).sum().reshape(1)
        members = 10 if group == "row" else 70
        assert (pruned == int(members * sparsity)).all()


def test_a_schedule_over_n_of_m_steps_through_kept_counts():
    kept = [int(NM(2, 4).mask(SCORES, sparsity)[0, :4].sum()) for sparsity in (0.0, 0.2, 0.25, 0.4, 0.5)]
    assert kept == [4, 4, 3, 3, 2]
    assert int(NM(1, 3).mask(torch.rand(1, 3), NM(1, 3).sparsity).sum()) == 1


def test_parse():
    assert parse_pattern("2:4", None) == (NM(2, 4), 0.5)
    assert parse_pattern("1:4", 0.75) == (NM(1, 4), 0.75)
    assert parse_pattern("unstructured", 0.6) == (Unstructured("row"), 0.6)
    assert parse_pattern(Unstructured("layer"), 0.6) == (Unstructured("layer"), 0.6)


@pytest.mark.parametrize(
    ("structure", "sparsity", "message"),
    [
        ("2:4", 0.6, "2:4 is a sparsity of 0.5, in conflict with 0.6"),
        ("unstructured", None, "needs a sparsity"),
        ("unstructured", 1.0, "at least 0 and below 1"),
        ("unstructured", -0.1, "at least 0 and below 1"),
        ("unstructured", 50, "write 0.5"),
        ("5:4", None, "1 <= N <= M"),
        ("0:4", None, "1 <= N <= M"),
        ("two of four", None, 'must be "unstructured" or "N:M"'),
        (124, None, "put quotes around it"),
    ],
)
def test_mistakes_name_the_rule_and_the_value(structure, sparsity, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(structure, sparsity)


def test_a_layer_that_does_not_divide():
    with pytest.raises(ValueError, match="divisible by 4, but q_proj has 30") as error:
        NM(2, 4).check_layer("q_proj", 30)
    assert str(error.value).endswith("ignore=['q_proj'].")
    Unstructured().check_layer("q_proj", 30)


def test_detect():
    assert detect_pattern(torch.ones(2, 8, dtype=torch.bool)) == "dense"
    assert detect_pattern(NM(2, 4).mask(SCORES, 0.5)) == "2:4"
    assert detect_pattern(NM(1, 4).mask(SCORES, 0.75)) == "1:4"
    assert detect_pattern(NM(4, 8).mask(SCORES, 0.5)) == "4:8"
    assert detect_pattern(NM(8, 16).mask(torch.rand(8, 32), 0.5)) == "8:16"
    assert detect_pattern(Unstructured().mask(torch.rand(4, 12), 0.3)) == "unstructured"
