"""`complete` gives as text what `generate` draws, decoded by the model's own tokenizer."""

import numpy as np
import pytest
from helpers import tiny

import minilora as ml
from minilora import cli
from minilora.completion import complete
from minilora.errors import InputError
from minilora.formats import huggingface
from minilora.formats.tokenizer import decode, encode
from minilora.model import Config, llama


@pytest.fixture(scope="module")
def base():
    return huggingface.load()


def rng(seed=3):
    return np.random.default_rng(seed)


def test_complete_decodes_what_generate_draws(base):
    ids = np.concatenate(
        list(ml.generate(base, encode("To be")[None], 30, rng=rng(), temperature=0.5, top_k=9))
    )
    assert complete(base, "To be", 30, rng=rng(), temperature=0.5, top_k=9) == decode(ids)
    assert ml.complete is complete


def test_a_name_a_checkpoint_and_a_model_give_the_same_text(base):
    said = complete(base, "KING. ", 20, rng=rng())
    for model in ("base", str(huggingface.BASE), huggingface.BASE, huggingface.checkpoint()):
        assert complete(model, "KING. ", 20, rng=rng()) == said
    assert complete(base, "KING. ", 20, rng=rng(), base="base") == said
    assert complete(base, "KING. ", 20, rng=rng(4)) != said


def test_the_command_prints_the_same_text(base, capsys):
    assert cli.main(["generate", "KING. ", "--max-tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"KING. {complete(base, 'KING. ', 20, rng=rng())}\n"


def test_generation_stops_at_the_models_maximum_length():
    model = llama(Config(**{"max_position_embeddings": 8, "hidden_size": 8, "num_attention_heads": 2,
                            "num_key_value_heads": 1, "num_hidden_layers": 1}), rng())  # fmt: skip
    assert len(complete(model, "To be", 99, rng=rng())) == 3
    with pytest.raises(InputError, match="the model takes at most 8"):
        complete(model, "To be or", 99, rng=rng())


def test_a_model_with_an_unknown_tokenizer_is_refused():
    with pytest.raises(InputError, match="tokenizer is not known; expected base="):
        complete(tiny()[0], "To be", rng=rng())
