"""The arms of ``benchmarks/quality.py``: each a recipe, and what is changed in it."""

from dataclasses import dataclass, field

from sparse_train import Magnitude, Wanda

_P = "--trainer.callbacks.init_args"
_DISTILLATION = [
    "--model.distillation=Distillation",
    "--model.distillation.hardness_ce=0.33",
    "--model.distillation.hardness_kldiv=0.67",
    "--model.distillation.temperature=2.0",
]


@dataclass(frozen=True)
class Arm:
    """A trained arm.

    Args:
        recipe: in recipes/.
        changes: arguments behind it.
        teacher: whether it learns from the model that --teacher names.
    """

    recipe: str
    changes: list[str] = field(default_factory=list)
    teacher: bool = False


def _arm(recipe: str, *changes: str, teacher: bool = False, distil: bool = False) -> Arm:
    own = [change if change.startswith("--") else f"{_P}.{change}" for change in changes]
    return Arm(f"recipes/{recipe}.yaml", own + (_DISTILLATION if distil or teacher else []), teacher)


_FROM_WANDA = ("criterion=Magnitude", "initial_criterion=Wanda")
_GRADUAL = ("criterion=Magnitude", "policy=Fixed", "schedule=Cubic", "schedule.final_sparsity=0.5")
_DECAY = ("policy=StraightThrough", "policy.srste_decay=0.01")
_70 = ("mask_structure=unstructured", "sparsity=0.7")

ARMS: dict[str, Arm] = {
    "dense": _arm("smollm2_dense"),
    # 2:4: static, re-pruned, gradual
    "static": _arm("smollm2_2of4_static"),
    "static_ste": _arm("smollm2_2of4", "end_step=0"),
    "dynamic": _arm("smollm2_2of4", "memory=0"),
    "dynamic_k50": _arm("smollm2_2of4", "update_freq=50", "memory=0"),
    "dynamic_k1": _arm("smollm2_2of4", "update_freq=1", "memory=0", "window=1"),
    "gradual_magnitude": _arm("smollm2_2of4", *_GRADUAL),
    # which score, from the same first mask
    "dynamic_magnitude": _arm("smollm2_2of4", *_FROM_WANDA),
    "dynamic_frozen_norms": _arm("smollm2_2of4", "memory=frozen"),
    "dynamic_memory50": _arm("smollm2_2of4", "memory=0.5"),
    "dynamic_memory90": _arm("smollm2_2of4", "memory=0.9"),
    "dynamic_cumulative": _arm("smollm2_2of4", "memory=1"),
    "dynamic_hysteresis5": _arm("smollm2_2of4", "memory=0", "hysteresis=0.05"),
    "dynamic_hysteresis20": _arm("smollm2_2of4", "memory=0", "hysteresis=0.2"),
    "dynamic_noise1": _arm("smollm2_2of4", "memory=0", "noise_margin=1", "flip_agreement=true"),
    "dynamic_noise2": _arm("smollm2_2of4", "memory=0", "noise_margin=2", "flip_agreement=true"),
    "cumulative_hysteresis5": _arm("smollm2_2of4", "memory=1", "hysteresis=0.05"),
    "cumulative_hysteresis20": _arm("smollm2_2of4", "memory=1", "hysteresis=0.2"),
    "cumulative_decay": _arm(
        "smollm2_2of4", "memory=1", "policy=StraightThrough", "policy.srste_decay=0.02", "policy.ramp=0"
    ),
    # decay of shadow values, and when to stop
    "dynamic_decay": _arm("smollm2_2of4", "memory=0", *_DECAY, "policy.ramp=0"),
    "dynamic_decay_ramped": _arm("smollm2_2of4", "memory=0", *_DECAY),
    "dynamic_decay_annealed": _arm("smollm2_2of4", "memory=0", *_DECAY, "policy.anneal=0.5"),
    "dynamic_stop50": _arm("smollm2_2of4", "memory=0", "end_step=0.5"),
    "dynamic_stop100": _arm("smollm2_2of4", "memory=0", "end_step=1.0"),
    # back by the gradient
    "regrow": _arm("smollm2_2of4", "policy=Regrow", "memory=0"),
    "regrow_times_norm": _arm("smollm2_2of4", "policy=Regrow", "policy.times_norm=true", "memory=0"),
    # distillation from the untouched model, and from the one that --teacher names
    "static_distill": _arm("smollm2_2of4_static", distil=True),
    "static_ste_distill": _arm("smollm2_2of4", "end_step=0", distil=True),
    "dynamic_distill": _arm("smollm2_2of4", "memory=0", distil=True),
    "static_distill_tuned": _arm("smollm2_2of4_static", teacher=True),
    "static_ste_distill_tuned": _arm("smollm2_2of4", "end_step=0", teacher=True),
    "dynamic_distill_tuned": _arm("smollm2_2of4", "memory=0", teacher=True),
    "frozen_norms_distill_tuned": _arm("smollm2_2of4", "memory=frozen", teacher=True),
    # unstructured
    "static_70": _arm("smollm2_unstructured60", *_70, "policy=Fixed"),
    "static_ste_70": _arm("smollm2_unstructured60", *_70, "end_step=0"),
    "dynamic_70": _arm("smollm2_unstructured60", *_70, "memory=0"),
    "dynamic_frozen_norms_70": _arm("smollm2_unstructured60", *_70, "memory=frozen"),
    "dynamic_magnitude_70": _arm("smollm2_unstructured60", *_70, *_FROM_WANDA),
    "regrow_70": _arm("smollm2_unstructured60", *_70, "policy=Regrow", "memory=0"),
    # low-rank, of q and v: beside the mask, where merging loses zeros, and inside it
    "lora": _arm("smollm2_2of4_lora"),
    "mask_lora": _arm("smollm2_2of4_mask_lora"),
    "mask_lora_fixed": _arm("smollm2_2of4_mask_lora", "policy=Fixed"),
    # from scratch: smoke runs
    "scratch_dense": _arm("pretrain_llama_dense"),
    "scratch_2of4": _arm("pretrain_llama_2of4"),
    "scratch_2of4_fixed": _arm("pretrain_llama_2of4", "policy=Fixed"),
    "scratch_unstructured50": _arm("pretrain_llama_2of4", "mask_structure=unstructured"),
}
ONESHOT = {"oneshot_wanda": Wanda(), "oneshot_magnitude": Magnitude()}
