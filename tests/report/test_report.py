import re
import struct

from sparse_train.inspection import LayerSparsity, layer_sparsities, overall_sparsity
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import sparsify
from sparse_train.report import Report, markdown_table, read_metrics, write_report
from tests.conftest import tiny_llama


def test_a_report_is_one_page_with_its_pictures_inside(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(
        "step,val/perplexity,sparsity/flip_rate,sparsity/initial_flip_rate\n20,8.0,,\n10,,0.02,0.0\n10,9.5,,\n20,,0.01,0.02\n"
    )
    rows = read_metrics(metrics)
    assert [row["step"] for row in rows] == [10, 10, 20, 20]
    assert rows[0] == {"step": 10, "sparsity/flip_rate": 0.02, "sparsity/initial_flip_rate": 0.0}
    report = Report(
        title="A & B",
        notes=["measured <here>"],
        columns=["arm", "perplexity"],
        rows=[["dense", "5.00"], ["dynamic", "6.00"]],
        runs={"dynamic": rows, "nothing logged": []},
        layers=[
            LayerSparsity(f"model.layers.{block}.{name}", (4, 8), 16, "2:4")
            for block in range(3)
            for name in ("q", "up")
        ],
        recipe="trainer:\n  max_steps: 5\n",
    )
    page = write_report(report, tmp_path / "out")
    text = page.read_text()
    assert "A &amp; B" in text
    assert "measured &lt;here&gt;" in text
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', text)) == 3
    assert "http" not in text  # nothing is loaded from elsewhere
    twin = (tmp_path / "out" / "report.md").read_text()
    assert "| dynamic | 6.00 |" in twin
    for name in re.findall(r"\]\((.*?\.png)\)", twin):
        data = (tmp_path / "out" / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width > 500
        assert height > 150


def test_markdown_table():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_sparsity_is_counted_on_what_the_forward_sees():
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data[0] = 0  # zeros of its own
    sparsify(model, [layer])
    sparse_layers(model)["model.layers.0.mlp.up_proj"].weight_mask[1] = 0
    found = {entry.name: entry for entry in layer_sparsities(model)}
    entry = found["model.layers.0.mlp.up_proj"]
    assert entry.zeros == 2 * layer.in_features
    assert entry.sparsity == 2 / layer.out_features
    assert 0 < overall_sparsity(list(found.values())) < entry.sparsity
    assert overall_sparsity([]) == 0
