"""docs/pictures/inspect.svg: the output of ``sparse-train inspect`` in a terminal, as a picture.

python docs/terminal_pictures.py             # print it
python docs/terminal_pictures.py --write     # put it into docs/pictures
"""

import io
import re
import sys
from pathlib import Path

import torch
from rich import get_console, reconfigure
from rich._export_format import CONSOLE_SVG_FORMAT
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_train import Magnitude, prune
from sparse_train.cli.inspect import show_inspection
from sparse_train.inspection import layer_sparsities

PICTURE = Path(__file__).parent / "pictures" / "inspect.svg"
# rich's template loads a font from another server; a picture in a page must not load anything
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace("Fira Code, ", "")


def inspect_picture() -> str:
    """A model of two blocks with every pattern there is, as SVG."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=4096,
        )
    ).bfloat16()
    prune(model, criterion=Magnitude(), mask_structure="2:4", targets=["re:.*layers.*"], ignore=["re:.*1.mlp.*"])
    prune(model, criterion=Magnitude(), mask_structure="4:8", targets=["re:.*1.mlp.gate_proj"])
    prune(model, criterion=Magnitude(), mask_structure="unstructured", sparsity=0.6, targets=["re:.*1.mlp.up_proj"])
    reconfigure(record=True, width=110, force_terminal=True, file=io.StringIO())
    console = get_console()
    sizes = [parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters()]
    console.print("$ sparse-train inspect runs/small", highlight=False)
    show_inspection("runs/small", layer_sparsities(model), sum(sizes))
    return console.export_svg(title="sparse-train", code_format=_FORMAT, unique_id="inspect")


if __name__ == "__main__":
    if "--write" in sys.argv:
        PICTURE.write_text(inspect_picture())
    else:
        print(inspect_picture())
