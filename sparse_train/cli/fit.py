"""``sparse-train fit``, ``validate`` and ``test``: their help, without what they run (``lightning_cli``)."""

from typing import Any

from sparse_train.cli.commands import COMMANDS

_HELP = """\
usage: sparse-train {command} --config FILE [--config FILE ...] [options]

{summary}. Everything of a run is in recipes; options change a recipe, and have its keys.

  --config FILE                 recipe, or an overlay on the ones before it (recipes/*.yaml, configs/*/*.yaml)
  --model.model MODEL           Hugging Face id, local folder, or a model source such as PackagedSmolLM2
  --model.lr LR                 peak learning rate
  --text FILE [FILE ...]        text to train on: .txt and .jsonl files, or folders of them
  --data.block_size N           tokens per block
  --data.batch_size N           blocks per batch
  --trainer.callbacks.mask_structure N:M, or unstructured with --...sparsity SHARE
  --trainer.callbacks.update_freq K
                                steps between mask updates
  --trainer.max_steps N         length of the run, in optimizer steps
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


def fit(command: str, options: list[str], debug: bool = False) -> dict[str, Any] | None:
    """Run ``fit``, ``validate`` or ``test``, and return its result for JSON; or print their help."""
    if options[-1:] not in (["--help"], ["-h"]):
        from sparse_train.cli.lightning_cli import run

        more = {"all": ["--help"], "pruning": ["--trainer.callbacks.help", "DynamicPruning"]}
        options = more.get(options[-1], options) if options[-2:-1] == ["--help"] else options
        return run([command, *options], debug=debug).result
    about = COMMANDS[command]
    summary = about.summary[0].upper() + about.summary[1:]
    print(_HELP.format(command=command, summary=summary, example=about.example), end="")
    return None
