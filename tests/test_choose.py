"""Planted runs: the choice must find the best step, and name a run that copies, leaks, learned nothing or is not done."""

import numpy as np
import pytest

from lora_nb.choose import Candidate, Guards, Scale, balance, choose, pareto

P, S = 6, 4
NOISE = np.random.default_rng(0).normal(0, 0.01, (2, P, S))
SCALE = Scale(np.full((P, S), 0.5) + NOISE[0], 0.9, 0.1, np.full((P, S), 0.3) + NOISE[1])


def candidate(step, identity, adherence, strength=1.0, *, leak=0.05, copies=0.0, held_out=0.9, train=0.8):
    """`identity` and `adherence` as shares: 0 base or chance, 1 references or base."""
    return Candidate(
        step, strength, SCALE.base_identity + identity * 0.4 + NOISE[1], 0.1 + adherence * 0.2 + NOISE[0], np.full(P, 0.2),
        np.full((4, S), leak), np.full((4, S), 0.2), copies, held_out, train,
    )  # fmt: skip


def test_the_best_in_the_middle_is_found_and_what_follows_is_called_overtraining():
    run = [candidate(50, 0.3, 1), candidate(100, 0.6, 1), candidate(200, 0.9, 0.95), candidate(400, 0.95, 0.5), candidate(800, 0.95, 0.1)]
    choice = choose(run, SCALE)
    assert (choice.step, choice.strength, choice.verdict) == (200, 1.0, "overtrained")
    assert "follow the prompt less" in choice.sentence
    assert any("undertrained" in reason for reason in choice.reasons)


def test_a_run_that_copies_is_stopped_before_it_does():
    run = [candidate(100, 0.6, 1), candidate(200, 0.85, 1), candidate(400, 1, 1, copies=0.5), candidate(800, 1, 1, copies=0.9)]
    choice = choose(run, SCALE)
    assert (choice.step, choice.verdict) == (200, "overtrained")
    assert choice.sentence == "Take step 200 at strength 1: after that the pictures copy the training set."
    assert set(choice.barred) == {"step 400", "step 800"} and "50%" in choice.barred["step 400"]


def test_a_run_that_leaks_is_taken_at_the_strength_that_does_not():
    run = [candidate(200, 0.9, 1, leak=0.7), candidate(200, 0.8, 1, 0.8, leak=0.3), candidate(200, 0.5, 1, 0.6, leak=0.1)]
    choice = choose(run, SCALE)
    assert (choice.step, choice.strength) == (200, 0.8)
    assert "70%" in choice.barred["step 200"]


def test_where_everything_is_barred_the_least_offender_is_taken_and_named():
    run = [candidate(100, 0.9, 1, leak=0.9), candidate(200, 0.9, 1, leak=0.6), candidate(300, 0.95, 1, copies=0.9)]
    choice = choose(run, SCALE)
    assert (choice.step, choice.verdict) == (200, "leaks")
    assert "least bad, but 60% of the character shows" in choice.sentence
    assert "step 200" not in choice.reasons[-1]


def test_a_run_that_learned_nothing_gets_no_recommendation():
    choice = choose([candidate(100, 0.0, 1), candidate(200, -0.02, 1)], SCALE)
    assert (choice.step, choice.strength, choice.verdict) == (None, None, "learned nothing")
    assert "learning_rate" in " ".join(choice.reasons)


def test_a_run_that_still_rises_is_undertrained():
    choice = choose([candidate(100, 0.2, 1), candidate(200, 0.4, 1), candidate(300, 0.6, 1)], SCALE)
    assert (choice.step, choice.verdict) == (300, "undertrained")
    assert "max_steps" in " ".join(choice.reasons)


def test_a_run_that_hardly_learned_is_not_called_good():
    choice = choose([candidate(20, 0.2, 1), candidate(40, 0.21, 1)], SCALE)
    assert (choice.step, choice.verdict) == (40, "undertrained")
    assert "only 22% of the way" in choice.sentence and "max_steps" in " ".join(choice.reasons)


def test_without_held_out_pictures_the_likeness_says_what_it_is_to():
    flattered = Scale(SCALE.base_identity, 0.9, 0.1, SCALE.base_adherence, held_out=False)
    assert "to its training pictures" in choose([candidate(100, 0.8, 1)], flattered).reasons[0]
    assert "to the held-out references" in choose([candidate(100, 0.8, 1)], SCALE).reasons[0]


def test_of_equals_the_earliest_and_nearest_to_full_strength_is_taken():
    run = [candidate(step, 0.8, 1, strength) for step in (400, 200, 300) for strength in (0.6, 1.0, 0.8)]
    assert (choose(run, SCALE).step, choose(run, SCALE).strength) == (200, 1.0)


def test_harder_new_pictures_tell_overtraining_though_scores_stand_still():
    run = [candidate(200, 0.8, 1, held_out=0.8, train=0.7), candidate(400, 0.8, 1, held_out=0.95, train=0.4)]
    assert "new pictures of the character get harder" in choose(run, SCALE).sentence


def test_the_front_holds_what_nothing_beats():
    run = [candidate(1, 0.5, 1.0), candidate(2, 0.9, 0.5), candidate(3, 0.4, 0.9), candidate(4, 0.7, 0.7)]
    assert [c.step for c in pareto(run)] == [1, 2, 4]
    assert choose(run, SCALE).front == ["step 1", "step 2", "step 4"]


def test_guards_are_the_users():
    run = [candidate(200, 0.9, 1, leak=0.3), candidate(100, 0.6, 1, leak=0.1)]
    assert choose(run, SCALE).step == 200
    assert choose(run, SCALE, Guards(leak=0.2)).step == 100


@pytest.mark.parametrize("identity, adherence, expected", [(1, 1, 1), (0, 1, 0), (1, 0, 0), (0.5, 0.5, 0.5), (3, 3, 1)])
def test_balance_needs_both(identity, adherence, expected):
    assert balance(candidate(1, identity, adherence), SCALE).mean == pytest.approx(expected, abs=0.03)


def test_what_learned_nothing_is_not_taken_because_it_does_not_leak():
    choice = choose([candidate(100, 0, 1), candidate(200, 0.8, 1, leak=0.9)], SCALE)
    assert (choice.step, choice.verdict) == (200, "leaks")


def test_a_scorer_that_cannot_tell_prompts_apart_is_named():
    deaf = Scale(SCALE.base_identity, 0.9, float(SCALE.base_adherence.mean()), SCALE.base_adherence)
    assert "hardly tells" in " ".join(choose([candidate(100, 0.8, 1)], deaf).reasons)


def test_a_lead_within_the_uncertainty_does_not_cost_more_training():
    noise = np.random.default_rng(1).normal(0, 0.2, (2, P, S))
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    early, late = (candidate(step, 0.7 + lead + own, 1) for step, lead, own in ((100, 0.0, noise[0]), (200, 0.02, noise[1])))
    assert balance(late, SCALE).mean > balance(early, SCALE).mean
    choice = choose([early, late], SCALE)
    assert choice.step == 100
    assert any("Step 200 measured highest" in reason for reason in choice.reasons)


def test_the_last_step_is_not_undertrained_when_it_is_no_better_than_the_one_before():
    choice = choose([candidate(100, 0.8, 1, copies=0.5), candidate(200, 0.8, 1)], SCALE)
    assert (choice.step, choice.verdict) == (200, "good")
