"""The demonstration: what it predicts, and which excerpt it shows."""

from contextlib import nullcontext

import numpy as np
import pytest
from texts import TEXT

from flash_jax._cli import demo, demo_view
from flash_jax._tiles.axis import BlockSizes


def as_bytes(text):
    return np.frombuffer(text, np.uint8)


def mixed_text(rng, n):
    """Draws n bytes: a few words, each of which occurs often."""
    words = [rng.integers(97, 101, rng.integers(1, 6)) for _ in range(11)]
    picks = (words[i] for i in rng.integers(0, len(words), n))
    return np.concatenate([np.append(word, 32) for word in picks])[:n].astype(np.uint8)


def nearest_byte_scores(data, context, byte):
    """Computes the scores of all bytes at positions 1.., in float64, one position at a time."""
    lags, size = context.shape[0], context.shape[-1]
    contexts = []
    for s in range(len(data)):
        total = np.zeros(size)
        for lag in range(1, min(lags, s) + 1):
            total += 0.8**lag * context[lag - 1, data[s - lag]].astype(np.float64)
        length = np.sqrt(np.sum(total**2))
        contexts.append(total / length if length else total)
    scores = []
    for t in range(1, len(data)):
        logits = np.array([30 * contexts[t] @ contexts[s] for s in range(t)])
        weights = np.exp(logits - logits.max())
        mean = sum(w * byte[data[s]] for s, w in enumerate(weights)) / weights.sum()
        scores.append(byte.astype(np.float64) @ mean)
    return np.array(scores)


def test_predictions_are_those_of_a_slow_float64_loop():
    data = mixed_text(np.random.default_rng(0), 257)
    codes = demo.random_codes(3)
    scores = nearest_byte_scores(data, *codes)
    predicted = demo.predict(data, codes, BlockSizes(48, 37))
    first, second = np.sort(scores)[:, :-3:-1].T
    clear = first - second > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(predicted[clear], np.argmax(scores, axis=1)[clear])


@pytest.mark.parametrize("changed", [1, 5, 120, 256])
def test_a_byte_changes_no_prediction_of_itself_or_of_an_earlier_one(changed):
    data = mixed_text(np.random.default_rng(1), 257)
    other = data.copy()
    other[changed:] = as_bytes(TEXT)[: 257 - changed]
    other[changed] = 200
    codes = demo.random_codes(0)
    # Entry i predicts byte i + 1.
    before, after = (demo.predict(x, codes, BlockSizes(48, 37))[:changed] for x in (data, other))
    np.testing.assert_array_equal(before, after)


def test_encoding_shows_a_position_neither_its_byte_nor_a_later_one():
    data = mixed_text(np.random.default_rng(2), 61)
    other = data.copy()
    other[23:] = 200
    codes = demo.random_codes(0)
    before, after = demo.encode(data, codes), demo.encode(other, codes)
    np.testing.assert_array_equal(before.q[:23], after.q[:23])  # row 22 predicts byte 23
    np.testing.assert_array_equal(before.k[:24], after.k[:24])  # key 23 is of the bytes before 23
    np.testing.assert_array_equal(before.v[:23], after.v[:23])


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10])
def test_texts_shorter_than_the_context_are_predicted(n):
    predicted = demo.predict(as_bytes(b"a" * n), demo.random_codes(0))
    assert predicted.tolist() == [ord("a")] * (n - 1)


def test_block_sizes_and_seed_reach_the_computation(text_file):
    data = demo.read_text(text_file, 500)
    blocks = BlockSizes(96, 1000)
    (first,), (again,), (seeded,) = (
        demo.measure(data, seed, blocks, lambda _: nullcontext()) for seed in (0, 0, 1)
    )
    assert first.tiles == BlockSizes(96, 499)  # cut to the positions
    assert first.difference == again.difference
    assert first.difference != seeded.difference


def test_measure_beats_the_baseline_and_agrees_with_jax_nn():
    steps = []

    def step(name):
        steps.append(name)
        return nullcontext()

    (result,) = demo.measure(as_bytes(TEXT), 0, None, step)
    assert steps == ["encoding", "compiling", "attention", "decoding", "comparing"]
    assert result.positions == 3000
    assert result.accuracy > 0.9
    assert result.late_accuracy > 0.98
    assert result.common == ord(" ")
    assert result.baseline == TEXT[1:].count(b" ") / 3000
    assert result.compared == 1024
    assert result.difference < 1e-4
    assert result.score_bytes == 4 * 3000**2
    assert 0 < result.temp_bytes < result.score_bytes
    assert result.gflops == pytest.approx(2 * 3000**2 * 128 / result.run_seconds / 1e9)


def test_int8_predicts_as_well():
    floats, int8 = demo.measure(
        as_bytes(TEXT), 0, None, lambda _: nullcontext(), ("float32", "int8")
    )
    assert (floats.products, int8.products) == ("float32", "int8")
    assert floats.difference < 1e-4 < int8.difference < 0.1
    assert np.mean(floats.right == int8.right) > 0.99


# --- The excerpt


def test_the_excerpt_marks_whole_characters_and_is_cut_to_the_width():
    text = "skipped\n\na\tb\x1b\n€uro 漢字".encode()
    right = np.ones(len(text), bool)
    right[text.index("€".encode()) + 1] = False  # one byte of three
    lines = demo_view.last_lines(as_bytes(text), right[1:], lines=2, columns=7)
    assert ["".join(c.text for c in line) for line in lines] == ["a b ", "€uro 漢"]
    assert [c.right for c in lines[1]] == [False, True, True, True, True, True]
    assert lines[1][-1].cells == 2


def test_a_character_cut_by_the_end_is_not_shown():
    text = "ab€".encode()[:-1]
    (line,) = demo_view.last_lines(as_bytes(text), np.ones(len(text) - 1, bool), 3, 80)
    assert [(c.text, c.right) for c in line] == [("a", False), ("b", True)]
