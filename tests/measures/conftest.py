import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.measures.byte_model import byte_gpt2, byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return byte_gpt2()
