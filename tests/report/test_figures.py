import io
import warnings

import numpy as np
from PIL import Image

from sparse_train.report.figures import curves, grid, heat_maps, mask_change


def colours(png):
    with Image.open(io.BytesIO(png)) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_grid_has_a_row_for_each_block_and_a_column_for_each_projection():
    values = {"model.layers.10.mlp.up_proj": 0.3, "model.layers.2.mlp.up_proj": 0.1, "model.layers.2.attn.q_proj": 0.2}
    blocks, columns, values_RC = grid(values | {"lm_head": 0.4})
    assert blocks == ["-", "2", "10"]
    assert columns == ["up_proj", "q_proj", "lm_head"]
    np.testing.assert_array_equal(values_RC, [[np.nan, np.nan, 0.4], [0.1, 0.2, np.nan], [0.3, np.nan, np.nan]])
    # where the last part would not tell projections apart, the whole name does
    assert grid({"h.0.a.proj": 0.1, "h.0.b.proj": 0.2})[1] == ["a.proj", "b.proj"]


def test_nothing_is_drawn_of_nothing():
    assert curves("x", "", {"run": {"": []}}, "loss") is None
    assert curves("x", "", {"run": {"": [(1, float("nan"))]}}, "loss") is None
    assert curves("x", "", {"run": {"": [(1, 0.0)]}}, "loss", log=True) is None
    assert heat_maps("x", "", {"zeros": {}}) is None


def test_one_point_makes_a_picture():
    for point in ((0, 0.0), (1, 3.0)):
        picture = curves("x", "caption", {"run": {"": [point]}}, "flip rate, %")
        assert (0, 0x72, 0xB2) in colours(picture.light)
        assert (0x56, 0xB4, 0xE9) in colours(picture.dark)
        assert f"run: {point[1]:g} at step {point[0]}." in picture.alt


def test_flips_have_their_colours():
    first = np.array([[True, True, False, False]] * 2)
    went, came = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)
    last = first.copy()
    last[0] = [True, False, True, False]
    picture = mask_change("x", "", first, last, (0, 10))
    assert "1 went, 1 came back" in picture.alt
    share = {c: n for n, c in Image.open(io.BytesIO(picture.light)).convert("RGB").getcolors(1 << 20)}
    still = mask_change("x", "", first, first, (0, 10))
    legend = {c: n for n, c in Image.open(io.BytesIO(still.light)).convert("RGB").getcolors(1 << 20)}
    for colour in (went, came):
        assert share[colour] > 5 * legend[colour]  # one of eight entries, against its patch in the legend


def test_a_legend_of_long_names_stays_inside_the_picture():
    flips = {"since the update before": [(0, 0.0), (1, 0.4)], "since the first mask": [(0, 0.0), (1, 0.39)]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapsed
        curves("x", "c", {"static mask, fine-tuned": flips, "dynamically re-pruned": flips}, "flip rate, %")
