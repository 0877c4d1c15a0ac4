"""Peak memory of pruning a 4 GiB checkpoint block by block, above an interpreter with its libraries loaded.

    python benchmarks/oneshot_memory.py

Writes a Llama checkpoint with random float32 weights (vocabulary of 32,000, 19 blocks, 4.1 GiB) to --folder, prunes it
to 2:4 with 16 x 512 calibration tokens in a separate process, and removes both. Needs about 9 GiB of disk space.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import performance
import rows
import torch
from jsonargparse import auto_cli

WORDS = 32_000
SAMPLES, LENGTH = 16, 512


def tensors_of(config: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the weights, one file at a time."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield {"model.embed_tokens.weight": (WORDS, hidden)}
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"
        }
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{block}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        yield shapes
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (WORDS, hidden)}


def make_checkpoint(folder: Path, config: dict[str, int]) -> int:
    """Write random weights; returns their size in bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(**config, vocab_size=WORDS, tie_word_embeddings=False, dtype="float32").save_pretrained(folder)
    torch.manual_seed(0)
    weight_map, total = {}, 0
    for number, shapes in enumerate(tensors_of(config)):
        made = {
            key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / shape[-1] ** 0.5
            for key, shape in shapes.items()
        }
        save_file(made, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, f"part-{number}.safetensors")
        total += sum(value.nbytes for value in made.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def prune_and_measure(source: str, out: str, method: str) -> None:
    """Runs in the process that is measured: prune, and print bytes and seconds."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (libraries that any run loads)

    from sparse_train import SparseGPT, Wanda
    from sparse_train.oneshot.prune import prune_checkpoint

    ids = torch.randint(WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the thread pool is part of the interpreter
    before = _resident()
    began = time.perf_counter()
    criterion = {"wanda": Wanda(), "sparsegpt": SparseGPT()}[method]
    report = prune_checkpoint(source, out, list(ids.split(1)), "2:4", criterion=criterion)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([before, peak, time.perf_counter() - began, report.forward_seconds, report.pruning_seconds]))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(
    folder: str | None = None,
    method: str = "wanda",
    hidden_size: int = 2048,
    intermediate_size: int = 5632,
    blocks: int = 19,
    out: str | None = None,
) -> None:
    """Print the table.

    Args:
        folder: for the two temporary checkpoints; default: the system's temporary folder.
        method: wanda or sparsegpt.
        hidden_size, intermediate_size, blocks: of the Llama model.
        out: JSON file for bytes and seconds.
    """
    config = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden_size // 128,
    }
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        (place / "dense").mkdir()
        size = make_checkpoint(place / "dense", config)
        call = [sys.executable, __file__, "--measure", str(place / "dense"), str(place / "sparse"), method]
        # return freed memory to the system, so that it is measured as free
        env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run(call, env=env, check=True, stdout=subprocess.PIPE, text=True)
        before, peak, seconds, forwards, pruning = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(place)
    found = {"method": method, "tokens": f"{SAMPLES} x {LENGTH}", "blocks": blocks, "checkpoint": size}
    found |= {"before": before, "peak": peak, "seconds": seconds, "forwards": forwards, "pruning": pruning}
    print("\n".join(performance.streaming(rows.record(out, "streaming", found))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        prune_and_measure(*sys.argv[2:])
    else:
        auto_cli(main, as_positional=False)
