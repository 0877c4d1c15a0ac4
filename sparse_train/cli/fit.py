"""``sparse-train fit``, ``validate`` and ``test``: their help, without what they run (``lightning_cli``)."""

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
  --trainer.callbacks.init_args.mask_structure N:M, or unstructured with --...init_args.sparsity SHARE
  --trainer.callbacks.init_args.update_freq K
                                steps between mask updates
  --trainer.max_steps N         length of the run, in optimizer steps
  --ckpt_path FILE              checkpoint to continue from, or to measure; "last": the newest under default_root_dir
  --export FOLDER               write the trained sparse model there (fit)
  --print_config                print the recipe that results, and stop
  --json                        print one JSON object at the end, and nothing else

all options of one kind:
  sparse-train {command} --help model      the model, its optimizer, distillation
  sparse-train {command} --help data       text, blocks and batches
  sparse-train {command} --help pruning    DynamicPruning, the callback that keeps the model sparse
  sparse-train {command} --help trainer    Lightning's Trainer
  sparse-train {command} --help all        everything on one page

examples:
{examples}"""


def fit(command: str, options: list[str], debug: bool = False) -> None:
    """Run ``fit``, ``validate`` or ``test``, or print their help."""
    asked = next((index for index, option in enumerate(options) if option in ("-h", "--help")), None)
    kind = "all" if asked is None else next(iter(options[asked + 1 :]), "")
    if kind in ("model", "data", "pruning", "trainer"):
        from sparse_train.cli.lightning_cli import print_help

        print_help(command, kind)
    elif kind == "all":
        from sparse_train.cli.lightning_cli import run

        run([command, *(options if asked is None else ["--help"])], debug=debug)
    else:
        summary = COMMANDS[command].summary
        examples = "".join(f"  {line}\n" for line in COMMANDS[command].examples)
        print(_HELP.format(command=command, summary=summary[0].upper() + summary[1:], examples=examples), end="")
