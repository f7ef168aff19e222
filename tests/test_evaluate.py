"""The whole bench on the tiny SDXL with LoRAs of noise: what is drawn, kept, measured, written and shown."""

import json
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_run import make_run, untrained_clip
from PIL import Image

from lora_nb import models, results
from lora_nb.choose import Choice
from lora_nb.dialects import read_lora
from lora_nb.errors import UserError
from lora_nb.evaluate import _check_data, find_checkpoints, open_evaluation, spread
from lora_nb.events import Notice
from lora_nb.files import write_json
from lora_nb.lora_file import relative_difference
from lora_nb.loss_grid import loss_grid
from lora_nb.manifest import read_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(untrained_clip(tmp_path_factory.mktemp("clip")))


def bench(run, clip, **settings):
    return open_evaluation(run, scorer=clip, num_prompts=2, **{"seeds": (1, 2), "device": "cpu"} | settings)


@pytest.fixture(scope="module")
def evaluation(run, clip):
    evaluation = bench(run, clip)
    evaluation.measure()
    evaluation.choose()
    return evaluation


def test_everything_is_drawn_once_and_a_second_look_loads_no_model(evaluation, run, clip):
    pictures = list((run / "evaluation" / "pictures").glob("*.png"))
    assert len(pictures) == 3 * 2 * (2 + len(evaluation.plan.quiet_prompts))  # base and two steps, two seeds
    before = {path: path.stat().st_mtime_ns for path in pictures}
    again = bench(run, clip)
    again.painter._load = lambda: pytest.fail("the base was loaded again")
    again.measure()
    assert {path: path.stat().st_mtime_ns for path in pictures} == before
    for key, candidate in evaluation.candidates.items():
        assert np.array_equal(candidate.identity, again.candidates[key].identity)
        assert candidate.held_out_loss == again.candidates[key].held_out_loss


def test_a_broken_off_evaluation_draws_only_what_is_missing(evaluation, run, clip):
    path = evaluation.draw(10).pictures[0][0]
    whole = path.read_bytes()
    path.unlink()
    assert bench(run, clip).draw(10).pictures[0][0] == path
    assert np.abs(np.asarray(Image.open(path), int) - np.asarray(Image.open(BytesIO(whole)), int)).max() <= 2  # another batch, so rounding


def test_seed_prompt_strength_and_weights_each_name_another_picture(evaluation):
    painter, lora = evaluation.painter, evaluation.checkpoints
    paths = {painter.path("a", 1), painter.path("b", 1), painter.path("a", 2), *(painter.path("a", 1, lora[n]) for n in lora)}
    paths |= {painter.path("a", 1, lora[10], 0.5)}
    assert len(paths) == 6
    assert painter.path("a", 1, lora[10], 0.0) == painter.path("a", 1)


def test_strength_zero_is_the_base_and_a_lora_is_not(evaluation):
    base, half, full = (np.asarray(Image.open(evaluation.draw(*which).pictures[0][0]), int) for which in ((0,), (20, 0.5), (20,)))
    assert 0 < np.abs(half - base).mean() < np.abs(full - base).mean()


def test_losses_are_measured_on_the_same_noise_for_all(evaluation):
    base = evaluation.losses(0)
    assert {part: losses.shape for part, losses in base.items()} == {"train": (4, 4), "held_out": (3, 4)}
    for path in (evaluation.folder / "losses").glob("*.json"):
        path.unlink()
    again = evaluation.losses(0)
    assert np.allclose(base["train"], again["train"], rtol=1e-5)
    ratios = evaluation.losses(20)["held_out"] / base["held_out"]
    assert np.isfinite(ratios).all() and 1e-6 < np.abs(ratios - 1).max() < 0.5


def test_a_loss_is_what_the_unet_misses_of_the_noise():
    class Silent(torch.nn.Module):
        """Predicts no noise at all, so that it misses all of it: about 1."""

        config, dtype = SimpleNamespace(addition_embed_type="text_time"), torch.float32
        conv_in = torch.nn.Conv2d(4, 4, 1)

        def forward(self, latents, *_, **__):
            return (torch.zeros_like(latents),)

    buckets = [(64, 64), (48, 80), (64, 64)]
    pictures = [SimpleNamespace(bucket=b, caption="a", original_size=b, crop_top_left=(0, 0), target_size=b) for b in buckets]
    losses = loss_grid(
        Silent(), models.load_part("data/tiny_sdxl", "noise_scheduler"), pictures,
        lambda picture: torch.zeros(4, picture.bucket[1] // 8, picture.bucket[0] // 8),
        lambda caption: (torch.zeros(1, 77, 8), torch.zeros(1, 8)), {}, timesteps=(10, 900), batch_size=2,
    )  # fmt: skip
    assert losses == pytest.approx(np.ones((3, 2)), abs=0.25)
    assert len({round(loss, 6) for loss in losses.ravel()}) == 6  # every cell has noise of its own


def test_scores_and_choice_are_written_and_read_back(evaluation, run):
    results.save_results(evaluation)
    rows = results.read_scores(run)
    assert [(row["step"], row["strength"]) for row in rows] == [(0, 0), (10, 1), (20, 1)]
    assert rows[1]["identity_low"] <= rows[1]["identity"] <= rows[1]["identity_high"]
    assert rows[1]["identity"] == pytest.approx(evaluation.candidates[10, 1.0].identity.mean(), rel=1e-4)
    assert {f"loss_{band}" for band in results.BANDS} <= set(rows[1])
    choice = results.read_choice(run)
    assert choice["plan"]["prompts"] == list(evaluation.plan.prompts)
    assert str(run) not in json.dumps(choice)


def test_the_chosen_file_loads_as_the_checkpoint_it_came_from(evaluation, run):
    evaluation.choice = Choice(10, 0.8, "good", "Take it.")
    results.save_results(evaluation)
    chosen = results.copy_chosen(evaluation)
    assert chosen == run / "final" / "zed_chosen.safetensors"
    unet = evaluation.painter.pipeline().unet
    before = chosen.stat().st_mtime_ns
    assert results.copy_chosen(evaluation).stat().st_mtime_ns == before  # the same again is left alone
    pairs = [sorted(read_lora(path, unet), key=lambda m: m.path) for path in (chosen, evaluation.checkpoints[10])]
    assert len(pairs[0]) == len(pairs[1]) > 0
    assert max(relative_difference(a, b) for a, b in zip(*pairs, strict=True)) < 2e-3


def test_pictures_that_were_not_learned_come_with_a_reason(evaluation):
    rows = results.picture_learning(evaluation)
    assert len(rows) == 4 and {row["verdict"] for row in rows} <= {"first", "learned", "last", "never"}
    assert all(len(row["ratios"]) == 2 for row in rows)
    assert any(row["reason"] for row in rows)


def test_grids_are_saved_as_png(evaluation, run):
    evaluation.measure([10], strengths=(0.5,))
    drawn = {
        "before_after": results.before_after(evaluation, 20),
        "checkpoints": results.checkpoint_grid(evaluation),
        "without_trigger": results.quiet_grid(evaluation, 20),
        "strengths": results.strength_grid(evaluation, 10),
        "nearest": results.copies_grid(evaluation, 20),
    }
    for name, path in drawn.items():
        assert path == run / "evaluation" / "grids" / f"{name}.png"
        assert min(Image.open(path).size) > 144


def test_a_damaged_checkpoint_is_named_and_passed_over(evaluation, tmp_path):
    run = make_run(tmp_path, steps=(10, 20), train=2, held_out=0)
    lora = run / "checkpoints" / "checkpoint-20" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(lora.read_bytes()[:-1])
    notices = []
    assert list(find_checkpoints(run, notices.append)) == [10]
    assert isinstance(notices[0], Notice) and "checkpoint-20 is damaged" in notices[0].message


def test_a_manifest_about_other_pictures_is_refused(tmp_path):
    run = make_run(tmp_path, steps=(10,), train=2, held_out=2)
    files, manifest = find_checkpoints(run), read_manifest(run / "dataset_manifest.json")
    _check_data(run, manifest, files)
    write_json(files[10].parent / "state.json", {"identity": {"data": manifest.training_data}})
    _check_data(run, manifest, files)
    _check_data(run, manifest.with_samples(manifest.train()), files)  # other held-out pictures may be taken
    with pytest.raises(UserError, match="trained on other pictures"):
        _check_data(run, manifest.with_samples(manifest.samples[1:]), files)


def test_a_run_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="notebook 03"):
        open_evaluation(tmp_path / "nowhere")


def test_checkpoints_are_spread_with_the_last_among_them():
    steps = {step: None for step in range(50, 450, 50)}
    assert list(spread(steps, 4)) == [100, 200, 300, 400]
    assert list(spread(steps, 0)) == list(steps)
    assert list(spread(steps, 1)) == [400]
    assert list(spread(steps, 3))[-1] == 400
