"""Each meter on planted cases: vectors and pictures of which the answer is known."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lora_nb import scores
from lora_nb.embedders import picture_hashes
from lora_nb.scores import unit

P, S, D = 6, 3, 64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def near(centre, rng, *shape, spread=0.5):
    """Unit vectors scattered around `centre` [..., D]."""
    return unit(centre + spread * unit(rng.normal(size=(*shape, D))))


def test_intervals_hold_the_truth_as_often_as_they_say(rng):
    hits = 0
    for _ in range(200):
        values = 0.3 + 0.1 * rng.normal(size=(8, 1)) + 0.1 * rng.normal(size=(1, 8)) + 0.05 * rng.normal(size=(8, 8))
        _, low, high = scores.estimate(values)
        hits += low <= 0.3 <= high
    assert 170 <= hits <= 200  # 95 % asked for; a bootstrap over eight is a little narrow


def test_an_interval_is_the_same_twice_and_nothing_is_certain_from_spread_prompts(rng):
    values = rng.normal(size=(P, S))
    assert scores.estimate(values) == scores.estimate(values)
    assert scores.estimate(values).low < values.mean() < scores.estimate(values).high


def test_identity_rises_towards_the_references(rng):
    character = unit(rng.normal(size=D))
    references = near(character, rng, 8)
    strangers, likenesses = near(0 * character, rng, P, S), near(character, rng, P, S)
    assert scores.identity(likenesses, references).mean() > scores.identity(strangers, references).mean() + 0.4
    assert scores.identity_ceiling(references) == pytest.approx(scores.identity(likenesses, references).mean(), abs=0.06)
    assert np.isnan(scores.identity_ceiling(references[:1]))


def test_adherence_falls_to_chance_when_prompts_are_ignored(rng):
    texts = unit(rng.normal(size=(P, D)))
    obedient = near(texts[:, None], rng, P, S)
    deaf = near(texts.mean(0), rng, P, S)
    chance = scores.adherence_by_chance(obedient, texts)
    assert scores.adherence(obedient, texts).mean() > 0.7
    assert scores.adherence_by_chance(deaf, texts) == pytest.approx(scores.adherence(deaf, texts).mean(), abs=0.05)
    assert chance < 0.2


def test_diversity_is_nothing_for_a_run_that_draws_one_picture(rng):
    same = np.repeat(unit(rng.normal(size=(P, 1, D))), S, axis=1)
    assert scores.diversity(same) == pytest.approx(np.zeros(P), abs=1e-6)
    assert scores.diversity(unit(rng.normal(size=(P, S, D)))).min() > 0.5
    assert np.isnan(scores.diversity(same[:, :1])).all()


def test_drift_is_zero_for_the_same_pictures_and_one_for_another_seed(rng):
    base = near(unit(rng.normal(size=(P, 1, D))), rng, P, 40)
    other_seeds = near(base.mean(1, keepdims=True), rng, P, 40)
    assert scores.drift(base, base) == pytest.approx(np.zeros((P, 40)), abs=1e-5)
    assert scores.drift(np.roll(base, 1, axis=1), base).mean() == pytest.approx(1, abs=0.1)
    assert scores.drift(other_seeds, base).mean() < 1.1


def test_leak_is_the_share_of_the_character_that_nobody_called(rng):
    character = unit(rng.normal(size=D))
    references, base = near(character, rng, 8), near(0 * character, rng, P, S)
    full = near(character, rng, P, S)
    gain = (scores.identity(full, references) - scores.identity(base, references)).mean()
    assert scores.leak(base, base, references, gain) == pytest.approx(np.zeros((P, S)), abs=1e-5)
    assert scores.leak(full, base, references, gain).mean() == pytest.approx(1, abs=0.05)


def picture(rng, detail=10):
    """A random picture of soft shapes."""
    return Image.fromarray(rng.integers(0, 255, (detail, detail, 3), dtype=np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)


def as_generated(image, rng):
    """A copy as a model makes it: softer, noisier, a pixel aside."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), float)
    return Image.fromarray((np.roll(pixels, 1, axis=1) + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8))


def thumbnails(pictures):
    """Unit vectors of pictures that stand in for CLIP's."""
    return unit(np.stack([np.asarray(p.resize((8, 8)), float).ravel() for p in pictures]) - 127)


def test_copies_are_found_and_new_pictures_are_not(rng):
    training, references, new = ([picture(rng) for _ in range(n)] for n in (20, 8, 12))
    samples = [as_generated(p, rng) for p in training[:6]] + new
    limits = scores.copy_limits(thumbnails(references), thumbnails(training), picture_hashes(references), picture_hashes(training))
    copies = scores.find_copies(thumbnails(samples), thumbnails(training), picture_hashes(samples), picture_hashes(training), limits)
    assert copies.copied.tolist() == [True] * 6 + [False] * 12
    assert copies.nearest[:6].tolist() == list(range(6))
    assert copies.share == pytest.approx(6 / 18)


def test_the_held_out_references_set_the_limit_so_none_of_them_is_a_copy(rng):
    training = [picture(rng) for _ in range(20)]
    references = [as_generated(training[0], rng), *(picture(rng) for _ in range(5))]  # one was nearly in training
    vectors, hashes = (thumbnails(training), picture_hashes(training))
    limits = scores.copy_limits(thumbnails(references), vectors, picture_hashes(references), hashes)
    assert not scores.find_copies(thumbnails(references), vectors, picture_hashes(references), hashes, limits).copied.any()


def test_without_references_the_training_pictures_set_the_limit(rng):
    training = [picture(rng) for _ in range(20)]
    vectors, hashes = thumbnails(training), picture_hashes(training)
    limits = scores.copy_limits(vectors[:0], vectors, hashes[:0], hashes)
    samples = [as_generated(training[3], rng), picture(rng)]
    assert scores.find_copies(thumbnails(samples), vectors, picture_hashes(samples), hashes, limits).copied.tolist() == [True, False]


def test_hash_distances_count_differing_bits():
    a, b = np.zeros((1, 144), bool), np.zeros((2, 144), bool)
    b[1, :36] = True
    assert scores.hash_distances(a, b).tolist() == [[0, 0.25]]


def test_loss_ratios_name_the_picture_that_was_not_learned(rng):
    base = rng.uniform(0.1, 1, (5, 4))
    learned = base * np.array([0.5, 0.5, 1.0, 0.5, 0.5])[:, None]
    assert scores.learned(learned, base).argmax() == 2
    assert scores.loss_ratios(base * 0.5, base) == pytest.approx([0.5] * 4)


def test_what_is_alike_in_one_way_only_is_no_copy(rng):
    vectors, hashes, limits = unit(rng.normal(size=(2, D))), rng.random((2, 144)) < 0.5, scores.CopyLimits(0.9, 0.1)
    same_layout = scores.find_copies(vectors[:1], vectors[1:], hashes[:1], hashes[:1], limits)
    same_content = scores.find_copies(vectors[:1], vectors[:1], hashes[:1], hashes[1:], limits)
    both = scores.find_copies(vectors[:1], vectors[:1], hashes[:1], hashes[:1], limits)
    assert (same_layout.share, same_content.share, both.share) == (0, 0, 1)
