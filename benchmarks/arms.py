"""The arms of ``benchmarks/quality.py``: each is a recipe with changes."""

from dataclasses import dataclass, field

from sparse_train import OWL, Allocation, Criterion, Magnitude, Solver, SparseGPT, Wanda
from sparse_train.data.texts import PackagedWikipedia, PythonStandardLibrary, TextSource

_P = "--trainer.callbacks.init_args"
_DISTILLATION = [
    "--model.distillation=Distillation",
    "--model.distillation.hardness_ce=0.33",
    "--model.distillation.hardness_kldiv=0.67",
    "--model.distillation.temperature=2.0",
]


@dataclass(frozen=True)
class OneShot:
    """An arm without training, calibrated on the same batches as the first mask of the trained arms.

    Args:
        method: criterion or solver.
        mask_structure, sparsity, allocation: see ``sparse_train.prune``.
    """

    method: Criterion | Solver
    mask_structure: str = "2:4"
    sparsity: float | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True)
class Arm:
    """A trained arm.

    Args:
        recipe: in recipes/.
        changes: arguments after it.
        teacher: whether it learns from the model that --teacher names.
        start: one of ``ONESHOT``: the arm starts from its pruned model, with zeros; default: the dense model.
        text: the text to train on; its validation and test articles, or files, are used for evaluation.
    """

    recipe: str
    changes: list[str] = field(default_factory=list)
    teacher: bool = False
    start: str | None = None
    text: TextSource = field(default_factory=PackagedWikipedia)


def _arm(
    recipe: str,
    *changes: str,
    teacher: bool = False,
    distil: bool = False,
    start: str | None = None,
    text: TextSource | None = None,
) -> Arm:
    own = [change if change.startswith("--") else f"{_P}.{change}" for change in changes]
    learns = _DISTILLATION if distil or teacher else []
    return Arm(f"recipes/{recipe}.yaml", learns + own, teacher, start, text or PackagedWikipedia())


def _shifted(*changes: str) -> Arm:
    """Calibrated on Wikipedia, trained on Python code."""
    text = PythonStandardLibrary()
    return _arm("smollm2_2of4_domain", "--data.calibration_text=PackagedWikipedia", *changes, text=text)


ONESHOT = {
    "oneshot_wanda": OneShot(Wanda()),
    "oneshot_magnitude": OneShot(Magnitude()),
    "oneshot_sparsegpt": OneShot(SparseGPT()),
    "oneshot_wanda_70": OneShot(Wanda(), "unstructured", 0.7),
    "oneshot_owl_70": OneShot(Wanda(), "unstructured", 0.7, OWL()),
}
_FROM_WANDA = ("criterion=Magnitude", "initial_criterion=Wanda")
_GRADUAL = (
    *("criterion=Magnitude", "policy=Fixed", "schedule=Cubic", "schedule.final_sparsity=0.5"),
    "end_step=0.5",  # N:M rounds down, so 2:4 is only reached at the end of the schedule
)
_DECAY = ("policy=StraightThrough", "policy.srste_decay=0.01")
_70 = ("mask_structure=unstructured", "sparsity=0.7")

ARMS: dict[str, Arm] = {
    "dense": _arm("smollm2_dense"),
    # 2:4: static, re-pruned (every 10 steps, cumulative norms: the defaults), gradual
    "static": _arm("smollm2_2of4_static"),
    "static_ste": _arm("smollm2_2of4", "end_step=0"),
    "dynamic": _arm("smollm2_2of4"),
    "dynamic_k50": _arm("smollm2_2of4", "update_freq=50"),
    "dynamic_k1": _arm("smollm2_2of4", "update_freq=1", "window=1"),
    "gradual_magnitude": _arm("smollm2_2of4", *_GRADUAL),
    # which score, from the same first mask
    "dynamic_magnitude": _arm("smollm2_2of4", *_FROM_WANDA),
    "dynamic_ria": _arm("smollm2_2of4", "criterion=RIA", "initial_criterion=Wanda"),
    "dynamic_frozen_norms": _arm("smollm2_2of4", "memory=frozen"),
    "dynamic_window": _arm("smollm2_2of4", "memory=0", "flip_agreement=true"),  # which only measures
    "dynamic_memory50": _arm("smollm2_2of4", "memory=0.5"),
    "dynamic_memory90": _arm("smollm2_2of4", "memory=0.9"),
    "dynamic_dense_norms": _arm("smollm2_2of4", "window=1", "--trainer.callbacks+=variants.DenseNorms"),
    # weights come back only if they are better by a margin
    "dynamic_hysteresis5": _arm("smollm2_2of4", "hysteresis=0.05"),
    "dynamic_hysteresis20": _arm("smollm2_2of4", "hysteresis=0.2"),
    "dynamic_noise1": _arm("smollm2_2of4", "noise_margin=1", "flip_agreement=true"),
    "dynamic_window_hysteresis5": _arm("smollm2_2of4", "memory=0", "hysteresis=0.05"),
    "dynamic_window_hysteresis20": _arm("smollm2_2of4", "memory=0", "hysteresis=0.2"),
    "dynamic_window_noise1": _arm("smollm2_2of4", "memory=0", "noise_margin=1", "flip_agreement=true"),
    "dynamic_window_noise2": _arm("smollm2_2of4", "memory=0", "noise_margin=2", "flip_agreement=true"),
    # decay of shadow values, and when updates stop
    "dynamic_decay": _arm("smollm2_2of4", *_DECAY, "policy.ramp=0"),
    "dynamic_decay2": _arm("smollm2_2of4", "policy=StraightThrough", "policy.srste_decay=0.02", "policy.ramp=0"),
    "dynamic_decay_ramped": _arm("smollm2_2of4", *_DECAY),
    "dynamic_decay_annealed": _arm("smollm2_2of4", *_DECAY, "policy.anneal=0.5"),
    "dynamic_decay_coupled": _arm("smollm2_2of4", "--trainer.callbacks+=variants.CoupledDecay"),
    "dynamic_decay_coupled_large": _arm(
        "smollm2_2of4", "--trainer.callbacks+=variants.CoupledDecay", "--trainer.callbacks.rate=0.01"
    ),
    "dynamic_stop50": _arm("smollm2_2of4", "end_step=0.5"),
    "dynamic_stop100": _arm("smollm2_2of4", "end_step=1.0"),
    # no gradient to pruned weights, which come back with their former value
    "dynamic_dormant": _arm("smollm2_2of4", "policy=Dormant"),
    "dynamic_dormant_distill": _arm("smollm2_2of4", "policy=Dormant", distil=True),
    "dynamic_dormant_distill_tuned": _arm("smollm2_2of4", "policy=Dormant", teacher=True),
    # a gradient to pruned weights, which move less far than kept ones
    "dynamic_slow_shadows": _arm("smollm2_2of4", "--trainer.callbacks+=variants.SlowShadows"),
    "dynamic_slow_shadows_distill": _arm("smollm2_2of4", "--trainer.callbacks+=variants.SlowShadows", distil=True),
    # weights come back by their gradient
    "regrow": _arm("smollm2_2of4", "policy=Regrow"),
    "regrow_times_norm": _arm("smollm2_2of4", "policy=Regrow", "policy.times_norm=true"),
    # from a model that was pruned before: its pruned weights are zeros, not their former values
    "static_from_sparsegpt": _arm("smollm2_2of4_static", start="oneshot_sparsegpt"),
    "dynamic_from_sparsegpt": _arm("smollm2_2of4", start="oneshot_sparsegpt"),
    # SparseGPT's first mask and weights, made in the run: pruned weights keep their former values
    "dynamic_sparsegpt": _arm("smollm2_2of4", "initial_criterion=SparseGPT"),
    "dynamic_sparsegpt_distill": _arm("smollm2_2of4", "initial_criterion=SparseGPT", distil=True),
    "dynamic_sparsegpt_distill_tuned": _arm("smollm2_2of4", "initial_criterion=SparseGPT", teacher=True),
    "dynamic_from_wanda": _arm("smollm2_2of4", start="oneshot_wanda"),
    # distillation from the untouched model, and from the one that --teacher names
    "static_distill": _arm("smollm2_2of4_static", distil=True),
    "dynamic_distill": _arm("smollm2_2of4", distil=True),
    "dynamic_window_distill": _arm("smollm2_2of4", "memory=0", distil=True),
    "dynamic_distill_kl": _arm(
        "smollm2_2of4", "--model.distillation.hardness_ce=0", "--model.distillation.hardness_kldiv=1", distil=True
    ),
    "dynamic_distill_squarehead": _arm("smollm2_2of4", "--model.distillation.hardness_squarehead=1", distil=True),
    "static_distill_tuned": _arm("smollm2_2of4_static", teacher=True),
    "dynamic_distill_tuned": _arm("smollm2_2of4", teacher=True),
    # trained on another text than the first mask was calibrated on
    "static_shift": _shifted("policy=Fixed"),
    "dynamic_frozen_norms_shift": _shifted("memory=frozen"),
    "dynamic_window_shift": _shifted("memory=0"),
    "dynamic_shift": _shifted(),
    # unstructured
    "static_70": _arm("smollm2_unstructured60", *_70, "policy=Fixed"),
    "static_ste_70": _arm("smollm2_unstructured60", *_70, "end_step=0"),
    "dynamic_70": _arm("smollm2_unstructured60", *_70),
    "dynamic_window_70": _arm("smollm2_unstructured60", *_70, "memory=0"),
    "dynamic_frozen_norms_70": _arm("smollm2_unstructured60", *_70, "memory=frozen"),
    "dynamic_magnitude_70": _arm("smollm2_unstructured60", *_70, *_FROM_WANDA),
    "dynamic_k50_70": _arm("smollm2_unstructured60", *_70, "update_freq=50"),
    "gradual_magnitude_70": _arm(
        "smollm2_unstructured60",
        *("mask_structure=unstructured", "criterion=Magnitude", "policy=Fixed", "end_step=0.5"),
        *("sparsity=0.7", "schedule=Cubic", "schedule.final_sparsity=0.7"),
    ),
    # layers of different sparsities
    "static_owl_70": _arm("smollm2_unstructured60", *_70, "allocation=OWL", "policy=Fixed"),
    "dynamic_owl_70": _arm("smollm2_unstructured60", *_70, "allocation=OWL"),
    "regrow_70": _arm("smollm2_unstructured60", *_70, "policy=Regrow"),
    # low-rank, on q and v: outside the mask, where merging loses zeros, and inside it
    "lora": _arm("smollm2_2of4_lora"),
    "mask_lora": _arm("smollm2_2of4_mask_lora"),
    "mask_lora_exact": _arm("smollm2_2of4_mask_lora", "mask_lora.exact_gradient=true"),
    "mask_lora_fixed": _arm("smollm2_2of4_mask_lora", "policy=Fixed"),
    # from scratch: smoke runs
    "scratch_dense": _arm("pretrain_llama_dense"),
    "scratch_2of4": _arm("pretrain_llama_2of4"),
    "scratch_2of4_fixed": _arm("pretrain_llama_2of4", "policy=Fixed"),
    "scratch_unstructured50": _arm("pretrain_llama_2of4", "mask_structure=unstructured"),
}
