"""The list of commands, and what help pages say about each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What help pages say about a command.

    Args:
        summary: a few words.
        examples: command lines, each of them run by the tests.
        positional: arguments that may also be given by their place. "runs..." takes all that follow.
    """

    summary: str
    examples: tuple[str, ...]
    positional: tuple[str, ...] = ()


COMMANDS = {
    "fit": Command(
        "train sparse with re-pruning",
        (
            "sparse-train fit --config recipes/smollm2_2of4.yaml",
            "sparse-train fit --config recipes/smollm2_2of4.yaml --trainer.max_steps 50 --export runs/sparse",
            "sparse-train fit --config recipes/smollm2_2of4.yaml --trainer.callbacks.init_args.update_freq 20",
            "sparse-train fit --config recipes/smollm2_2of4.yaml --config configs/precision/float32.yaml",
            "sparse-train fit --config recipes/smollm2_2of4.yaml --text my_text.txt",
        ),
    ),
    "validate": Command(
        "perplexity of a training run",
        ("sparse-train validate --config recipes/smollm2_2of4.yaml --ckpt_path runs/x/last.ckpt",),
    ),
    "test": Command(
        "the same on held-out text",
        ("sparse-train test --config recipes/smollm2_2of4.yaml --ckpt_path runs/x/last.ckpt",),
    ),
    "prune": Command(
        "one-shot pruning",
        (
            "sparse-train prune PackagedSmolLM2 runs/wanda",
            "sparse-train prune PackagedSmolLM2 runs/ria --mask_structure 4:8 --criterion RIA",
            "sparse-train prune PackagedSmolLM2 runs/own_text --text my_text.txt",
            "sparse-train prune --config recipes/oneshot_wanda_2of4.yaml",
        ),
        ("model", "out"),
    ),
    "evaluate": Command(
        "perplexity, zero-shot accuracy",
        (
            "sparse-train evaluate runs/oneshot_wanda_2of4",
            "sparse-train evaluate runs/oneshot_wanda_2of4 --text my_text.txt",
        ),
        ("model",),
    ),
    "export": Command(
        "checkpoint to Hugging Face folder",
        ("sparse-train export runs/x/last.ckpt runs/exported --tokenizer PackagedSmolLM2",),
        ("checkpoint", "out"),
    ),
    "inspect": Command(
        "sparsity by layer",
        (
            "sparse-train inspect runs/oneshot_wanda_2of4",
            "sparse-train inspect runs/oneshot_wanda_2of4 --json",
        ),
        ("model",),
    ),
    "report": Command(
        "a page about training runs",
        (
            "sparse-train report runs/smollm2_2of4",
            "sparse-train report runs/smollm2_2of4/version_0 runs/smollm2_dense/version_0",
        ),
        ("runs...",),
    ),
}
