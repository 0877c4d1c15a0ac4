"""What transformers' ``Trainer`` does not tell its callbacks, and does not ask them.

It does not tell which checkpoint it resumes from, only the step. And those who report (TensorBoard, W&B) stand before a
user's callbacks and get a row first, so that nothing put into it by ``on_log`` would reach them.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint


def teach(kind: type[Any]) -> None:
    """Make all trainers tell callbacks of this class what they resume from, and ask them what to log; once.

    Args:
        kind: has ``resume_from(folder: Path | None)``, called as a run begins; None = it starts anew. And
            ``take_metrics() -> dict[str, float]``, what is to be added to the row that is logged.
    """
    train, log = Trainer.train, Trainer.log
    if getattr(log, "adds_sparsity", False):
        return

    def ours(trainer: Any) -> list[Any]:
        return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]

    @functools.wraps(train)
    def telling(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        for callback in ours(self):
            callback.resume_from(Path(folder) if folder else None)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(log)
    def asking(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        for callback in ours(self):
            logs.update(callback.take_metrics())
        return log(self, logs, *args, **kwargs)

    asking.adds_sparsity = True  # type: ignore[attr-defined]
    Trainer.train, Trainer.log = telling, asking
