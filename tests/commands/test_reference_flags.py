import json

import pytest
from jsonargparse import ArgumentParser

from sparse_train.commands.reference_flags import translate
from sparse_train.commands.yaml_numbers import install
from sparse_train.criteria import RIA, Criterion, Magnitude, Random, Wanda, WandaCumulative
from sparse_train.patterns import Pattern, Unstructured, parse_pattern
from sparse_train.solvers import Solver, SparseGPT


def parsed(options):
    """What a command with the arguments of ``sparse-train prune`` gets."""

    def command(
        out: str = "",
        mask_structure: str | Pattern = "2:4",
        sparsity: float | None = None,
        criterion: Criterion | Solver = Wanda(),  # noqa: B008
        num_calibration_samples: int = 32,
        seed: int = 0,
    ) -> None: ...

    install()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(command)
    return parser.instantiate(parser.parse_args(translate(options)))


def test_the_references_command_line():
    line = "--prune_method wanda --sparsity_ratio 0.5 --sparsity_type unstructured --nsamples=128 --seed 3"
    arguments = parsed([*line.split(), "--save_model", "out"])
    assert (arguments.criterion, arguments.mask_structure, arguments.sparsity) == (Wanda(), "unstructured", 0.5)
    assert (arguments.num_calibration_samples, arguments.out, arguments.seed) == (128, "out", 3)


@pytest.mark.parametrize(
    ("options", "criterion", "group"),
    [
        ("--prune_method=wanda", Wanda(), "row"),
        ("--prune_method wanda --use_variant", WandaCumulative(), "layer"),
        ("--use_variant --prune_method wanda", WandaCumulative(), "layer"),
        ("--prune_method magnitude", Magnitude(), "layer"),
        ("--prune_method sparsegpt", SparseGPT(), "layer"),
        ("--prune_method ria --criterion.a 0.3", RIA(a=0.3), "layer"),
        ("--prune_method random", Random(), "row"),
    ],
)
def test_methods_and_what_they_compare(options, criterion, group):
    arguments = parsed([*options.split(), "--sparsity_type", "unstructured", "--sparsity_ratio=0.5"])
    assert arguments.criterion == criterion
    pattern, sparsity = parse_pattern(arguments.mask_structure, arguments.sparsity, arguments.criterion.group)
    assert (pattern, sparsity) == (Unstructured(group), 0.5)


@pytest.mark.parametrize(("pruned", "kept"), [("2:4", "2:4"), ("4:8", "4:8"), ("1:4", "3:4"), ("3:4", "1:4")])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_n_of_m_counts_pruned(pruned, kept, method):
    assert parsed(["--prune_method", method, f"--sparsity_type={pruned}"]).mask_structure == kept


def test_a_ratio_that_contradicts_the_pattern_is_left_to_the_pattern():
    arguments = parsed(["--sparsity_type", "1:4", "--sparsity_ratio", "0.5"])
    with pytest.raises(ValueError, match=r"3:4 is a sparsity of 0.25, in conflict with 0.5"):
        parse_pattern(arguments.mask_structure, arguments.sparsity)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--config=recipes/oneshot_wanda_2of4.yaml", "--model", "a=b", "--out", "x", "--targets=[re:.*q_proj$]"],
        ["--mask_structure", json.dumps({"class_path": "Unstructured"}), "--sparsity=0.5", "--criterion", "Wanda"],
        ["--text", "prune_method", "--json"],
    ],
)
def test_without_aliases_nothing_changes(options):
    assert translate(options) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prune_method wnda", "wnda has no counterpart; .* Did you mean 'wanda'"),
        ("--prune_method ablate_wanda_seq", "--prune_method ablate_wanda_seq has no counterpart; there are wanda, "),
        ("--prune_method", "--prune_method needs a value"),
        ("--nsamples= --seed 1", "--nsamples needs a value"),
        ("--save_model --seed 1", "--save_model needs a value"),
        ("--sparsity_type unstructred", "Did you mean 'unstructured'"),
        ("--sparsity_type 4:4", "N pruned of every M, 0 < N < M, got '4:4'"),
        ("--prune_method wanda --criterion RIA", "--prune_method stands for --criterion, and both are given"),
        ("--use_variant --criterion=Wanda", "--use_variant stands for --criterion"),
        ("--sparsity 0.5 --sparsity_ratio 0.5", "--sparsity_ratio stands for --sparsity,"),
        ("--sparsity_type 2:4 --mask_structure=2:4", "--sparsity_type stands for --mask_structure"),
        ("--nsamples 8 --num_calibration_samples 8", "--nsamples stands for --num_calibration_samples"),
        ("--save_model a --out b", "--save_model stands for --out"),
        ("--use_variant", "--use_variant is a variant of Wanda"),
        ("--prune_method ria --use_variant", "give --prune_method wanda"),
        ("--prune_method wanda --use_variant=true", "takes no value, got 'true'"),
        ("--save out/", "pruning.json"),
        ("--cache_dir=llm_weights", "HF_HOME"),
        ("--eval_zero_shot", "sparse-train evaluate"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        translate(options.split())
