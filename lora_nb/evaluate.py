"""From checkpoints to one recommendation: draw base and candidates at the same prompts and seeds, measure, choose.

Everything is kept under the run's evaluation/: pictures and losses by content, so that a second look costs nothing.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lora_nb import models, scores
from lora_nb.cache import Samples, cached_samples, fresh_samples, weights_of
from lora_nb.checkpoint import LORA, STATE, damage, list_checkpoints
from lora_nb.choose import Candidate, Choice, Guards, Scale, choose
from lora_nb.config import read_config
from lora_nb.embedders import ClipEmbedder, DinoEmbedder, picture_hashes
from lora_nb.errors import UserError
from lora_nb.events import Notice, Progress, ignore
from lora_nb.files import sha256_file, write_json
from lora_nb.loss_grid import TIMESTEPS, loss_grid
from lora_nb.manifest import WITH_LATENTS, Manifest, best_manifest, open_sample, read_manifest
from lora_nb.plan import Plan, make_plan
from lora_nb.sampling import Painter

FOLDER = "evaluation"
TINY_CLIP, CLIP = "data/tiny_clip", "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Drawn:
    """Pictures of one candidate: `pictures` [prompt][seed] with the trigger, `quiet` [quiet prompt][seed] without."""

    pictures: list[list[Path]]
    quiet: list[list[Path]]


@dataclass
class Evaluation:
    """A run on the bench. `checkpoints` are LoRA files by step; step 0 is the base."""

    run_dir: Path
    plan: Plan
    checkpoints: dict[int, Path]
    manifest: Manifest
    painter: Painter
    embedder: ClipEmbedder
    picture_embedder: ClipEmbedder  # of identity, diversity, leak and copies; the same one, or DINO
    samples: Samples | None  # latents, for the losses; None measures none
    candidates: dict[tuple[int, float], Candidate] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def folder(self) -> Path:
        return self.run_dir / FOLDER

    @property
    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint."""
        return sorted(self.checkpoints)

    # ---- pictures

    def draw(self, step: int, strength: float = 1.0, on_event=ignore) -> Drawn:
        """The plan's pictures of the checkpoint of `step` (0: the base), drawn or found."""
        lora = self.checkpoints[step] if step else None
        grid = self.painter.draw(self.plan.prompts + self.plan.quiet_prompts, self.plan.seeds, lora, strength, on_event)
        return Drawn(grid[: len(self.plan.prompts)], grid[len(self.plan.prompts) :])

    # ---- what is compared with

    @cached_property
    def references(self) -> list:
        """PIL pictures of the character that training never saw; its training pictures where fewer than two are held out."""
        return self._opened(self.manifest.held_out() if self.has_held_out else self.manifest.train())

    @property
    def has_held_out(self) -> bool:
        return len(self.manifest.held_out()) > 1

    @cached_property
    def training_pictures(self) -> list:
        """PIL pictures as training sees them."""
        return self._opened(self.manifest.train())

    def scale(self) -> Scale:
        """Where the scores' zero and one lie: the base and the references."""
        base, texts = self._vectors(self.draw(0).pictures), self.embedder.texts(self.plan.texts)
        worded = self._vectors(self.draw(0).pictures, self.embedder)
        references = self.picture_embedder.pictures(self.references)
        return Scale(
            scores.identity(base, references), scores.identity_ceiling(references),
            scores.adherence_by_chance(worded, texts), scores.adherence(worded, texts), self.has_held_out,
        )  # fmt: skip

    def _opened(self, samples) -> list:
        return [open_sample(self.manifest, sample) for sample in samples]

    def _vectors(self, paths, embedder=None) -> np.ndarray:
        """Unit rows [rows, columns, D] of a grid of pictures."""
        rows = (embedder or self.picture_embedder).pictures([path for row in paths for path in row])
        return rows.reshape(len(paths), -1, rows.shape[-1])

    @cached_property
    def _training_marks(self):
        """Vectors [T, D] and hashes of the training pictures, and the limits beyond which a sample is a copy of one."""
        training, held_out = self.training_pictures, self._opened(self.manifest.held_out())
        vectors, hashes = self.picture_embedder.pictures(training), picture_hashes(training)
        new = self.picture_embedder.pictures(held_out) if held_out else np.empty((0, vectors.shape[1]))
        new_hashes = picture_hashes(held_out) if held_out else np.empty((0, hashes.shape[1]), bool)
        return vectors, hashes, scores.copy_limits(new, vectors, new_hashes, hashes)

    # ---- measuring

    def measure(self, steps=None, strengths=(1.0,), on_event=ignore) -> list[Candidate]:
        """Draw and measure these checkpoints (all by default) at these strengths; what is measured already stays."""
        steps = self.steps if steps is None else steps
        if unknown := sorted(set(steps) - set(self.steps)):
            raise UserError(f"There is no checkpoint of step {unknown[0]} in {self.run_dir.name}: take of {self.steps}.")
        wanted = [(step, float(strength)) for step in steps for strength in strengths]
        for number, (step, strength) in enumerate(wanted):
            on_event(Progress("candidates", number, len(wanted), f"step {step} at {strength:g}"))
            if (step, strength) not in self.candidates:
                self.candidates[step, strength] = self._measure(step, strength, on_event)
        on_event(Progress("candidates", len(wanted), len(wanted)))
        return [self.candidates[key] for key in wanted]

    def _measure(self, step, strength, on_event) -> Candidate:
        drawn, base = self.draw(step, strength, on_event), self.draw(0, on_event=on_event)
        texts, references = self.embedder.texts(self.plan.texts), self.picture_embedder.pictures(self.references)
        vectors, base_vectors, quiet, base_quiet = map(self._vectors, (drawn.pictures, base.pictures, drawn.quiet, base.quiet))
        likeness = scores.identity(vectors, references)
        way = max(scores.identity_ceiling(references) - scores.identity(base_vectors, references).mean(), 1e-3)
        return Candidate(
            step, strength, likeness,
            adherence=scores.adherence(self._vectors(drawn.pictures, self.embedder), texts),
            diversity=scores.diversity(vectors),
            leak=scores.leak(quiet, base_quiet, references, way),
            drift=scores.drift(quiet, base_quiet),
            copies=self.copies(step, strength).share,
            **self._loss_ratios(step, strength, on_event),
        )  # fmt: skip

    def copies(self, step: int, strength: float = 1.0) -> scores.Copies:
        """The nearest training picture of every picture with the trigger, prompt by prompt."""
        paths = [path for row in self.draw(step, strength).pictures for path in row]
        vectors, hashes, limits = self._training_marks
        return scores.find_copies(self.picture_embedder.pictures(paths), vectors, picture_hashes(paths), hashes, limits)

    def _loss_ratios(self, step, strength, on_event) -> dict[str, float]:
        """Geometric mean of the ratios to the base, over pictures and bands; at full strength only."""
        if strength != 1 or self.samples is None:
            return {}
        losses, base = self.losses(step, on_event), self.losses(0, on_event)
        ratio = {part: float(np.exp(np.log(scores.learned(losses[part], base[part])).mean())) for part in losses if len(base[part])}
        return {f"{part}_loss": value for part, value in ratio.items()}

    def losses(self, step: int, on_event=ignore) -> dict[str, np.ndarray]:
        """{"train": [N, T], "held_out": [M, T]} of the checkpoint of `step` (0: the base) on the fixed grid."""
        lora = self.checkpoints[step] if step else None
        pictures = [*self.manifest.train(), *self.manifest.held_out()]
        recipe = [self.painter.recipe["base"], sha256_file(lora) if lora else "", TIMESTEPS, [(p.sha256, p.caption, p.bucket) for p in pictures]]
        path = self.folder / "losses" / f"{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:24]}.json"
        if not path.is_file():
            pipeline = self.painter.pipeline(lora)
            scheduler = models.load_part(self.painter.base_model, "noise_scheduler")
            text = [pipeline.tokenizer, pipeline.tokenizer_2], [pipeline.text_encoder, pipeline.text_encoder_2]
            grid = loss_grid(
                pipeline.unet, scheduler, pictures, lambda picture: self.samples.latents(picture)[0],
                lambda caption: models.encode_prompts(*text, [caption]), pipeline.vae.config, device=pipeline._execution_device,
                batch_size=2 * self.painter.batch_size, on_event=on_event,
            )  # fmt: skip
            write_json(path, grid.tolist())
        grid, trained = np.array(json.loads(path.read_text())), len(self.manifest.train())
        return {"train": grid[:trained], "held_out": grid[trained:]}

    def choose(self, guards: Guards = Guards()) -> Choice:  # noqa: B008  it is frozen
        """One checkpoint and strength of those measured, with its reasons."""
        if not self.candidates:
            raise UserError("Nothing has been measured yet: call measure() first.")
        self.choice = choose(list(self.candidates.values()), self.scale(), guards)
        return self.choice

    def close(self) -> None:
        """Give the models' memory back."""
        self.painter.close()
        self.embedder.close()
        self.picture_embedder.close()


def open_evaluation(
    run_dir, *, prompts=(), quiet_prompts=(), num_prompts=6, seeds=(42, 123), class_word=None, checkpoints=0, scorer=None, dino=None,
    steps=None, device=None, batch_size=None, losses=True, on_event=ignore,
) -> Evaluation:  # fmt: skip
    """Put the run in `run_dir` on the bench; nothing is drawn yet.

    class_word: what stands for the trigger in prompts without it; None takes the run's. checkpoints: how many of them, evenly
    spread with the last among them; 0 takes all. scorer: a CLIP's name; None takes
    the tiny one for models that draw it, else OpenAI's largest. dino: a DINOv2's name, to see identity through it.
    steps: denoising steps, None as in validation. batch_size: pictures at once, None takes 8 small ones or 1 large, which fits
    wherever the run was trained. losses: measure the loss grid too. Raises UserError.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"There is no trained run at {run_dir}: check RUN_NAME, or run notebook 03 first.")
    config, manifest_path = read_config(run_dir / "config.yaml"), best_manifest(run_dir)
    manifest, device = read_manifest(manifest_path), device or models.default_device()
    files = find_checkpoints(run_dir, on_event)
    _check_data(run_dir, manifest, files)
    train, held_out = ([sample.caption for sample in part] for part in (manifest.train(), manifest.held_out()))
    if len(held_out) < 2:
        on_event(Notice("Fewer than two pictures are held out, so likeness is measured against the training pictures, which flatters a LoRA that copies: keep some out."))  # fmt: skip
    plan = make_plan(
        config.trigger_token, train, held_out, prompts=prompts, quiet_prompts=quiet_prompts, number=num_prompts, seeds=seeds,
        class_word=class_word or config.class_word,
    )  # fmt: skip
    painter = Painter(
        config.base_model, run_dir / FOLDER / "pictures", height=config.resolution, width=config.resolution, vae_model=config.vae_model,
        scheduler=config.scheduler, dtype=models.DTYPES.get(config.precision, torch.float16) if device != "cpu" else torch.float32,
        device=device, steps=steps or config.validation_steps, guidance_scale=config.validation_guidance,
        negative_prompt=config.validation_negative_prompt, batch_size=batch_size or (8 if config.resolution <= 256 else 1),
        offload=config.enable_cpu_offload,
    )  # fmt: skip
    beside = device if device != "cpu" and torch.cuda.get_device_properties(0).total_memory > 20 << 30 else "cpu"
    embedder = ClipEmbedder(scorer or (TINY_CLIP if config.resolution <= 128 else CLIP), beside)
    samples = _samples(manifest, manifest_path, config, device) if losses else None
    return Evaluation(
        run_dir, plan, spread(files, checkpoints), manifest, painter, embedder, DinoEmbedder(dino, beside) if dino else embedder, samples
    )


def _samples(manifest, manifest_path, config, device) -> Samples:
    """Latents as training took them: from the cache, else encoded as they are needed."""
    if manifest_path.name == WITH_LATENTS:
        return cached_samples(manifest, weights_of(config.base_model, config.vae_model))
    return fresh_samples(manifest, config.base_model, config.vae_model, device=device, stay=not config.enable_cpu_offload)


def find_checkpoints(run_dir, on_event=ignore) -> dict[int, Path]:
    """LoRA files by step: every whole checkpoint, else what lies in final/. Damaged ones are named and passed over."""
    found = {}
    for step, folder in list_checkpoints(Path(run_dir) / "checkpoints"):
        if reason := damage(folder):
            on_event(Notice(f"{folder} is damaged ({reason}) and is passed over."))
        else:
            found[step] = folder / LORA
    final = Path(run_dir) / "final" / "pytorch_lora_weights.safetensors"
    if not found and final.is_file():
        found = {read_config(Path(run_dir) / "config.yaml").max_steps: final}
    if not found:
        raise UserError(f"{run_dir} holds no checkpoint and no final LoRA: run notebook 03 first.")
    return found


def _check_data(run_dir, manifest, files) -> None:
    """The manifest is still what the newest checkpoint was trained on, or its scores would be about other pictures."""
    state = files[max(files)].parent / STATE
    if state.is_file() and json.loads(state.read_text()).get("identity", {}).get("data", manifest.training_data) != manifest.training_data:
        raise UserError(f"{run_dir.name} was trained on other pictures or captions than its manifest now holds: run notebook 01 with the data it was trained on.")  # fmt: skip


def spread(checkpoints: dict[int, Path], number: int) -> dict[int, Path]:
    """`number` of the checkpoints, evenly spaced and with the last; all for 0."""
    steps = sorted(checkpoints)
    if 0 < number < len(steps):
        places = {round((n + 1) * len(steps) / number) - 1 for n in range(number)}
        steps = [steps[place] for place in sorted(places)]
    return {step: checkpoints[step] for step in steps}
