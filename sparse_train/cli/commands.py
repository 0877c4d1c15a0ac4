"""The list of commands, and what help pages say about each."""

from typing import NamedTuple


class Command(NamedTuple):
    """What help pages say; the tests run the examples."""

    summary: str
    example: str
    positional: tuple[str, ...] = ()
    """Arguments that may also be given by their place. "runs..." takes all that follow."""


_RUN = "--config recipes/smollm2_2of4.yaml"
COMMANDS = {
    "fit": Command("train sparse with re-pruning", f"sparse-train fit {_RUN}"),
    "validate": Command("perplexity of a training run", f"sparse-train validate {_RUN} --ckpt_path runs/x/last.ckpt"),
    "test": Command("the same on held-out text", f"sparse-train test {_RUN} --ckpt_path runs/x/last.ckpt"),
    "prune": Command("one-shot pruning", "sparse-train prune PackagedSmolLM2 runs/wanda", ("model", "out")),
    "evaluate": Command("perplexity, zero-shot accuracy", "sparse-train evaluate runs/oneshot_wanda_2of4", ("model",)),
    "export": Command(
        "checkpoint to Hugging Face folder",
        "sparse-train export runs/x/last.ckpt runs/exported --tokenizer PackagedSmolLM2",
        ("checkpoint", "out"),
    ),
    "inspect": Command("sparsity by layer", "sparse-train inspect runs/oneshot_wanda_2of4", ("model",)),
    "report": Command("a page about training runs", "sparse-train report runs/smollm2_2of4", ("runs...",)),
}
