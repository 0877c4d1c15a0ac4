"""The arms of ``benchmarks/quality.py``: each is a recipe with changes."""

from dataclasses import dataclass, field
from pathlib import Path

from sparse_train import (
    IHT,
    OWL,
    Criterion,
    Pattern,
    Solver,
    SparseGPT,
    SparsityDistribution,
    Uniform,
    Unstructured,
    Wanda,
)
from sparse_train.data.texts import PackagedWikipedia, PythonStandardLibrary, TextSource

_DISTILLATION = [
    "--model.distillation=Distillation",
    "--model.distillation.hardness_ce=0.33",
    "--model.distillation.hardness_kldiv=0.67",
    "--model.distillation.temperature=2.0",
]


@dataclass(frozen=True)
class Untrained:
    """An arm without training, calibrated on the same batches as the first mask of the trained arms.

    Args:
        method: criterion or solver; None leaves the model dense.
        mask_structure, sparsity, distribution: see ``sparse_train.prune``.
        permuted: whether channels are put in another order before, see ``sparse_train.permute``.
    """

    method: Criterion | Solver | None
    mask_structure: str | Pattern = "2:4"
    sparsity: float | None = None
    distribution: SparsityDistribution = field(default_factory=Uniform)
    permuted: bool = False


@dataclass(frozen=True)
class Arm:
    """A trained arm.

    Args:
        recipe: in recipes/.
        changes: arguments after it.
        teacher: whether it learns from the model that --teacher names.
        start: one of ``ONESHOT``: the arm starts from its model, pruned or permuted; default: the dense model.
        text: the text to train on; its validation and test articles, or files, are used for evaluation.
    """

    recipe: str
    changes: list[str] = field(default_factory=list)
    teacher: bool = False
    start: str | None = None
    text: TextSource = field(default_factory=PackagedWikipedia)

    def options(self) -> list[str]:
        """Those of ``sparse-train fit``. The run's criterion makes the first mask unless the arm changes that, whatever
        the recipe says: a row can be rerun after the recipe has got a better default."""
        by_criterion = '--pruning.first_mask={"class_path": "OneShot", "init_args": {"criterion": null}}'
        prunes = "mask_structure" in Path(self.recipe).read_text() and self.start in (None, "permuted")
        return [f"--config={self.recipe}", *([by_criterion] if prunes else []), *self.changes]


def _arm(
    recipe: str,
    *changes: str,
    teacher: bool = False,
    distil: bool = False,
    start: str | None = None,
    text: TextSource | None = None,
) -> Arm:
    own = [change if change.startswith("--") else f"--pruning.{change}" for change in changes]
    learns = _DISTILLATION if distil or teacher else []
    return Arm(f"recipes/{recipe}.yaml", learns + own, teacher, start, text or PackagedWikipedia())


def _python(*changes: str) -> Arm:
    """Trained on Python code, and calibrated on it."""
    return _arm("smollm2_2of4_domain", *changes, text=PythonStandardLibrary())


def _shifted(*changes: str) -> Arm:
    """Calibrated on Wikipedia, trained on Python code."""
    return _python("--data.calibration_text=PackagedWikipedia", *changes)


ONESHOT = {
    "oneshot_wanda": Untrained(Wanda()),
    "oneshot_sparsegpt": Untrained(SparseGPT()),
    "oneshot_wanda_70": Untrained(Wanda(), "unstructured", 0.7),
    "oneshot_sparsegpt_70": Untrained(SparseGPT(), Unstructured("row"), 0.7),
    "oneshot_iht": Untrained(IHT()),
    "oneshot_iht_damped10": Untrained(IHT(dampening_frac=0.1)),
    "oneshot_iht_70": Untrained(IHT(), "unstructured", 0.7),
    "oneshot_iht_70_damped10": Untrained(IHT(dampening_frac=0.1), "unstructured", 0.7),
    "permuted": Untrained(None, permuted=True),
    "oneshot_wanda_permuted": Untrained(Wanda(), permuted=True),
    "oneshot_iht_permuted_damped10": Untrained(IHT(dampening_frac=0.1), permuted=True),
    "oneshot_iht_asymmetric": Untrained(IHT(dampening_frac=0.1, asymmetric=True)),
    "oneshot_iht_70_asymmetric": Untrained(IHT(dampening_frac=0.1, asymmetric=True), "unstructured", 0.7),
    "oneshot_owl_70": Untrained(Wanda(), "unstructured", 0.7, OWL()),
}
_WANDA_FIRST = ("first_mask=OneShot", "first_mask.criterion=Wanda")
_FROM_WANDA = ("criterion=Magnitude", *_WANDA_FIRST)
_CUBIC = ("criterion=Magnitude", "policy=Fixed", "schedule=Cubic", "end_step=0.5")
_GRADUAL = (*_CUBIC, "schedule.final_sparsity=0.5")  # N:M rounds down: 2:4 is only reached at the schedule's end
_AST = ("criterion=Magnitude", "policy=variants.RisingDecay", "end_step=1.0")
_CAST = ("criterion=Magnitude", "policy=variants.GrowingDecay", "end_step=1.0")
_SRSTE = ("criterion=Magnitude", "policy=variants.CoupledDecay", "update_freq=1", "window=1", "end_step=1.0")
_OF_DENSE = "--model.distillation.teacher=PackagedSmolLM2"
_FROM_ZEROS = ("first_mask=FromZeros", _OF_DENSE)
_SOLVED = "first_mask.criterion=SparseGPT"
_IHT = ("first_mask.criterion=IHT", "first_mask.criterion.dampening_frac=0.1")  # the default when these arms were run
_ASYMMETRIC = (*_IHT, "first_mask.criterion.asymmetric=true")
_128_PERMUTED = (*_IHT, "first_mask.samples=128", _OF_DENSE)
_BETAS99 = "--model.betas=[0.9,0.99]"
_KL = ("--model.distillation.hardness_ce=0", "--model.distillation.hardness_kldiv=1")
_T1 = "--model.distillation.temperature=1"
_EVEN = ("--model.distillation.hardness_ce=0.5", "--model.distillation.hardness_kldiv=0.5")
_70 = ("mask_structure=unstructured", "sparsity=0.7")
_GRADUAL_70 = (*_CUBIC, "schedule.final_sparsity=0.7")

# Names: static = a mask that is kept, dynamic = one that is re-pruned; 2:4, or _70 = 70 % unstructured; _distill = with
# the dense model as teacher, _distill_tuned = with one that was fine-tuned; first mask by Wanda, or _iht, _sparsegpt;
# IHT's dampening_frac is 0.1, or _damped01 = 0.01 (as in the arms on Python code), _damped100 = 1.
ARMS: dict[str, Arm] = {
    "dense": _arm("smollm2_dense"),
    # 2:4: static, re-pruned (every 10 steps, cumulative norms: the defaults), gradual
    "static": _arm("smollm2_2of4_static"),
    "static_ste": _arm("smollm2_2of4", "end_step=0"),
    "dynamic": _arm("smollm2_2of4"),
    "dynamic_k50": _arm("smollm2_2of4", "update_freq=50"),
    "dynamic_k1": _arm("smollm2_2of4", "update_freq=1", "window=1"),
    "dynamic_k1_stop100": _arm("smollm2_2of4", "update_freq=1", "window=1", "end_step=1.0"),
    "gradual_magnitude": _arm("smollm2_2of4", *_GRADUAL),
    # which score, from the same first mask
    "dynamic_magnitude": _arm("smollm2_2of4", *_FROM_WANDA),
    "dynamic_frozen_norms": _arm("smollm2_2of4", "criterion=variants.FirstNorms"),
    "dynamic_window": _arm("smollm2_2of4", "norm_decay=0"),
    "dynamic_memory90": _arm("smollm2_2of4", "norm_decay=0.9"),
    "dynamic_dense_norms": _arm("smollm2_2of4", "window=1", "--trainer.callbacks+=variants.DenseNorms"),
    "dynamic_dense_norms_stop100": _arm(
        "smollm2_2of4", "window=1", "end_step=1.0", "--trainer.callbacks+=variants.DenseNorms"
    ),
    # decay of shadow values, and when updates stop
    "dynamic_decay": _arm("smollm2_2of4", "policy=StraightThrough", "policy.srste_decay=0.01"),
    "dynamic_decay2": _arm("smollm2_2of4", "policy=StraightThrough", "policy.srste_decay=0.02"),
    "dynamic_decay_coupled": _arm("smollm2_2of4", "policy=variants.CoupledDecay"),
    "dynamic_stop50": _arm("smollm2_2of4", "end_step=0.5"),
    "dynamic_stop100": _arm("smollm2_2of4", "end_step=1.0"),
    # no gradient to pruned weights, which come back with their former value
    "dynamic_dormant": _arm("smollm2_2of4", "policy=Dormant"),
    "dynamic_dormant_distill": _arm("smollm2_2of4", "policy=Dormant", distil=True),
    # from IHT's mask and weights; its pruned weights have values to come back with
    "static_iht": _arm("smollm2_2of4_static", *_IHT),
    "dynamic_iht": _arm("smollm2_2of4", *_IHT),
    # distillation from the untouched model, and from the one that --teacher names
    "static_distill": _arm("smollm2_2of4_static", distil=True),
    "dynamic_distill": _arm("smollm2_2of4", distil=True),
    "dynamic_window_distill": _arm("smollm2_2of4", "norm_decay=0", distil=True),
    "static_distill_tuned": _arm("smollm2_2of4_static", teacher=True),
    "dynamic_distill_tuned": _arm("smollm2_2of4", teacher=True),
    # a better start: SparseGPT's mask and weights; masks that move only early
    "static_sparsegpt_distill": _arm("smollm2_2of4_static", *_FROM_ZEROS, start="oneshot_sparsegpt", distil=True),
    "static_iht_distill": _arm("smollm2_2of4_static", *_IHT, distil=True),
    "static_iht_ste_distill": _arm("smollm2_2of4", "end_step=0", *_IHT, distil=True),
    "dynamic_iht_distill": _arm("smollm2_2of4", *_IHT, distil=True),
    "static_iht_damped01_distill": _arm("smollm2_2of4_static", "first_mask.criterion=IHT", distil=True),
    "static_iht_damped100_distill": _arm(
        "smollm2_2of4_static", "first_mask.criterion=IHT", "first_mask.criterion.dampening_frac=1.0", distil=True
    ),
    "static_iht_128_distill": _arm("smollm2_2of4_static", *_IHT, "first_mask.samples=128", distil=True),
    "static_iht_permuted_distill": _arm("smollm2_2of4_static", *_IHT, _OF_DENSE, start="permuted", distil=True),
    "static_iht_asymmetric_distill": _arm("smollm2_2of4_static", *_ASYMMETRIC, distil=True),
    "static_iht_128_permuted_distill": _arm("smollm2_2of4_static", *_128_PERMUTED, start="permuted", distil=True),
    "static_iht_128_permuted_distill_betas99": _arm(
        "smollm2_2of4_static", *_128_PERMUTED, _BETAS99, start="permuted", distil=True
    ),
    "static_iht_distill_kl": _arm("smollm2_2of4_static", *_IHT, *_KL, distil=True),
    "static_iht_distill_t1": _arm("smollm2_2of4_static", *_IHT, _T1, distil=True),
    "dynamic_iht_distill_t1": _arm("smollm2_2of4", *_IHT, _T1, distil=True),
    "dynamic_distill_t1": _arm("smollm2_2of4", _T1, distil=True),
    "static_distill_t1": _arm("smollm2_2of4_static", _T1, distil=True),
    "static_iht_distill_even": _arm("smollm2_2of4_static", *_IHT, *_EVEN, distil=True),
    "static_iht_distill_betas99": _arm("smollm2_2of4_static", *_IHT, _BETAS99, distil=True),
    "static_iht_distill_warmup0": _arm("smollm2_2of4_static", *_IHT, "--model.warmup=0", distil=True),
    "static_iht_distill_warmup20": _arm("smollm2_2of4_static", *_IHT, "--model.warmup=0.2", distil=True),
    "static_iht_distill_wd10": _arm("smollm2_2of4_static", *_IHT, "--model.weight_decay=0.1", distil=True),
    "dynamic_iht_damped01_distill": _arm("smollm2_2of4", "first_mask.criterion=IHT", distil=True),
    "dynamic_dormant_iht_distill": _arm("smollm2_2of4", "policy=Dormant", *_IHT, distil=True),
    "dynamic_dormant_stop25_distill": _arm("smollm2_2of4", "policy=Dormant", "end_step=0.25", distil=True),
    # AST (arXiv 2407.20584): magnitude from the start, a decay that rises for a quarter of the run, masks never frozen
    "ast_distill": _arm("smollm2_2of4", *_AST, distil=True),
    # CAST (arXiv 2509.25996), without scales: dense forwards, and a growing decay of what magnitude prunes
    "cast_distill": _arm("smollm2_2of4", *_CAST, distil=True),
    "cast10_distill": _arm("smollm2_2of4", *_CAST, "policy.rate=10", distil=True),
    # trained on another text than the first mask was calibrated on
    "static_shift": _shifted("policy=Fixed"),
    "dynamic_frozen_norms_shift": _shifted("criterion=variants.FirstNorms"),
    "dynamic_shift": _shifted(),
    "static_iht_shift": _shifted("policy=Fixed", "first_mask.criterion=IHT"),
    "dynamic_iht_shift": _shifted("first_mask.criterion=IHT"),
    # the same text, calibrated on it
    "dynamic_python": _python(),
    "static_iht_python": _python("policy=Fixed", "first_mask.criterion=IHT"),
    "dynamic_iht_python": _python("first_mask.criterion=IHT"),
    # unstructured
    "static_70": _arm("smollm2_unstructured70", "policy=Fixed"),
    "dynamic_70": _arm("smollm2_unstructured70"),
    "dynamic_frozen_norms_70": _arm("smollm2_unstructured70", "criterion=variants.FirstNorms"),
    "dynamic_magnitude_70": _arm("smollm2_unstructured70", *_FROM_WANDA),
    "dynamic_k50_70": _arm("smollm2_unstructured70", "update_freq=50"),
    "gradual_magnitude_70": _arm("smollm2_unstructured70", *_GRADUAL_70),
    # layers of different sparsities
    "static_owl_70": _arm("smollm2_unstructured70", "distribution=OWL", "policy=Fixed"),
    "dynamic_owl_70": _arm("smollm2_unstructured70", "distribution=OWL"),
    "static_iht_70": _arm("smollm2_unstructured70", "policy=Fixed", *_IHT),
    "dynamic_iht_70": _arm("smollm2_unstructured70", *_IHT),
    "static_70_distill": _arm("smollm2_unstructured70", "policy=Fixed", distil=True),
    "dynamic_70_distill": _arm("smollm2_unstructured70", distil=True),
    "dynamic_dormant_70_distill": _arm("smollm2_unstructured70", "policy=Dormant", distil=True),
    "regrow_70_distill": _arm("smollm2_unstructured70", "policy=Regrow", distil=True),
    "regrow5_70_distill": _arm("smollm2_unstructured70", "policy=Regrow", "policy.drop_fraction=0.05", distil=True),
    # RigL (arXiv 1911.11134), from Wanda's first mask
    "rigl_70_distill": _arm("smollm2_unstructured70", *_FROM_WANDA, "policy=Regrow", distil=True),
    # other methods at 70 %, with the same teacher: AST, CAST, SR-STE (arXiv 2102.04010: magnitude at each step),
    # gradual magnitude, SparseGPT's mask and weights, LoRA on a pruned model
    "ast_70_distill": _arm("smollm2_unstructured70", *_AST, distil=True),
    "srste_70_distill": _arm("smollm2_unstructured70", *_SRSTE, distil=True),
    "gradual_magnitude_70_distill": _arm("smollm2_unstructured70", *_GRADUAL_70, distil=True),
    "dynamic_dormant_sparsegpt_70_distill": _arm("smollm2_unstructured70", "policy=Dormant", _SOLVED, distil=True),
    "static_sparsegpt_70_distill": _arm(
        "smollm2_unstructured70", *_FROM_ZEROS, "policy=Fixed", start="oneshot_sparsegpt_70", distil=True
    ),
    "dynamic_from_sparsegpt_70_distill": _arm(
        "smollm2_unstructured70", *_FROM_ZEROS, start="oneshot_sparsegpt_70", distil=True
    ),
    "static_iht_70_distill": _arm("smollm2_unstructured70", "policy=Fixed", *_IHT, distil=True),
    "static_iht_damped01_70_distill": _arm(
        "smollm2_unstructured70", "policy=Fixed", "first_mask.criterion=IHT", distil=True
    ),
    "static_iht_70_distill_t1": _arm("smollm2_unstructured70", "policy=Fixed", *_IHT, _T1, distil=True),
    "dynamic_iht_70_distill_t1": _arm("smollm2_unstructured70", *_IHT, _T1, distil=True),
    "static_iht_asymmetric_70_distill": _arm("smollm2_unstructured70", "policy=Fixed", *_ASYMMETRIC, distil=True),
    "dynamic_iht_70_distill": _arm("smollm2_unstructured70", *_IHT, distil=True),
    "dynamic_memory50_iht_70_distill": _arm("smollm2_unstructured70", *_IHT, "norm_decay=0.5", distil=True),
    "dynamic_dormant_iht_70_distill": _arm("smollm2_unstructured70", "policy=Dormant", *_IHT, distil=True),
    "lora_70_distill": _arm("smollm2_2of4_lora", *_70, distil=True),
    # low-rank, on q and v: outside the mask, where merging loses zeros, and inside it
    "lora": _arm("smollm2_2of4_lora"),
    "mask_lora": _arm("smollm2_2of4_mask_lora"),
    # from scratch: smoke runs
    "scratch_dense": _arm("pretrain_llama_dense"),
    "scratch_2of4": _arm("pretrain_llama_2of4"),
    "scratch_unstructured50": _arm("pretrain_llama_2of4", "mask_structure=unstructured"),
}
