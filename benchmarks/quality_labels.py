"""The names of arms in the tables of ``quality_tables.py``: one dict per table, with the arms of ``arms.py``."""

_LAST_RUN = {
    "3234aed": (
        *("dynamic_hysteresis5", "dynamic_noise1", "dynamic_decay_ramped", "dynamic_decay_annealed"),
        "dynamic_distill_squarehead",
    ),
    "16eb108": ("dynamic_sparsegpt",),
    "ae5305f": (
        *("static_reconstructed_70_distill", "dynamic_dormant_reconstructed_70_distill"),
        "static_refined_70_distill",
    ),
    "1d9b7e5": ("dynamic_slow_shadows_distill", "muon_static_distill"),
    "c77b8f7": ("swaps_distill", "swaps_70_distill"),
    "1e56c16": ("dynamic_by_loss_distill",),
}
REMOVED = {arm: commit for commit, arms in _LAST_RUN.items() for arm in arms}
"""Arms of settings that gained nothing and were removed: only old rows are left; and the last commits that ran them."""

MAIN = {
    "none": "dense, untrained",
    "oneshot_wanda": "one-shot Wanda",
    "oneshot_sparsegpt": "one-shot SparseGPT",
    "oneshot_iht": "one-shot IHT",
    "dense": "dense, fine-tuned",
    "gradual_magnitude": "gradual magnitude: dense to step 20, 3:4 to step 50, then 2:4",
    "static": "kept: Wanda's mask, no gradient to pruned weights",
    "static_ste": "kept: Wanda's mask, straight-through",
    "static_iht": "IHT's mask and weights, kept",
    "dynamic_iht": "IHT's mask and weights, re-pruned every 10 steps",
    "dynamic_k50": "re-pruned every 50 steps, on norms of 25 steps each",
    "dynamic": "re-pruned every 10 steps (the default)",
    "dynamic_k1": "re-pruned every step",
    "dynamic_k1_stop100": "re-pruned every step until the end",
    "dynamic_dense_norms_stop100": "re-pruned every 10 steps until the end, on norms of dense forwards",
}
SCORES = {
    "dynamic_magnitude": "magnitude",
    "dynamic_frozen_norms": "Wanda, norms of the first mask",
    "dynamic_window": "Wanda, running norms of 5 steps",
    "dynamic_memory90": "Wanda, running norms, exponential, 0.9 per update",
    "dynamic": "Wanda, running norms, cumulative (the default)",
    "dynamic_dense_norms": "Wanda, norms of dense forwards, refreshed before each update, cumulative",
    "dynamic_dense_norms_stop100": "Wanda, norms of dense forwards, updates until the end",
}
VARIANTS = {
    "dynamic": "the default",
    "dynamic_hysteresis5": "hysteresis 5 %",
    "dynamic_noise1": "a margin of 1 standard error",
    "dynamic_decay": "decay of pruned weights 0.01, constant",
    "dynamic_decay2": "decay of pruned weights 0.02, constant",
    "dynamic_decay_ramped": "decay of pruned weights 0.01, ramped",
    "dynamic_decay_annealed": "decay of pruned weights 0.01, ramped and annealed",
    "dynamic_decay_coupled": "decay of pruned weights in the gradient, 2e-4, as in SR-STE",
    "dynamic_stop50": "updates until 50 % of the run",
    "dynamic_stop100": "updates until the end",
    "dynamic_dormant": "policy Dormant",
}
STARTS = {
    "oneshot_wanda": "one-shot Wanda, untrained",
    "oneshot_sparsegpt": "one-shot SparseGPT, untrained",
    "oneshot_iht": "one-shot IHT, untrained",
    "oneshot_iht_damped10": "one-shot IHT with dampening_frac 0.1, untrained",
    "oneshot_iht_asymmetric": "one-shot IHT, asymmetric, with dampening_frac 0.1, untrained",
    "dynamic": "from the dense model, Wanda's first mask",
    "dynamic_sparsegpt": "from the dense model, SparseGPT's first mask and weights",
}
ORDERS = {
    "none": "dense",
    "permuted": "dense, permuted",
    "oneshot_wanda": "one-shot Wanda",
    "oneshot_wanda_permuted": "one-shot Wanda, permuted",
    "oneshot_iht_damped10": "one-shot IHT with dampening_frac 0.1",
    "oneshot_iht_permuted_damped10": "one-shot IHT with dampening_frac 0.1, permuted",
}
DISTILLATION = {
    "static": "kept, no teacher",
    "static_distill": "kept, untouched teacher",
    "static_iht_distill": "IHT's mask and weights, kept, untouched teacher",
    "static_iht_damped01_distill": "the same, IHT with dampening_frac 0.01",
    "static_iht_ste_distill": "IHT's mask and weights, kept, straight-through, untouched teacher",
    "dynamic_iht_distill": "IHT's mask and weights, re-pruned, untouched teacher",
    "static_distill_tuned": "kept, fine-tuned teacher",
    "dynamic": "re-pruned, no teacher",
    "dynamic_distill": "re-pruned, untouched teacher",
    "dynamic_distill_tuned": "re-pruned, fine-tuned teacher",
    "dynamic_dormant_distill": "re-pruned, Dormant, untouched teacher",
    "dynamic_slow_shadows_distill": "re-pruned, pruned weights move by 0.4 of the steps, untouched teacher",
    "swaps_distill": "swapped by evidence every 10 steps, untouched teacher",
    "ast_distill": "AST: magnitude, decay of pruned weights 0.01, untouched teacher",
    "dynamic_distill_squarehead": "re-pruned, untouched teacher, with SquareHead",
    "dynamic_by_loss_distill": "accepted by loss, which was nothing (flips: proposed), untouched teacher",
    "dynamic_window": "re-pruned, norms of 5 steps, no teacher",
    "dynamic_window_distill": "re-pruned, norms of 5 steps, untouched teacher",
}
SHIFT = {
    "static_shift": "Wanda's mask, kept",
    "dynamic_frozen_norms_shift": "Wanda's mask, re-pruned, norms of the first mask",
    "dynamic_shift": "Wanda's mask, re-pruned, cumulative norms (the default)",
    "static_iht_shift": "IHT's mask and weights, kept",
    "dynamic_iht_shift": "IHT's mask and weights, re-pruned",
    "dynamic_python": "calibrated on Python: Wanda's mask, re-pruned",
    "static_iht_python": "calibrated on Python: IHT's mask and weights, kept",
    "dynamic_iht_python": "calibrated on Python: IHT's mask and weights, re-pruned",
}
UNSTRUCTURED = {
    "oneshot_wanda_70": "one-shot Wanda, untrained",
    "oneshot_sparsegpt_70": "one-shot SparseGPT, within rows, untrained",
    "oneshot_iht_70": "one-shot IHT, untrained",
    "oneshot_iht_70_damped10": "one-shot IHT with dampening_frac 0.1, untrained",
    "oneshot_iht_70_asymmetric": "one-shot IHT, asymmetric, with dampening_frac 0.1, untrained",
    "oneshot_owl_70": "one-shot Wanda, divided by OWL, untrained",
    "static_70": "kept, no gradient to pruned weights",
    "static_iht_70": "IHT's mask and weights, kept",
    "dynamic_iht_70": "IHT's mask and weights, re-pruned every 10 steps",
    "dynamic_70": "re-pruned every 10 steps (the default)",
    "static_owl_70": "kept, divided by OWL",
    "dynamic_owl_70": "re-pruned every 10 steps, divided by OWL",
    "dynamic_k50_70": "re-pruned every 50 steps",
    "dynamic_frozen_norms_70": "re-pruned every 10 steps, norms of the first mask",
    "dynamic_magnitude_70": "re-pruned every 10 steps, magnitude",
    "gradual_magnitude_70": "gradual magnitude: from dense to 70 % until step 50",
}
TAUGHT_70 = {
    "static_70_distill": "kept, no gradient to pruned weights",
    "static_sparsegpt_70_distill": "SparseGPT's mask and weights, kept",
    "static_iht_70_distill": "IHT's mask and weights, kept",
    "static_iht_asymmetric_70_distill": "asymmetric IHT's mask and weights, kept",
    "static_iht_damped01_70_distill": "IHT's mask and weights with dampening_frac 0.01, kept",
    "dynamic_iht_70_distill": "IHT's mask and weights, re-pruned every 10 steps (the default)",
    "static_iht_70_distill_t1": "IHT's mask and weights, kept, temperature 1",
    "dynamic_iht_70_distill_t1": "the same, re-pruned (the default)",
    "dynamic_memory50_iht_70_distill": "IHT's mask and weights, re-pruned, norms exponential, 0.5 per update",
    "dynamic_dormant_iht_70_distill": "IHT's mask and weights, re-pruned every 10 steps, policy Dormant",
    "dynamic_70_distill": "re-pruned every 10 steps (the default)",
    "dynamic_dormant_70_distill": "re-pruned every 10 steps, policy Dormant",
}
"""With the untouched teacher, in steps of 512 tokens."""
METHODS_70 = {
    **TAUGHT_70,
    "dynamic_dormant_sparsegpt_70_distill": "SparseGPT's mask and weights, re-pruned every 10 steps, policy Dormant",
    "dynamic_from_sparsegpt_70_distill": "SparseGPT's zeros, re-pruned every 10 steps (the default)",
    "static_reconstructed_70_distill": "Wanda's mask, weights by least squares, kept",
    "dynamic_dormant_reconstructed_70_distill": "the same, re-pruned every 10 steps, policy Dormant",
    "static_refined_70_distill": "SparseGPT's mask, weights by least squares, kept",
    "swaps_70_distill": "swapped by evidence every 10 steps",
    "ast_70_distill": "AST: magnitude every 10 steps, decay of pruned weights 0.01",
    "srste_70_distill": "SR-STE: magnitude every step, decay of pruned weights 2e-4",
    "regrow_70_distill": "Regrow: dropped by Wanda, grown by gradient, 30 % at first",
    "regrow5_70_distill": "Regrow, 5 % at first",
    "rigl_70_distill": "RigL: dropped by magnitude, grown by gradient, 30 % at first",
    "gradual_magnitude_70_distill": "gradual magnitude: from dense to 70 % until step 25",
    "lora_70_distill": "LoRA, r 8 on q and v, on a frozen model at 70 %",
}
"""The methods of the field in that setting."""
TAUGHT_2OF4 = {
    "static": "kept, no gradient to pruned weights, no teacher",
    "static_distill": "kept, no gradient to pruned weights",
    "dynamic_distill": "re-pruned every 10 steps (the default)",
    "dynamic_dormant_distill": "re-pruned every 10 steps, policy Dormant",
    "dynamic_dormant_stop25_distill": "re-pruned until a quarter of the run, policy Dormant",
    "static_sparsegpt_distill": "SparseGPT's mask and weights, kept",
    "static_iht_distill": "IHT's mask and weights, kept",
    "dynamic_iht_distill": "IHT's mask and weights, re-pruned every 10 steps (the default)",
    "static_iht_damped01_distill": "IHT's mask and weights with dampening_frac 0.01, kept",
    "static_iht_damped100_distill": "IHT's mask and weights with dampening_frac 1, kept",
    "static_iht_128_distill": "IHT's mask and weights from 128 sequences instead of 32, kept",
    "static_iht_permuted_distill": "IHT's mask and weights, kept, channels permuted before",
    "static_iht_asymmetric_distill": "asymmetric IHT's mask and weights, kept",
    "static_iht_128_permuted_distill": "IHT's mask and weights from 128 sequences, kept, channels permuted before",
    "static_iht_128_permuted_distill_betas99": (
        "IHT's mask and weights from 128 sequences, kept, channels permuted before, AdamW's second beta 0.99"
    ),
    "static_iht_distill_kl": "IHT's mask and weights, kept, no cross-entropy",
    "static_iht_distill_even": "IHT's mask and weights, kept, as much cross-entropy as divergence",
    "static_iht_distill_betas99": "IHT's mask and weights, kept, AdamW's second beta 0.99",
    "static_iht_distill_warmup0": "IHT's mask and weights, kept, no warm-up",
    "static_iht_distill_warmup20": "IHT's mask and weights, kept, warm-up for 20 % of the run",
    "static_iht_distill_wd10": "IHT's mask and weights, kept, weight decay 0.1",
    "static_iht_distill_t1": "IHT's mask and weights, kept, temperature 1",
    "dynamic_iht_distill_t1": "IHT's mask and weights, re-pruned every 10 steps (the default), temperature 1",
    "static_distill_t1": "kept, temperature 1",
    "dynamic_distill_t1": "re-pruned every 10 steps (the default), temperature 1",
    "dynamic_iht_damped01_distill": "IHT's mask and weights with dampening_frac 0.01, re-pruned (the default)",
    "dynamic_dormant_iht_distill": "IHT's mask and weights, re-pruned every 10 steps, policy Dormant",
    "ast_distill": "AST: magnitude, decay of pruned weights 0.01",
    "muon_static_distill": "kept, Muon instead of AdamW",
    "cast_distill": "CAST without scales, decay 3",
    "cast10_distill": "CAST without scales, decay 10",
}
"""The same at 2:4."""
LOW_RANK = {
    "oneshot_wanda": "none: one-shot Wanda",
    "lora": "LoRA on a frozen 2:4 base (not sparse after merging)",
    "mask_lora": "mask_lora, re-pruned, straight-through gradient",
    "static": "full, kept",
    "dynamic": "full, re-pruned",
}
SCRATCH = {
    "scratch_dense": "dense",
    "scratch_2of4": "through 3:4 to 2:4, re-pruned",
    "scratch_unstructured50": "to 50 % unstructured, re-pruned",
}
LENGTHS = ("dense", "static_distill", "static_iht_distill", "dynamic_distill", "dynamic_distill_tuned")
"""Arms whose longer runs are shown next to those of 100 steps."""
