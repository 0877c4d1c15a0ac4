"""``Distillation``: train a student also on the outputs of a teacher, such as the dense model that it was pruned from.

Shape suffixes: B batch, L sequence length, K tokens kept of the vocabulary.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sparse_train.arguments import check_positive
from sparse_train.files import reading, replacing
from sparse_train.inspection import layer_sparsities, pruned_layers
from sparse_train.models.losses import TopK, distillation_loss, top_k
from sparse_train.models.sources import ModelSource, as_model_source

_NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "use_cache")
"""Entries of a configuration that do not change what a model says."""


class Teacher:
    """A transformers model, frozen in place, in eval mode; called with the inputs of a batch, it gives its logits.

    Not an ``nn.Module``, so that a module that holds a teacher does not have its weights among its parameters, in its
    state dict or in checkpoints, and pruning, optimizers and sharding engines do not find them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.model(use_cache=False, **inputs).logits


class CachedTeacher:
    """A teacher's outputs for blocks of tokens, kept in a folder; the teacher computes only those that are not there.

    A block's file of safetensors is named by its content, so that the order of blocks, the batch size and the number of
    processes may change, and several runs may share a folder. It holds a ``TopK``, its log-probabilities in float16:
    down to -16 they are off by 0.004 at most.

    Args:
        folder: of one teacher, temperature and K.
        load: gives the teacher, at the first block that is not in the folder.
        k, temperature: of ``top_k``.
    """

    def __init__(self, folder: Path, load: Callable[[], Teacher], k: int, temperature: float) -> None:
        self.folder, self.load, self.k, self.temperature = folder, load, k, temperature
        folder.mkdir(parents=True, exist_ok=True)
        self._teacher: Teacher | None = None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> TopK:
        blocks = zip(input_ids.cpu(), attention_mask.to("cpu", input_ids.dtype), strict=True)
        names = [hashlib.sha256(torch.stack(block).numpy().tobytes()).hexdigest() for block in blocks]
        paths = [self.folder / f"{name}.safetensors" for name in names]
        new = [i for i, path in enumerate(paths) if not path.exists()]
        if new:
            self._teacher = self._teacher or self.load()
            logits_BLV = self._teacher(input_ids=input_ids[new], attention_mask=attention_mask[new])
            ids_BLK, log_probs_BLK, log_rest_BL = (part.cpu() for part in top_k(logits_BLV, self.k, self.temperature))
            for i, *answer in zip(new, ids_BLK, log_probs_BLK.half(), log_rest_BL, strict=True):
                _write(paths[i], TopK(*answer))
        ids, log_probs, log_rest = zip(*map(_read, paths), strict=True)
        parts = ids, [each.float() for each in log_probs], log_rest
        return TopK(*(torch.stack(part).to(input_ids.device) for part in parts))


def _write(path: Path, answer: TopK) -> None:
    with replacing(path, uuid.uuid4().hex) as beside:  # of no other run that writes here
        beside.write_bytes(save(answer._asdict()))


def _read(path: Path) -> TopK:
    with reading(path, lambda: " It is a part of a teacher's cache: remove it, and it is made anew."):
        return TopK(**load_file(path))


class Distillation:
    """Train on ``hardness_ce * CE + hardness_kldiv * KL``, see ``distillation_loss``.

    The defaults are the plain sum. AST (Huang et al., arXiv 2407.20584), 2:4 with changing masks, weights CE and KL 1
    to 2 at temperature 2. docs/settings.md says what to set.

    Args:
        teacher: a model source, or a Hugging Face id or local folder, with the student's tokenizer. Default: the
            student's own source, that is the model before it was pruned. Every device holds the whole teacher, in the
            dtype that its source gives (under true half precision, in that of the run).
        hardness_ce: weight of cross-entropy on the text, at least 0.
        hardness_kldiv: weight of the KL divergence from the teacher's next-token distribution, above 0.
        temperature: of both distributions in the divergence.
        cache: folder for the teacher's ``top_k`` most likely tokens at each position. What is there is read, and the
            rest is added, so that a second run on the same blocks (another learning rate or method) loads the teacher
            only to tell whose the folder is. About 6 * top_k bytes a token. The divergence then counts all other
            tokens as one.
        top_k: K of the cache.
    """

    def __init__(
        self,
        teacher: ModelSource | str | None = None,
        hardness_ce: float = 1.0,
        hardness_kldiv: float = 1.0,
        temperature: float = 1.0,
        cache: str | None = None,
        top_k: int = 64,
    ) -> None:
        if not 0 <= hardness_ce < math.inf:
            raise ValueError(f"hardness_ce is the weight of a loss, at least 0 and finite, got {hardness_ce}.")
        for name, value in (("hardness_kldiv", hardness_kldiv), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be above 0 and finite, got {value}. Without a teacher, leave distillation out."
                )
        check_positive("top_k", top_k)
        self.teacher = None if teacher is None else as_model_source(teacher)
        self.hardness_ce, self.hardness_kldiv, self.temperature = hardness_ce, hardness_kldiv, temperature
        self.cache, self.top_k = cache, top_k

    def load_teacher(
        self, source: ModelSource, student: Any, prepared: Callable[[Any], Any], precision: str
    ) -> Teacher | CachedTeacher:
        """The teacher, or what is known of it.

        Args:
            source: that of the student, used if ``teacher`` is None.
            student: the transformers model to be trained, which the teacher has to match.
            prepared: makes a model compute where and as the run does.
            precision: of the run; what is cached depends on it.
        """
        chosen = self.teacher or source
        model = chosen.load()
        if self.teacher is None and (zeros := pruned_layers(layer_sparsities(model))):
            raise ValueError(
                f"{source.name} was pruned before ({len(zeros)} of its layers), so it would teach itself. Name the "
                "dense model as distillation.teacher."
            )
        theirs, own = (each.config.get_text_config().vocab_size for each in (model, student))
        if theirs != own:
            raise ValueError(
                f"The teacher {chosen.name} has a vocab_size of {theirs} and the student {source.name} one of {own}. "
                "Choose a teacher that fits, or none: the default is the student's dense model."
            )
        if self.cache is None:
            return Teacher(prepared(model))
        key = f"{digest(model)[:16]}-{precision}-temperature{self.temperature:g}-top{self.top_k}"
        folder = Path(self.cache).expanduser() / key
        return CachedTeacher(folder, lambda: Teacher(prepared(chosen.load())), self.top_k, self.temperature)

    def loss(self, student_BLV: Tensor, teacher_BLV: Tensor | TopK, labels_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``distillation_loss`` with these weights and this temperature."""
        hardness = self.hardness_ce, self.hardness_kldiv
        return distillation_loss(student_BLV, teacher_BLV, labels_BL, self.temperature, *hardness)


def digest(model: Any) -> str:
    """Of the names and bytes of all weights, and of the configuration, without what says where it is from."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED}
    sha256 = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def cast_linear(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of linear layers as autocast would cast them at every forward; what they compute is the same."""
    for layer in model.modules():
        if type(layer) is nn.Linear:  # subclasses may hold other things, such as quantised weights
            # a new parameter, so that tied embeddings keep theirs
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
