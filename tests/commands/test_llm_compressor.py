import textwrap

import pytest
import torch

from sparse_train.allocation import OWL, PerBlock
from sparse_train.commands.llm_compressor import Stage, read_recipe
from sparse_train.criteria import Magnitude, Wanda
from sparse_train.patterns import NM, Unstructured, parse_pattern
from sparse_train.solvers import SparseGPT
from sparse_train.targets.selection import select
from tests.conftest import tiny_llama

FIXED = "DynamicPruning(policy=Fixed()), as in recipes/smollm2_2of4_static.yaml"
IGNORE = ["re:.*lm_head"]


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text))
        return read_recipe(path)

    return read_text


@pytest.fixture
def modifier(read):
    """Reads one modifier, given by name and fields in YAML's flow style; returns its stage and the notes."""

    def read_modifier(name, fields, ignore="ignore: ['re:.*lm_head'], "):
        recipe = read(f"prune_stage: {{pruning_modifiers: {{{name}: {{{ignore}{fields}}}}}}}")
        (stage,) = recipe.stages
        return stage, recipe.notes

    return read_modifier


# Recipes of llm-compressor, from its documentation, its tests and models that were published with it.


def test_sparsegpt_of_the_documentation(read):
    recipe = read(
        """
        test_stage:
          obcq_modifiers:
            SparseGPTModifier:
              sparsity: 0.5
              mask_structure: "2:4"
              dampening_frac: 0.001
              block_size: 128
              targets: ['Linear']
              ignore: ['re:.*lm_head']
        """
    )
    assert recipe.stages == [Stage(SparseGPT(128, 0.001), NM(2, 4), None, None, ["Linear"], IGNORE)]
    assert recipe.notes == []


def test_wanda_of_the_documentation(read):
    recipe = read(
        """
        test_stage:
            sparsity_modifiers:
                WandaPruningModifier:
                    sparsity: 0.5
                    mask_structure: "2:4"
        """
    )
    assert recipe.stages == [Stage(Wanda(), NM(2, 4), None, None, ["Linear"], [])]
    assert recipe.notes == [
        'WandaPruningModifier.targets includes the lm_head, as there; ignore: ["re:.*lm_head"] leaves it dense.'
    ]


def test_a_published_recipe_of_sparseml(read):
    recipe = read(
        r"""
        test_stage:
          obcq_modifiers:
            SparseGPTModifier:
              sparsity: 0.5
              block_size: 64
              sequential_update: true
              quantize: false
              percdamp: 0.02
              mask_structure: 0:0
              targets: ['re:model.layers.\d+$']
        """
    )
    (stage,) = recipe.stages
    assert (stage.criterion, stage.mask_structure, stage.sparsity) == (SparseGPT(64, 0.02), Unstructured("layer"), 0.5)
    assert recipe.notes == [
        "SparseGPTModifier.sequential_update has no counterpart in sparse-train and changes no result."
    ]
    assert len(select(tiny_llama(), stage.mask_structure, stage.targets, stage.ignore).layers) == 21


def test_a_saved_recipe_with_the_state_of_its_modifier(read):
    recipe = read(
        """
        DEFAULT_stage:
          DEFAULT_modifiers:
            SparseGPTModifier: {block_size: 128, compressible_layers_: null, dampening_frac: 1e-2, end: null,
              ended_: false, group: null, index: 0, initialized_: false, mask_structure: '0:0', owl_m: null,
              sparsity: 0.95, sparsity_profile: null, targets: null, ignore: ["re:.*lm_head"], offload_hessians: false}
        """
    )
    assert recipe.stages == [Stage(SparseGPT(), Unstructured("layer"), 0.95, None, ["Linear"], IGNORE)]
    assert recipe.notes == [
        "SparseGPTModifier.offload_hessians has no counterpart in sparse-train and changes no result."
    ]


def test_alternating_stages_of_pruning_and_training(read):
    recipe = read(
        """
        initial_sparsity_stage:
          run_type: oneshot
          modifiers:
            SparseGPTModifier: {sparsity: 0.5, mask_structure: "0:0", targets: ["Linear"], ignore: ["re:.*lm_head"]}
        initial_training_stage:
          run_type: train
          pruning_modifiers:
            ConstantPruningModifier: {targets: '__ALL__', start: 0}
        next_sparsity_stage:
          modifiers:
            SparseGPTModifier: {sparsity: 0.7, mask_structure: "0:0", targets: ["Linear"], ignore: ["re:.*lm_head"]}
        next_training_stage:
          pruning_modifiers:
            ConstantPruningModifier: {targets: '__ALL__', start: 0}
        """
    )
    assert [stage.sparsity for stage in recipe.stages] == [0.5, 0.7]
    assert [stage.criterion for stage in recipe.stages] == [SparseGPT(), SparseGPT(preserve_sparsity_mask=True)]
    assert [note.partition(" ")[0] for note in recipe.notes] == [
        "initial_sparsity_stage:",
        "initial_training_stage:",
        "ConstantPruningModifier:",
        "ConstantPruningModifier",
    ]
    assert "preserve_sparsity_mask: true" in recipe.notes[2] and FIXED in recipe.notes[2]
    assert "changes nothing in one shot" in recipe.notes[3] and FIXED in recipe.notes[3]


# Grammar


@pytest.mark.parametrize(
    "text",
    [
        "a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: 0.3}, "
        "MagnitudePruningModifier: {final_sparsity: 0.4}}}",
        "a_stage: {WandaPruningModifier: {sparsity: 0.3}}\nb_stage: {MagnitudePruningModifier: {final_sparsity: 0.4}}",
        "x_modifiers: {WandaPruningModifier: {sparsity: 0.3}}\n"
        "y_modifiers: {MagnitudePruningModifier: {final_sparsity: 0.4}}",
        "WandaPruningModifier: {sparsity: 0.3}\nMagnitudePruningModifier: {final_sparsity: 0.4}",
        "x_modifiers:\n- WandaPruningModifier: {sparsity: 0.3}\n- MagnitudePruningModifier: {final_sparsity: 0.4}",
        "- WandaPruningModifier: {sparsity: 0.3}\n- MagnitudePruningModifier: {final_sparsity: 0.4}",
        '{"a_stage": {"x_modifiers": {"WandaPruningModifier": {"sparsity": 0.3}}}, "b_stage": null, "c_stage": '
        '{"MagnitudePruningModifier": {"final_sparsity": "0.4"}}}',
    ],
)
def test_forms(read, text):
    wanda, magnitude = read(text).stages
    assert (wanda.criterion, wanda.mask_structure, wanda.sparsity) == (Wanda(), Unstructured("row"), 0.3)
    assert (magnitude.criterion, magnitude.mask_structure) == (Magnitude(), Unstructured("layer"))
    assert magnitude.sparsity == 0.4


# N:M


@pytest.mark.parametrize(
    ("written", "pruned", "m"),
    [("'1:4'", 1, 4), ("'3:4'", 3, 4), ("'2:4'", 2, 4), ("2:4", 2, 4), ("1:4", 1, 4), ("3:4", 3, 4), ("4:8", 4, 8)],
)
@pytest.mark.parametrize("name", ["WandaPruningModifier", "SparseGPTModifier", "MagnitudePruningModifier"])
def test_n_of_m_counts_pruned_down_to_the_mask(modifier, name, written, pruned, m):
    stage, notes = modifier(name, f"mask_structure: {written}")
    assert notes == []
    pattern, sparsity = parse_pattern(stage.mask_structure, stage.sparsity)
    assert sparsity == pruned / m
    mask_OI = pattern.mask(torch.rand(6, 4 * m), sparsity)
    assert ((~mask_OI).reshape(-1, m).sum(1) == pruned).all()


@pytest.mark.parametrize("fields", ["sparsity: 0.25", "sparsity: [0.25, 0.25]", "sparsity: null"])
def test_n_of_m_with_the_sparsity_that_it_has(modifier, fields):
    stage, notes = modifier("WandaPruningModifier", f"{fields}, mask_structure: '1:4'")
    assert (stage.mask_structure, stage.sparsity, stage.allocation, notes) == (NM(3, 4), None, None, [])
    assert modifier("WandaPruningModifier", "sparsity: 0.33, mask_structure: '1:3'")[0].mask_structure == NM(2, 3)


def test_n_of_m_leaves_owl_nothing_to_do(modifier):
    stage, notes = modifier(
        "SparseGPTModifier", "sparsity: 0.5, mask_structure: '2:4', sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.08"
    )
    assert (stage.sparsity, stage.allocation) == (None, None)
    assert notes == ["SparseGPTModifier.sparsity_profile: N:M has one sparsity in every layer, as there."]


# Fields


def test_sparsities_of_blocks_and_owl(modifier):
    stage, _ = modifier("WandaPruningModifier", "sparsity: [0.3, 0.5, 0.7]")
    assert (stage.sparsity, stage.allocation) == (None, PerBlock([0.3, 0.5, 0.7]))
    stage, _ = modifier("WandaPruningModifier", "sparsity: 0.6, sparsity_profile: OWL, owl_m: 3, owl_lmbda: 0.1")
    assert (stage.sparsity, stage.allocation) == (0.6, OWL(3, 0.1))


def test_fields_of_sparsegpt(modifier):
    stage, notes = modifier(
        "SparseGPTModifier",
        "sparsity: 0.5, block_size: 32, dampening_frac: 1e-3, preserve_sparsity_mask: true, sequential_targets: Block",
    )
    assert stage.criterion == SparseGPT(32, 0.001, preserve_sparsity_mask=True)
    assert notes == ["SparseGPTModifier.sequential_targets has no counterpart in sparse-train and changes no result."]


def test_the_schedule_of_magnitude_is_for_training(modifier):
    stage, notes = modifier(
        "MagnitudePruningModifier",
        "init_sparsity: 0.05, final_sparsity: 0.8, start: 0, end: 10, update_scheduler: cubic, leave_enabled: true, "
        "mask_structure: unstructured, apply_globally: true, targets: '__ALL_PRUNABLE__'",
    )
    assert stage == Stage(Magnitude(), Unstructured("model"), 0.8, None, ["Linear"], IGNORE)
    assert notes == [
        "MagnitudePruningModifier.init_sparsity, start, end, update_scheduler: one shot prunes to final_sparsity at "
        "once; in training it is DynamicPruning(schedule=Cubic(...)).",
        "MagnitudePruningModifier.leave_enabled has no counterpart in sparse-train and changes no result.",
    ]


@pytest.mark.parametrize(("explicit", "preserve"), [("", True), (", preserve_sparsity_mask: false", False)])
def test_constant_before_sparsegpt_keeps_zeros(read, explicit, preserve):
    recipe = read(
        f"""
        prune_stage:
          ConstantPruningModifier: {{targets: Linear}}
          SparseGPTModifier: {{sparsity: 0.5, ignore: [lm_head]{explicit}}}
        """
    )
    assert [stage.criterion for stage in recipe.stages] == [SparseGPT(preserve_sparsity_mask=preserve)]
    assert len(recipe.notes) == preserve


def test_constant_beside_other_modifiers_is_a_note(read):
    recipe = read(
        "a_stage: {ConstantPruningModifier: {targets: Linear}, WandaPruningModifier: {sparsity: 0.5, targets: [mlp]}}"
    )
    assert [stage.criterion for stage in recipe.stages] == [Wanda()]
    (note,) = recipe.notes
    assert note.startswith("ConstantPruningModifier changes nothing in one shot") and FIXED in note


BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "count", "parts"),
    [
        ("Linear", 22, [*BLOCK, "lm_head"]),
        ("__ALL__", 22, [*BLOCK, "lm_head"]),
        ("LlamaDecoderLayer", 21, BLOCK),
        ("[model.layers.0, model.layers.2]", 14, BLOCK),
        ("['re:.*model.layers.0$']", 7, BLOCK),
        (r"['re:model.layers.\d+$']", 21, BLOCK),
        ("['re:.*mlp$', 're:.*q_proj$']", 12, ["q_proj", *BLOCK[4:]]),
        ("['re:.*q_proj.weight', 're:.*up_proj.weight$']", 6, ["q_proj", "up_proj"]),
        (r"['re:.*mlp\.down_proj\.weight']", 3, ["down_proj"]),
        ("['re:.*weight']", 22, [*BLOCK, "lm_head"]),
        ("[model.layers.1.mlp.up_proj.weight]", 1, ["up_proj"]),
    ],
)
def test_targets_reach_the_layers_that_theirs_reach(modifier, targets, count, parts):
    stage, _ = modifier("WandaPruningModifier", f"sparsity: 0.5, targets: {targets}", ignore="")
    model = tiny_llama(tie_word_embeddings=False)
    layers = select(model, stage.mask_structure, stage.targets, stage.ignore).layers
    assert len(layers) == count
    assert {name.rpartition(".")[2] for name in layers} == set(parts)


# Mistakes


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("WandaPruningModifier", "sparsty: 0.5", "has no field 'sparsty' .* Did you mean 'sparsity'"),
        ("WandaPruningModifier", "block_size: 128", "WandaPruningModifier has no field 'block_size'"),
        ("WandaPruningModifier", "xyz: 1", "'xyz' that sparse-train knows. There are sparsity, "),
        ("WandaPruningModifier", "", "WandaPruningModifier.sparsity is missing"),
        ("WandaPruningModifier", "sparsity: []", "sparsity is missing"),
        ("WandaPruningModifier", "sparsity: 50", "WandaPruningModifier.sparsity must be .* For 50.0 % write 0.5"),
        ("WandaPruningModifier", "sparsity: [0.5, 1.5]", "below 1"),
        ("WandaPruningModifier", "sparsity: [0.5, null]", "sparsity must be a number, got None"),
        ("WandaPruningModifier", "sparsity: true", "sparsity must be a number, got True"),
        ("WandaPruningModifier", "sparsity: eval(level)", r"eval\(...\) is not evaluated, write its value"),
        ("WandaPruningModifier", "sparsity: 0.5, targets: 3", "targets must be a list of names, .* got 3"),
        ("WandaPruningModifier", "sparsity: 0.5, targets: [3]", "targets must be a list of names"),
        ("WandaPruningModifier", "sparsity: 0.5, mask_structure: block_4", "0 < N < M, got 'block_4'"),
        ("WandaPruningModifier", "sparsity: 0.5, mask_structure: 0:4", "mask_structure must be .* got '0:4'"),
        ("WandaPruningModifier", "mask_structure: 4:4", "got '4:4'"),
        ("WandaPruningModifier", "sparsity: 0.75, mask_structure: 1:4", "is 0.75, in conflict with .* 1:4, .*: 0.25"),
        ("WandaPruningModifier", "sparsity: [0.5, 0.6], mask_structure: 2:4", "is 0.6, in conflict"),
        ("WandaPruningModifier", "sparsity: 0.5, sparsity_profile: owl", "owl_m is missing: all of sparsity_profile"),
        ("WandaPruningModifier", "sparsity: 0.5, owl_m: 5, owl_lmbda: 0.08", "sparsity_profile is missing"),
        ("WandaPruningModifier", "sparsity: 0.5, sparsity_profile: olw, owl_m: 5, owl_lmbda: 0.08", "must be owl"),
        ("WandaPruningModifier", "sparsity: [0.5], sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.1", "with .*: owl"),
        ("SparseGPTModifier", "sparsity: 0.5, block_size: 6, mask_structure: 2:4", "block_size divisible by 4"),
        ("SparseGPTModifier", "sparsity: 0.5, block_size: 1.5", "block_size must be a whole number, got 1.5"),
        ("SparseGPTModifier", "sparsity: 0.5, dampening_frac: 0", "dampening_frac must be above 0"),
        ("SparseGPTModifier", "sparsity: 0.5, dampening_frac: 0.1, percdamp: 0.1", "percdamp is the former name"),
        ("SparseGPTModifier", "sparsity: 0.5, quantize: true", "does not quantize"),
        ("SparseGPTModifier", "sparsity: 0.5, preserve_sparsity_mask: 1", "must be true or false, got 1"),
        ("MagnitudePruningModifier", "sparsity: 0.5", "Did you mean .*'final_sparsity'"),
        ("MagnitudePruningModifier", "init_sparsity: 0.5", "final_sparsity is missing"),
        ("MagnitudePruningModifier", "final_sparsity: [0.5, 0.5]", "final_sparsity must be one number, got"),
        ("MagnitudePruningModifier", "final_sparsity: 0.5, mask_structure: channel", "got 'channel'"),
        ("ConstantPruningModifier", "target: Linear", "Did you mean 'targets'"),
        ("ConstantPruningModifier", "targets: Linear, start: 0", r"nothing to prune in one shot: .*policy=Fixed\(\)"),
        ("QuantizationModifier", "scheme: W8A8", "does not quantize. Remove QuantizationModifier from the recipe"),
        ("GPTQModifier", "scheme: W4A16", "pruning_modifiers: sparse-train prunes and does not quantize"),
        ("SmoothQuantModifier", "smoothing_strength: 0.8", "does not quantize"),
        (
            "WandaModifier",
            "sparsity: 0.5",
            "no .*modifiers WandaPruningModifier, .*Did you mean 'WandaPruningModifier'",
        ),
    ],
)
def test_mistakes_in_modifiers(modifier, name, fields, message):
    with pytest.raises(ValueError, match=message):
        modifier(name, fields, ignore="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml must map names to modifiers, as in .*, got None"),
        ("WandaPruningModifier", "must map names to modifiers"),
        ("[1, 2]", "must map names to modifiers"),
        ("{}", "has no modifiers. A recipe looks like"),
        ("[]", "has no modifiers"),
        ("prune_stage:\n  x_modifiers: {}", "has no modifiers"),
        ("prune_stage: 3", "prune_stage must map names to modifiers, .* got 3"),
        ("x_modifiers: [WandaPruningModifier]", "x_modifiers must map names to modifiers"),
        ("x_modifiers: {WandaPruningModifier: 0.5}", "WandaPruningModifier takes a mapping of fields, got 0.5"),
        ("x_modifiers: {WandaPruningModifier: {ignore: lm_head, sparsity: 0.5}}", "ignore must be a list of names"),
        ("pruning: {WandaPruningModifier: {sparsity: 0.5}}", r"'pruning' is not a stage \(..._stage\)"),
        ("a_stage: {enabled: false, WandaPruningModifier: {sparsity: 0.5}}", "a_stage: 'enabled' is not a stage"),
        ("model: gpt2\nmask_structure: 2:4", "'model' is not a stage"),
        ("a: [b", "is not YAML that can be read safely"),
        ("a_stage: {run_type: !!python/object/apply:x.StageRunType [oneshot]}", r"!!python tag \(run_type\) can be"),
    ],
)
def test_mistakes_in_recipes(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"The recipe .*nowhere.yaml cannot be read: .*No such file"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model.bin cannot be read: .*utf-8"):
        read_recipe(str(tmp_path / "model.bin"))
