"""Pictures from the model as it is being trained, at fixed prompts and seeds, so that steps can be compared."""

from pathlib import Path

import torch

from lora_nb import models
from lora_nb.events import Notice, Progress, Validated, ignore
from lora_nb.files import write_json
from lora_nb.memory import on_device, release
from lora_nb.proof import PictureRoad

FOLDER = "validation_images"


class Validator:
    """Draws `prompts` x `seeds` with the live UNet; the VAE comes when first needed and leaves between if asked to.

    embeddings: prompt -> prompt_embeds [77, D] and pooled_prompt_embeds [P]; no text encoder is loaded here.
    """

    def __init__(self, config, unet, embeddings, device, autocast):
        self.config, self.unet, self.embeddings, self.device, self.autocast = config, unet, embeddings, device, autocast
        self._pipeline = None

    def has(self, step: int) -> bool:
        """Whether the pictures of `step` are all there: their list is written last."""
        return (self.config.run_dir / FOLDER / f"step-{step}" / "prompts.json").is_file()

    def draw(self, step: int, on_event=ignore) -> None:
        """Pictures of `step` under validation_images/step-N, with prompts.json; a failure is told and does not stop the run."""
        folder = self.config.run_dir / FOLDER / f"step-{step}"
        try:
            paths = self._draw(step, folder, on_event)
        except Exception as error:  # whatever goes wrong with a picture, the training is worth more
            on_event(Notice(f"No validation pictures of step {step} ({type(error).__name__}: {error}); training goes on."))
            return
        finally:
            self.unet.train()
            release()
        on_event(Validated(step, folder, tuple(paths)))

    def _draw(self, step, folder, on_event) -> list[Path]:
        config = self.config
        width, height = self._size()
        pairs = [tuple(part[None] for part in self.embeddings(prompt)) for prompt in config.prompts]
        negative = tuple(part[None] for part in self.embeddings(config.validation_negative_prompt))
        self.unet.eval()
        pipeline = self._assembled()
        with self.autocast(), on_device(pipeline.vae, self.device, stay=not config.enable_cpu_offload):
            pictures = models.generate(
                pipeline, config.prompts, config.image_seeds, height, width, config.validation_steps,
                config.validation_guidance, embeddings=pairs, negative_embeddings=negative,
                on_event=lambda event: on_event(Progress(f"validation at step {step}", event.done, event.total, event.note)),
            )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        shots = [(n, prompt, seed) for n, prompt in enumerate(config.prompts) for seed in config.image_seeds]
        entries, paths = [], []
        for picture, (n, prompt, seed) in zip(pictures, shots, strict=True):
            paths.append(folder / f"prompt-{n}_seed-{seed}.png")
            picture.save(paths[-1])
            entries.append({"file": paths[-1].name, "prompt": prompt, "seed": seed})
        settings = {"steps": config.validation_steps, "guidance_scale": config.validation_guidance}
        write_json(folder / "prompts.json", {"step": step, **settings, "pictures": entries})
        return paths

    def _assembled(self):
        if self._pipeline is None:
            vae = models.load_vae(self.config.base_model, self.config.vae_model)
            self._pipeline = models.assemble(self.config.base_model, self.unet, vae, scheduler=self.config.scheduler)
        return self._pipeline

    def picture_road(self, text_encoders=(), on_event=ignore) -> PictureRoad | None:
        """Proof of an exported file by the first validation picture; None where the settings draw none, or it cannot be.

        text_encoders: both, if they were trained: then the picture is drawn from the prompt and not from embeddings.
        """
        if not (self.config.validate_every and self.config.image_seeds):
            return None
        try:
            return self._picture_road(text_encoders)
        except Exception as error:  # the files matter more than this one of their proofs
            on_event(Notice(f"No picture will prove the final files ({type(error).__name__}: {error})."))
            return None

    def _picture_road(self, text_encoders) -> PictureRoad:
        config = self.config
        pipeline, words = self._assembled(), {"negative_prompt": config.validation_negative_prompt}
        if text_encoders:
            pipeline = models.assemble(config.base_model, self.unet, pipeline.vae, *text_encoders, scheduler=config.scheduler)
        else:
            pairs = [tuple(part[None] for part in self.embeddings(prompt)) for prompt in (config.prompts[0], config.validation_negative_prompt)]
            words = {"embeddings": pairs[:1], "negative_embeddings": pairs[1]}

        def draw(pipeline):
            self.unet.eval()
            with self.autocast(), on_device(pipeline.vae, self.device, stay=not config.enable_cpu_offload):
                return models.generate(
                    pipeline, config.prompts[:1], config.image_seeds[:1], *reversed(self._size()), config.validation_steps,
                    config.validation_guidance, **words,
                )[0]  # fmt: skip

        return PictureRoad(pipeline, draw)

    def _size(self) -> tuple[int, int]:
        """Training resolution, in steps that the UNet can halve."""
        step = 2 ** (len(self.unet.config.block_out_channels) - 1) * 8
        side = max(step, round(self.config.resolution / step) * step)
        return side, side


def live_embeddings(tokenizers, text_encoders, encode, zeros_for_empty: bool):
    """Embeddings of the text encoders as they are now: for runs that train them."""

    @torch.no_grad()
    def embeddings(prompt):
        return encode(tokenizers, text_encoders, prompt, zeros_for_empty)

    return embeddings
