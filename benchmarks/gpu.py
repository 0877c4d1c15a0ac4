"""Everything that waits for a GPU, unattended, on one page: tests, selection, steps, memory, products, ranks, a run.

    python benchmarks/gpu.py                  # an hour or two; writes gpu.md, and names the card in it
    python benchmarks/gpu.py --device cpu --small true --parts '[products, generation]'     # to look at the page

Nobody has run it on a GPU yet. A part that fails is on the page with its error, and the next one begins. The run at the
end is of a random Llama: of 8 billion weights on eight GPUs (FSDP2), of 1 billion on fewer.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import performance
import rows
import torch
from jsonargparse import auto_cli
from overhead import BLOCK_SIZE, Student
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_train import MaskUpdater, prune
from sparse_train.criteria import Magnitude

ROOT = Path(__file__).parent.parent
SHAPES_OI = [(4096, 4096), (14336, 4096), (4096, 14336)]
"""Of a Llama-3.1-8B."""


def shell(*arguments: str, **environment: str) -> str:
    """The output of one of this project's commands; an error with its last lines if it fails, or hangs."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=2 * 3600,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout


def milliseconds(run: Callable[[], object], device: str, rounds: int = 20) -> float:
    """The median of some rounds, after two that warm up."""
    taken = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken[2:])


def llama(width: int, blocks: int, vocabulary: int = 32000) -> Any:
    heads = width // 64
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_attention_heads=heads, **shape))


def compress(layer: nn.Linear) -> None:
    """Replace a 2:4 weight by its form for sparse tensor cores."""
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)


# --- the parts: each returns its text --------------------------------------------------------------------------------


def tests(device: str, small: bool) -> str:
    return shell("-m", "pytest", "-m", "gpu", "-q", DS_ACCELERATOR="cuda").strip().splitlines()[-1]


def selection(device: str, small: bool) -> str:
    return by_benchmark("selection", device, *(["--out_features=256", "--model_7b=false"] if small else []))


def steps(device: str, small: bool) -> str:
    return by_benchmark("step", device, *(["--rounds=2", "--batch_size=1", "--memory=false"] if small else []))


def by_benchmark(name: str, device: str, *arguments: str) -> str:
    """What ``make bench`` measures, on this device."""
    script = {"selection": "selection", "step": "overhead"}[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        shell(f"benchmarks/{script}.py", f"--device={device}", f"--out={out}", *arguments)
        _heading, *parts = getattr(performance, name)(json.loads(out.read_text())[name])
    return "\n".join(parts)


def memory(device: str, small: bool) -> str:
    """Peak memory that torch has allocated, of three dense steps and three re-pruned ones."""
    first, lines = llama(256 if small else 2048, 2 if small else 16), []
    ids = torch.randint(32000, (2, BLOCK_SIZE), device=device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("dense", "re-pruned"):
        torch.cuda.reset_peak_memory_stats()
        student, updater = Student(copy.deepcopy(first).to(device)), None
        if name == "re-pruned":
            updater = MaskUpdater(student.model, "2:4", update_freq=1, total_steps=4, end_step=1.0)
        for _ in range(3):
            student.step(batch)
            if updater is not None:
                updater.step()
        lines.append([name, f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"])
        del student, updater
    return rows.table(["run", "MiB"], lines)


def products(device: str, small: bool) -> str:
    """A linear layer in bfloat16, dense and compressed, without gradients."""
    lines = []
    for out_features, in_features in [(128, 128)] if small else SHAPES_OI:
        layer = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
        prune(nn.Sequential(layer), None, "2:4", targets=["0"], criterion=Magnitude())
        sparse = copy.deepcopy(layer)
        compress(sparse)
        for tokens in (16, 256, 4096):
            x_TI = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
            with torch.inference_mode():
                taken = [milliseconds(lambda of=of, x=x_TI: of(x), device) for of in (layer, sparse)]  # type: ignore[misc]
            shape = f"{out_features} x {in_features}"
            lines.append([shape, str(tokens), *(f"{each:.3f}" for each in taken), f"{taken[0] / taken[1]:.2f}"])
    return rows.table(["layer", "tokens", "dense, ms", "2:4, ms", "dense / 2:4"], lines)


def generation(device: str, small: bool) -> str:
    """64 new tokens for 8 prompts of 256, from a random Llama in bfloat16."""
    model, lines = llama(*((256, 2) if small else (2048, 16))).to(device, torch.bfloat16).eval(), []
    prune(model, None, "2:4", criterion=Magnitude())
    ids = torch.randint(32000, (8, 256), device=device)
    for name in ("dense kernels", "2:4"):
        if name == "2:4":
            for layer in [each for each in model.model.modules() if isinstance(each, nn.Linear)]:
                compress(layer)
        run = lambda: model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)  # noqa: E731
        lines.append([name, f"{8 * 64 / (milliseconds(run, device, rounds=3) / 1000):.0f}"])
    return rows.table(["weights", "new tokens a second"], lines)


def run(device: str, small: bool) -> str:
    """100 steps of a recipe, on all GPUs that there are."""
    sizes = [(256, 2)] if small else [(4096, 32)] if torch.cuda.device_count() >= 8 else [(2048, 16)]
    ((width, blocks),) = sizes
    config = "--model.model.init_args.config.{}={}".format
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks}
    shape |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    command = ["-m", "sparse_train.cli.main", "fit", "--config=recipes/pretrain_llama_2of4.yaml"]
    if torch.cuda.device_count() >= 8:
        command.append("--config=configs/strategy/fsdp2.yaml")
    command += ["--trainer.max_steps=100", "--trainer.val_check_interval=100"]
    began = time.perf_counter()
    shell(*command, *(config(name, value) for name, value in shape.items()))
    return f"{width} wide, {blocks} blocks, 100 steps: {time.perf_counter() - began:.0f} s with start and validation."


def ranks(device: str, small: bool) -> str:
    """Dense and re-pruned steps on two processes."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        return "Needs two GPUs."
    sizes = ["--update_freq=2", "--intervals=1", "--batch_size=1"] if small else ["--rounds=2"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "benchmarks/ranks.py", *sizes]
    told = [shell(*command, f"--engine={engine}").strip().splitlines()[-3:] for engine in ("ddp", "fsdp2")]
    return "\n".join(f"- {'; '.join(lines)}" for lines in told)


PARTS = {each.__name__: each for each in (tests, selection, steps, memory, products, generation, ranks, run)}


def main(device: str = "cuda", small: bool = False, parts: list[str] | None = None, out: str = "gpu.md") -> None:
    """Write the page.

    Args:
        device: cuda, or cpu for what works there.
        small: tiny sizes.
        parts: some of tests, selection, steps, memory, products, generation, ranks, run; default: all.
        out: the page.
    """
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    page = [f"# On {torch.cuda.device_count()} x {card}", f"torch {torch.__version__}, CUDA {torch.version.cuda}."]
    for name in parts or PARTS:
        print(f"{name} ...", flush=True)
        try:
            text = PARTS[name](device, small)
        except Exception:  # whatever it is, it stands on the page, and the next part does not need this one
            text = f"**Failed:**\n\n```text\n{traceback.format_exc().strip()}\n```"
        page.append(f"## {name.capitalize()}\n\n{text}")
        Path(out).write_text("\n\n".join(page) + "\n")  # after each part: what is there stays


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
