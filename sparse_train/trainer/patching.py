"""Changes to transformers' ``Trainer``, for what its callbacks are not told and cannot change."""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from sparse_train.trainer.checks import check_one


def patch_trainer(kind: type[Any]) -> None:
    """Replace three methods of the class ``Trainer``, once. Trainers without a callback of ``kind`` behave as before.

    - ``Trainer.train`` first calls ``resume_from`` of such callbacks: the Trainer tells its callbacks which step it
      resumes, but not from which folder.
    - ``Trainer.log`` first adds what their ``take_metrics`` returns to rows of training: those with the key ``loss``,
      and the summary of a run, which has ``train_loss``. Reporters (TensorBoard, W&B) come before a user's callbacks,
      so that nothing added in ``on_log`` would reach them. Rows of evaluations stay unchanged: ``evaluate`` returns
      them, and the Trainer writes them into model cards.

    - ``Trainer.save_model``, where it writes the model of a checkpoint, then calls their ``save_state``. In ``on_save``
      it would be too late: the Trainer has deleted older checkpoints by then, and may have begun to upload the new one.

    To undo it: ``Trainer.train = Trainer.train.__wrapped__``, and so on.

    Args:
        kind: has ``resume_from(folder: Path | None)``, with None for a new run, ``take_metrics() -> dict[str, float]``
            and ``save_state(args, state, folder: Path)``.
    """
    train, log, save_model = Trainer.train, Trainer.log, Trainer.save_model
    if getattr(log, "adds_sparsity", False):
        return

    def callbacks_of(trainer: Any) -> list[Any]:
        return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]

    @functools.wraps(train)
    def train_telling(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        check_one(callbacks_of(self))
        for callback in callbacks_of(self):
            callback.resume_from(Path(folder) if folder else None)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(log)
    def log_asking(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs or "train_loss" in logs:
            for callback in callbacks_of(self):
                logs.update(callback.take_metrics())
        return log(self, logs, *args, **kwargs)

    @functools.wraps(save_model)
    def save_with_state(self: Any, output_dir: Any = None, _internal_call: bool = False) -> Any:
        saved = save_model(self, output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            for callback in callbacks_of(self):
                callback.save_state(self.args, self.state, Path(output_dir))
        return saved

    log_asking.adds_sparsity = True  # type: ignore[attr-defined]
    Trainer.train, Trainer.log, Trainer.save_model = train_telling, log_asking, save_with_state
