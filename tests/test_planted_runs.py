"""The whole bench with the shipped CLIP on pictures of runs that copy, leak, learned nothing, or are best in the middle."""

import pytest
from planted_world import (
    ROOT,
    a_training_picture,
    anybody,
    bench,
    half_learned,
    hero_everywhere,
    hero_where_called,
    hero_who_does_not_listen,
)

from lora_nb.evaluate import TINY_CLIP

pytestmark = pytest.mark.skipif(not (ROOT / TINY_CLIP).is_dir(), reason="the tiny CLIP has not been trained")


@pytest.fixture(scope="module")
def verdict_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")

    def judge(**behaviours):
        evaluation = bench(folder, {int(name[1:]): kind for name, kind in behaviours.items()})
        evaluation.measure()
        return evaluation, evaluation.choose()

    return judge


def test_the_best_is_found_in_the_middle(verdict_of):
    _, choice = verdict_of(s100=half_learned, s200=hero_where_called, s400=hero_who_does_not_listen, s800=a_training_picture)
    assert (choice.step, choice.verdict) == (200, "overtrained")


def test_a_perfect_run_comes_near_the_references_and_keeps_its_obedience(verdict_of):
    evaluation, choice = verdict_of(s100=hero_where_called)
    scale, measured = evaluation.scale(), evaluation.candidates[100, 1.0]
    assert measured.identity.mean() > scale.base_identity.mean() + 0.6 * (scale.identity_ceiling - scale.base_identity.mean())
    assert measured.adherence.mean() > scale.adherence_by_chance + 0.7 * (scale.base_adherence.mean() - scale.adherence_by_chance)
    assert measured.copies <= 0.1 and abs(measured.leak.mean()) < 0.1 and choice.step == 100


def test_a_run_that_copies_is_caught(verdict_of):
    evaluation, choice = verdict_of(s100=a_training_picture)
    assert evaluation.candidates[100, 1.0].copies > 0.7
    assert choice.verdict == "copies"


def test_a_run_that_leaks_is_caught(verdict_of):
    evaluation, choice = verdict_of(s100=hero_everywhere)
    assert evaluation.candidates[100, 1.0].leak.mean() > 0.5
    assert choice.verdict == "leaks"


def test_a_run_that_learned_nothing_is_caught(verdict_of):
    _, choice = verdict_of(s100=anybody, s200=anybody)
    assert choice.verdict == "learned nothing"


def test_a_run_that_does_not_listen_scores_near_chance(verdict_of):
    evaluation, _ = verdict_of(s100=hero_who_does_not_listen)
    scale, measured = evaluation.scale(), evaluation.candidates[100, 1.0]
    kept = (measured.adherence.mean() - scale.adherence_by_chance) / (scale.base_adherence.mean() - scale.adherence_by_chance)
    assert kept < 0.4
