import re
import warnings

from sparse_train.report.figures import curves


def test_nothing_is_drawn_of_nothing():
    assert curves("", [("run", "", [])], "loss") == ""
    assert curves("", [("run", "", [(1, float("nan"))])], "loss") == ""


def test_a_picture_takes_the_colour_of_the_pages_text_and_loads_nothing():
    for point in ((0, 0.0), (1, 0.03)):
        picture = curves("caption", [("run", "", [point])], "flip rate, %")
        assert "currentColor" in picture
        assert not re.search(r"(?:src|href)=\"(?!#|data:)", picture)
        assert f"run {100 * point[1]:g} at step {point[0]}" in picture


def test_runs_have_colours_and_kinds_have_dashes():
    points = [(step, 1.0 + step) for step in range(4)]
    picture = curves("", [("a", "x", points), ("a", "y", points), ("b", "x", points)], "loss", levels={2.0: "dense"})
    text = re.sub(r"\s+", " ", picture)
    assert all(f">{name}</text>" in text for name in ("a, x", "a, y", "b, x", "dense"))
    assert len(set(re.findall(r"stroke: (#[0-9a-f]{6})", text))) == 2
    assert "stroke-dasharray" in text


def test_a_legend_of_long_names_stays_inside_the_picture():
    flips = [
        (run, kind, [(0, 0.0), (1, 0.4)])
        for run in ("static mask, fine-tuned", "dynamically re-pruned")
        for kind in ("since the update before", "since the first mask")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapsed
        curves("c", flips, "flip rate, %")
