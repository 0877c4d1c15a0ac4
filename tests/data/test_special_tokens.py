import pytest
from tokenizers.processors import TemplateProcessing

from sparse_train.data.special_tokens import beginning, end_of_text
from sparse_train.data.text_blocks import blocks_of, calibration_batches
from sparse_train.data.texts import TextSource
from tests.conftest import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def tokenizer_with(single: str):
    tokenizer = tiny_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(("single", "expected"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("$A", [])])
def test_what_a_text_begins_with(single, expected):
    assert beginning(tokenizer_with(single)) == expected


def test_documents_begin_and_end_as_the_model_knows_them():
    rows = blocks_of(["abc", "de"], tokenizer_with("<s> $A"), 3, drop_rest=False)
    decoded = ["".join(tiny_tokenizer().convert_ids_to_tokens(row)) for row in rows["input_ids"]]
    assert decoded == ["<s>ab", "c</s><s>", "de</s>"]


class Documents(TextSource):
    name = "documents"

    def documents(self, split):
        return ["abcd"]


def test_parts_of_documents_are_cut_from_the_text_with_its_beginning():
    tokenizer = tokenizer_with("<s> $A")
    seen = set()
    for seed in range(20):
        (batch,) = calibration_batches(
            Documents(), tokenizer, num_calibration_samples=1, max_seq_length=3, seed=seed, sampling="documents"
        )
        seen.add("".join(tokenizer.convert_ids_to_tokens(batch["input_ids"][0])))
    assert seen == {"<s>ab", "abc"}  # of 5 tokens, starting at 0 or 1, as the paper's script draws


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = tiny_tokenizer()
    assert end_of_text(tokenizer) == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token, which separates the documents of a block"):
        blocks_of(["abc"], tokenizer, 4)
