"""The list of commands, and what help pages say about each."""

from typing import NamedTuple


class Command(NamedTuple):
    """What help pages say; the tests run the examples."""

    summary: str
    example: str


_RUN = "--config recipes/smollm2_2of4.yaml"
COMMANDS = {
    "fit": Command("train sparse with re-pruning", f"sparse-train fit {_RUN}"),
    "validate": Command("perplexity of a training run", f"sparse-train validate {_RUN} --ckpt_path runs/x/last.ckpt"),
    "test": Command("the same on held-out text", f"sparse-train test {_RUN} --ckpt_path runs/x/last.ckpt"),
    "cache-teacher": Command(
        "a teacher's outputs, for runs",
        "sparse-train cache-teacher --config recipes/smollm2_2of4_distill.yaml --model.distillation.cache runs/teacher",
    ),
    "permute": Command("channels in an order for N:M", "sparse-train permute PackagedSmolLM2 runs/permuted"),
    "prune": Command("one-shot pruning", "sparse-train prune PackagedSmolLM2 runs/wanda"),
    "evaluate": Command("perplexity, zero-shot accuracy", "sparse-train evaluate runs/oneshot_wanda_2of4"),
    "export": Command(
        "checkpoint to Hugging Face folder",
        "sparse-train export runs/x/last.ckpt runs/exported --tokenizer PackagedSmolLM2",
    ),
    "inspect": Command("sparsity by layer", "sparse-train inspect runs/oneshot_wanda_2of4"),
    "report": Command("a page about training runs", "sparse-train report runs/smollm2_2of4"),
}

USAGE = """\
usage: sparse-train COMMAND [options]

Keep a language model at a target sparsity while it trains.

commands:
{commands}
"sparse-train COMMAND --help" lists a command's options. --json prints the result as one JSON object; --debug shows
where an error came from. --config also finds the recipes/ and configs/ that come with the package, from any folder, and
may be given several times; later files win.
"""

USAGE_OF_FIT = """\
usage: sparse-train {command} --config FILE [--config FILE ...] [options]

Everything of a run is in recipes; options change a recipe, and have its keys.

  --config FILE                 recipe, or an overlay on the ones before it (recipes/*.yaml, configs/*/*.yaml)
  --model.model MODEL           Hugging Face id, local folder, or a model source such as PackagedSmolLM2
  --model.lr LR                 peak learning rate
  --text FILE [FILE ...]        text to train on: .txt and .jsonl files, or folders of them
  --data.block_size N           tokens per block
  --data.batch_size N           blocks per batch
  --pruning.mask_structure N:M, or unstructured with --pruning.sparsity SHARE
  --pruning.update_freq K       steps between mask updates
  --pruning.ignore+ NAME        a layer, or a part of names, to leave dense; --pruning.targets+ NAME: to prune
  --pruning null                a dense run
  --trainer.max_steps N         length of the run, in optimizer steps
  --trainer.default_root_dir FOLDER
                                where the run writes its checkpoints, logs and report
  --ckpt_path FILE              checkpoint to continue from, or to measure; "last": the newest under default_root_dir
  --export FOLDER               write the trained sparse model there (fit)
  --dtype DTYPE                 dtype in which it is written; default: that of the model's files
  --print_config                print the recipe that results, and stop
  --json                        print one JSON object at the end, and nothing else

all options:
  sparse-train {command} --help pruning   of the callback that keeps the model sparse
  sparse-train {command} --help all       of model, text and Lightning's Trainer

example:
  {example}
"""
"""Written out, because the parser of these commands takes seconds to build."""
