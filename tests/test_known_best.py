"""A run that is over-trained on purpose: the choice must land where a judge that is no CLIP sees the best pictures.

About four minutes on two cores: `pytest -m slow tests/test_known_best.py`.
"""

import shutil

import numpy as np
import pytest
from planted_world import ROOT, TRIGGER

from lora_nb.cache import encode
from lora_nb.choose import Guards
from lora_nb.config import load_config
from lora_nb.dataset import scan, validate
from lora_nb.evaluate import open_evaluation
from lora_nb.train import train

pytestmark = pytest.mark.slow
PICTURES, STEPS, EVERY = 6, 1600, 200


@pytest.fixture(scope="module")
def overtrained(tmp_path_factory):
    """A run on very few pictures whose captions say nothing, for far too many steps, with every checkpoint kept."""
    folder, shipped = tmp_path_factory.mktemp("overtrained"), ROOT / "data" / "aldar_kose"
    for part in ("images", "captions"):
        (folder / "data" / part).mkdir(parents=True)
        for path in sorted((shipped / part).iterdir())[:PICTURES]:
            shutil.copy(path, folder / "data" / part)
    for path in (folder / "data" / "captions").iterdir():
        path.write_text(TRIGGER)  # nothing is said of the places: sooner or later they belong to him
    shutil.copytree(shipped / "reference", folder / "data" / "reference")
    config = load_config(
        "cpu-demo", run_name="overtrained", output_dir=str(folder), dataset_path=str(folder / "data"), max_steps=STEPS, save_every=EVERY,
        save_total_limit=None, validate_every=None, caption_dropout=0.0, preservation_weight=0.0, learning_rate=6e-3, lr_scheduler="constant_with_warmup",
    )  # fmt: skip
    config.save()
    validate(scan(folder / "data"), config.resolution, TRIGGER).write(config.run_dir)
    encode(config.run_dir / "dataset_manifest.json", config.base_model)
    train(config)
    return config.run_dir


def test_the_choice_is_as_good_as_the_known_best(overtrained):
    import oracle

    evaluation = open_evaluation(overtrained, checkpoints=0, num_prompts=8, seeds=(1, 2, 3), steps=20, device="cpu", batch_size=12)
    evaluation.measure()
    choice = evaluation.choose(Guards(leak=9.0))  # what it does without the trigger is another question
    truth = {}
    for step in evaluation.steps:
        pictures = [(path, prompt) for prompt, row in zip(evaluation.plan.prompts, evaluation.draw(step).pictures, strict=True) for path in row]
        obedience, likeness = (np.mean(values) for values in zip(*((oracle.obedience(*p), oracle.likeness(p[0])) for p in pictures), strict=True))
        truth[step] = 2 * obedience * likeness / (obedience + likeness)
        print(step, f"obedience {obedience:.2f} likeness {likeness:.2f} both {truth[step]:.3f}", evaluation.candidates[step, 1.0].copies)
    print(choice)
    assert truth[evaluation.steps[-1]] < 0.9 * max(truth.values())  # or it was not over-trained
    assert truth[choice.step] >= 0.95 * max(truth.values())
    assert choice.step < evaluation.steps[-1]
