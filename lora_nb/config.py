"""The settings of a run: one flat, frozen model; layers of defaults, preset, the user's YAML and overrides.

Imports without torch, so that a notebook opens at once; only `auto` asks torch about the device.
"""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from lora_nb.errors import UserError
from lora_nb.files import project_root, write_atomic
from lora_nb.plan import replace_trigger

PRESETS = Path(__file__).parent / "presets"
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
TARGET_SETS = ("attention", "attention+feed_forward")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
              "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler")  # fmt: skip
# Settings that may change between a run and its continuation: they move no weight, or what they name is compared by
# its content instead (a base or data set that has moved is the same).
FREE_TO_CHANGE = frozenset(
    "max_steps save_every save_total_limit log_every use_wandb use_tensorboard validate_every num_validation_images "
    "validation_prompts validation_seeds validation_steps validation_guidance validation_negative_prompt export_dtype "
    "author license copy_checkpoints_to "
    "gradient_checkpointing enable_cpu_offload enable_xformers enable_attention_slicing auto_fit scheduler output_dir "
    "batch_size gradient_accumulation_steps base_model vae_model dataset_path".split()
)


def setting(default, description, **limits):
    return Field(default, description=description, **limits)


class Config(BaseModel):
    """Every setting of a run. `description` says what a setting does and what it costs; the order is the file's."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    run_name: str = setting("aldar_kose_lora", "everything is written under output_dir/run_name", pattern=r"^[\w][\w.-]*$")
    dataset_path: str = setting("data/aldar_kose", "folder with pictures and captions", min_length=1)
    trigger_token: str = setting("aldar_kose_man", "the word in the captions that will call the character")
    output_dir: str = setting("outputs", "where the runs lie, from the project's root")
    seed: int = setting(42, "order, noise, timesteps and dropout follow from it", ge=0)

    base_model: str = setting("stabilityai/stable-diffusion-xl-base-1.0", "hub id, diffusers folder or one .safetensors; 7 GB to download", min_length=1)
    vae_model: str | None = setting(None, "another VAE (hub id, folder or file); null takes the base's")
    scheduler: str = setting("DDPMScheduler", "sampler of validation pictures; DDPMScheduler trains and draws with the base's own")

    resolution: int = setting(1024, "pixels; time and memory grow with its square (512: a quarter of 1024)", ge=32, le=4096)
    center_crop: bool = setting(True, "cut the middle; false cuts at a place drawn once per picture from the seed")
    random_flip: bool = setting(False, "mirror half of the draws; doubles the latent cache, harms asymmetric characters")
    buckets: bool = setting(True, "keep aspect ratios by SDXL's buckets; false makes every picture square")

    batch_size: int = setting(1, "pictures at once on a device; memory grows with it", ge=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches a step: a larger batch for time instead of memory", ge=1)
    max_steps: int = setting(2000, "optimizer steps; 50 to 100 a picture is common", ge=1)
    learning_rate: float = setting(1e-4, "of the UNet's LoRA", gt=0, lt=100)
    lr_scheduler: Literal[LR_SCHEDULERS] = setting("constant_with_warmup", ", ".join(LR_SCHEDULERS))
    lr_warmup_steps: int = setting(100, "optimizer steps from 0 to learning_rate", ge=0)
    lr_num_cycles: int = setting(1, "of cosine_with_restarts", ge=1)
    lr_power: float = setting(1.0, "of polynomial", gt=0)
    optimizer: Literal["adamw", "adafactor", "prodigy"] = setting("adamw", "prodigy finds its own rate: pip install prodigyopt, learning_rate 1.0")
    use_8bit_adam: bool = setting(True, "AdamW's state in 8 bits: a quarter of its memory; needs bitsandbytes")
    adam_beta1: float = setting(0.9, "decay of the gradient's mean", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "decay of the gradient's square", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "floor of the update's divisor", gt=0)
    weight_decay: float = setting(0.01, "pull of LoRA weights to zero", ge=0)
    max_grad_norm: float = setting(1.0, "longest gradient; 0 does not clip", ge=0)

    lora_rank: int = setting(16, "width of the LoRA; file size and capacity grow with it", ge=1, le=1024)
    lora_alpha: float = setting(16, "the update is scaled by alpha / rank", gt=0)
    lora_dropout: float = setting(0.0, "share of LoRA inputs dropped", ge=0, lt=1)
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead: steadier at high ranks")
    lora_target_modules: list[str] | Literal[TARGET_SETS] = setting(
        ["to_q", "to_v"], "module names, or attention (560 modules on SDXL), or attention+feed_forward (722)")  # fmt: skip

    start_from_lora: str | None = setting(None, "a kohya, diffusers or PEFT LoRA to train on from, at the strength it has; null starts anew")

    train_text_encoder: bool = setting(False, "LoRA in both text encoders too: about 2 GB more, and no cached embeddings")
    text_encoder_learning_rate: float | None = setting(None, "of encoder 1; null is half of learning_rate, 0 leaves it out", ge=0)
    text_encoder_2_learning_rate: float | None = setting(None, "of encoder 2; null is half of learning_rate, 0 leaves it out", ge=0)
    text_encoder_stop_step: int | None = setting(None, "text encoders rest from this step on; null never", ge=1)

    precision: Literal["fp32", "fp16", "bf16", "nf4"] = setting("fp16", "of the frozen base: fp16 5 GB, nf4 under 2 GB and somewhat slower")
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("fp16", "of the arithmetic; LoRA weights stay fp32; bf16 needs Ampere or later")
    gradient_checkpointing: bool = setting(True, "about a third more time for far less memory")
    enable_xformers: bool = setting(False, "xformers' attention, if installed; PyTorch's own is as good")
    enable_cpu_offload: bool = setting(False, "encoders and VAE leave the device whenever they are not in use")
    enable_attention_slicing: bool = setting(False, "accepted for old files; PyTorch's attention makes it needless")
    auto_fit: bool = setting(False, "out of memory: halve the micro-batch and double accumulation, same data order")

    snr_gamma: float | None = setting(5.0, "min-SNR weighting of the loss; null weighs all timesteps alike", gt=0)
    debiased_estimation: bool = setting(False, "weigh the loss by 1 / sqrt(SNR) instead (set snr_gamma: null)")
    loss_type: Literal["l2", "huber"] = setting("l2", "huber forgives outliers among the pictures")
    huber_c: float = setting(0.1, "where Huber's loss turns from square to linear", gt=0)
    noise_offset: float = setting(0.0, "0.05 helps very dark and very bright pictures", ge=0, le=1)
    preservation_weight: float = setting(0.0, "holds prompts without the trigger to what the base draws: 1.0 leaks far less, for about twice the time", ge=0, le=100)
    class_word: str = setting("man", "what the trigger is one of (woman, cat): stands in its place for preservation, and in notebook 04", min_length=1)
    caption_dropout: float = setting(0.05, "share of draws with an empty caption: keeps guidance working", ge=0, le=1)

    save_every: int = setting(50, "steps between checkpoints; each holds LoRA and optimizer", ge=1)
    copy_checkpoints_to: str | None = setting(None, "a second folder (Drive) for whole copies of checkpoints; a fresh machine goes on from there")
    export_dtype: Literal["fp16", "bf16", "fp32"] = setting("fp16", "of the final files; every program reads fp16")
    author: str = setting("", "named in the final files and on the model card; empty leaves it out")
    license: str = setting("", "of the final files, as the hub names it (openrail++, cc-by-4.0); empty leaves it out")
    save_total_limit: int | None = setting(5, "checkpoints kept, the newest; null keeps all", ge=1)
    log_every: int = setting(10, "steps between rows of training_metrics.csv", ge=1)
    use_wandb: bool = setting(False, "Weights & Biases through accelerate; needs an account")
    use_tensorboard: bool = setting(False, "TensorBoard through accelerate; under the run's logs/")
    validate_every: int | None = setting(50, "steps between validation pictures (some seconds each); null draws none", ge=1)
    num_validation_images: int = setting(4, "pictures a prompt, one a seed", ge=0)
    validation_prompts: list[str] = setting([], "what to draw, {trigger} stands for the trigger token; an empty list draws that alone")
    validation_seeds: list[int] = setting([42, 123, 456, 789], "one a picture; fixed, so that steps can be compared")
    validation_steps: int = setting(25, "denoising steps a validation picture", ge=1)
    validation_guidance: float = setting(5.0, "classifier-free guidance of validation pictures", ge=1)
    validation_negative_prompt: str = setting("", "what validation pictures shall not show")

    _reasons: dict = PrivateAttr(default_factory=dict)

    @field_validator("*", mode="before")
    @classmethod
    def _words_of_yaml(cls, value, info):
        """YAML reads `no` as false: that is a word of mixed_precision, and `yes` is no number of steps."""
        if info.field_name == "mixed_precision" and value is False:
            return "no"
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false mean nothing here")
        return value

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name):
        known = {scheduler.lower().removesuffix("scheduler"): scheduler for scheduler in SCHEDULERS}
        known |= {"euler": SCHEDULERS[2], "euler_a": SCHEDULERS[3], "dpm++": SCHEDULERS[4], "unipc": SCHEDULERS[5]}
        found = known.get(name.lower().removesuffix("scheduler").rstrip("_"))
        if found is None:
            raise ValueError(f"take one of {', '.join(SCHEDULERS)}")
        return found

    @field_validator("lora_target_modules")
    @classmethod
    def _some_targets(cls, targets):
        if not targets:
            raise ValueError(f"name at least one module, or {' or '.join(TARGET_SETS)}")
        return targets[0] if len(targets) == 1 and targets[0] in TARGET_SETS else targets

    @property
    def run_dir(self) -> Path:
        """`output_dir/run_name` from the project's root."""
        return project_root() / self.output_dir / self.run_name

    @property
    def prompts(self) -> list[str]:
        """What validation draws, with the trigger token in the place of {trigger}."""
        return [prompt.replace("{trigger}", self.trigger_token) for prompt in self.validation_prompts] or [self.trigger_token]

    def about_anybody(self, caption: str) -> str:
        """A caption with the class word in the trigger's place; without the trigger as it was."""
        called = self.trigger_token and self.trigger_token.lower() in caption.lower()
        return replace_trigger(caption, self.trigger_token, self.class_word) if called else caption

    def captions_beside(self, captions) -> list[str]:
        """What training asks the text encoders for beside the data set's `captions`: validation's prompts, and with
        preservation the captions about anybody."""
        anybody = map(self.about_anybody, captions) if self.preservation_weight else ()
        return list(dict.fromkeys([self.validation_negative_prompt, *self.prompts, *anybody]))

    @property
    def text_encoder_learning_rates(self) -> tuple[float, float]:
        """Of encoder 1 and 2; 0 means not trained."""
        if not self.train_text_encoder:
            return 0.0, 0.0
        rates = self.text_encoder_learning_rate, self.text_encoder_2_learning_rate
        return tuple(self.learning_rate / 2 if rate is None else rate for rate in rates)

    def differences(self) -> list[tuple]:
        """(name, default, value, reason) of every setting that is not at its default, in the file's order."""
        defaults = Config()
        return [
            (name, getattr(defaults, name), getattr(self, name), self._reasons.get(name, "set here"))
            for name in type(self).model_fields
            if getattr(self, name) != getattr(defaults, name)
        ]

    def save(self, path=None) -> Path:
        """The whole resolved configuration as YAML, each difference with its reason. Default: the run's config.yaml."""
        reasons = {name: reason for name, _, _, reason in self.differences()}
        lines = [_line(name, value, reasons.get(name)) for name, value in self.model_dump().items()]
        return write_atomic(path or self.run_dir / "config.yaml", "".join(lines))

    def warnings(self) -> list[str]:
        """Sentences about settings that do what they say, but perhaps not what was meant."""
        notes = {
            "random_flip mirrors the pictures: a scar, parting or emblem on one side will be learned on both; "
            "set random_flip: false for an asymmetric character.": self.random_flip,
            "enable_attention_slicing is ignored: PyTorch's attention needs no slicing and is faster.":
                self.enable_attention_slicing,
            "enable_cpu_offload keeps text encoders and VAE off the device while they are not in use; the UNet stays "
            "there (sequential offload cannot train).": self.enable_cpu_offload,
            "num_validation_images is larger than the number of validation_seeds: more seeds are counted on from the last.":
                self.num_validation_images > len(self.validation_seeds),
            "prodigy finds its own rate: learning_rate is only its factor, usually 1.0.":
                self.optimizer == "prodigy" and self.learning_rate < 0.1,
        }  # fmt: skip
        return [sentence for sentence, applies in notes.items() if applies]

    @property
    def image_seeds(self) -> list[int]:
        """`num_validation_images` seeds: the given ones, then counted on from the last."""
        given = self.validation_seeds or [0]
        return (given + [given[-1] + n for n in range(1, self.num_validation_images + 1)])[: self.num_validation_images]

    def check_machine(self, device: str, bf16: bool = True) -> None:
        """Refuse what `device` ("cpu" or "cuda") cannot do; `bf16` says whether the device has it.

        Raises UserError with every problem and its cure.
        """
        halves = {self.precision, self.mixed_precision}
        missing = {name: importlib.util.find_spec(name) is None for name in ("bitsandbytes", "prodigyopt", "xformers", "wandb", "tensorboard")}  # fmt: skip
        problems = {
            "precision and mixed_precision fp16 need a GPU: set precision: fp32 and mixed_precision: \"no\", or the preset cpu-demo":
                device == "cpu" and "fp16" in halves,
            "this GPU has no bf16: set precision and mixed_precision to fp16": device != "cpu" and not bf16 and "bf16" in halves,
            "use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`, or set use_8bit_adam: false":
                self.use_8bit_adam and self.optimizer == "adamw" and missing["bitsandbytes"],
            "precision nf4 needs bitsandbytes: `pip install bitsandbytes`, or set precision: bf16":
                self.precision == "nf4" and missing["bitsandbytes"],
            "optimizer prodigy needs prodigyopt: `pip install prodigyopt`, or set optimizer: adamw":
                self.optimizer == "prodigy" and missing["prodigyopt"],
            "enable_xformers needs xformers and a GPU: set enable_xformers: false, PyTorch's attention is as good":
                self.enable_xformers and (missing["xformers"] or device == "cpu"),
            "use_wandb needs wandb: `pip install wandb`, or set use_wandb: false": self.use_wandb and missing["wandb"],
            "use_tensorboard needs tensorboard: `pip install tensorboard`, or set use_tensorboard: false":
                self.use_tensorboard and missing["tensorboard"],
        }  # fmt: skip
        if found := [sentence for sentence, applies in problems.items() if applies]:
            raise UserError("; ".join(found) + ".")


def load_config(preset: str = "auto", yaml_path=None, **overrides) -> Config:
    """Defaults, then the preset, then the user's YAML, then `overrides`; "auto" looks at the device.

    Raises UserError that names every unknown key (with the nearest name), wrong type and impossible pair.
    """
    preset_path = PRESETS / f"{detect_preset() if preset == 'auto' else preset}.yaml"
    if preset not in ("auto", *preset_names()):
        raise UserError(f"There is no preset {preset!r}: take auto, {', '.join(preset_names())}.")
    values, reasons = _read_yaml(preset_path)
    layers, given = [f"preset {preset_path.stem}"], {}
    if yaml_path is not None:
        given, why = _read_yaml(resolve_path(yaml_path))
        values, reasons = values | given, reasons | {name: why.get(name, f"in {Path(yaml_path).name}") for name in given}
        layers.append(str(yaml_path))
    values, reasons = values | overrides, reasons | dict.fromkeys(overrides, "set here")
    layers += [f"given {', '.join(overrides)}"] * bool(overrides)
    if "lr_warmup_steps" not in given | overrides:
        _shorten_warmup(values, reasons)
    return build(values, reasons, where=f"the settings ({'; '.join(layers)})")


def _shorten_warmup(values, reasons) -> None:
    """A warm-up that nobody asked for fits into a short trial."""
    steps, warmup = (values.get(name, Config.model_fields[name].default) for name in ("max_steps", "lr_warmup_steps"))
    if type(steps) is int and type(warmup) is int and warmup >= steps:
        values["lr_warmup_steps"], reasons["lr_warmup_steps"] = steps // 10, "a tenth of max_steps"


def build(values: dict, reasons: dict | None = None, where: str = "the settings") -> Config:
    """A Config from a plain dict, or a UserError that collects every problem."""
    try:
        config = Config(**values)
    except ValidationError as error:
        raise UserError(f"In {where}: " + "; ".join(_sentence(problem) for problem in error.errors()) + ".") from None
    pairs = {
        "debiased_estimation and snr_gamma weigh the same loss: set snr_gamma: null or debiased_estimation: false":
            config.debiased_estimation and config.snr_gamma is not None,
        "mixed_precision and precision differ (fp16 with bf16): give both the same":
            {config.precision, config.mixed_precision} == {"fp16", "bf16"},
        f"lr_warmup_steps {config.lr_warmup_steps} is not below max_steps {config.max_steps}: the rate would never be reached":
            config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_steps,
        "preservation_weight needs text encoders that stay as they are: set train_text_encoder: false, or preservation_weight: 0":
            config.preservation_weight > 0 and config.train_text_encoder,
        "prodigy knows one learning rate: set text_encoder_learning_rate and text_encoder_2_learning_rate to that of learning_rate, or to 0":
            config.optimizer == "prodigy" and not {0.0, *config.text_encoder_learning_rates} <= {0.0, config.learning_rate},
    }  # fmt: skip
    if found := [sentence for sentence, applies in pairs.items() if applies]:
        raise UserError(f"In {where}: " + "; ".join(found) + ".")
    config._reasons.update(reasons or {})
    return config


def read_config(path) -> Config:
    """The configuration that `Config.save` wrote, with its reasons."""
    values, reasons = _read_yaml(path)
    return build(values, reasons, where=str(path))


def preset_names() -> list[str]:
    """The presets that lie in the package, "auto" not among them."""
    names = (path.stem for path in PRESETS.glob("*.yaml") if path.stem != "training_config")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def detect_preset() -> str:
    """The largest preset that the GPU's memory holds, "cpu-demo" without one."""
    looks_like_gpu = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "C:/Windows/System32/nvml.dll"))
    if not looks_like_gpu:
        return "cpu-demo"
    import torch

    if not torch.cuda.is_available():
        return "cpu-demo"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    sizes = sorted(int(name[4:-2]) for name in preset_names() if name.startswith("gpu-"))
    fitting = [size for size in sizes if memory > 0.9 * size]  # a "16 GB" card reports 14.7 GiB
    return f"gpu-{max(fitting, default=sizes[0])}gb"


def resolve_path(path) -> Path:
    """A relative path of a configuration, from the project's root, then from the working folder."""
    path = Path(path).expanduser()
    from_root = project_root() / path
    return from_root if from_root.exists() or not path.exists() else path.resolve()


def documented_defaults() -> str:
    """The text of training_config.yaml: every setting at its default, with what it does and costs."""
    head = "# Every setting with its default. Copy this file, keep the lines that you change, drop the others.\n"
    lines = (_line(name, field.default, field.description) for name, field in Config.model_fields.items())
    return head + "".join(lines)


def _line(name, value, comment=None) -> str:
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    return f"{name}: {flow}  # {comment}\n" if comment else f"{name}: {flow}\n"


def _read_yaml(path) -> tuple[dict, dict]:
    """Values and, as reasons, the comments behind them."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `name: value` lines.")
    values = {str(name): value for name, value in values.items()}
    return values, dict(re.findall(r"^(\w+):.*?\s#\s+(.+?)\s*$", text, flags=re.MULTILINE))


def read_value(text: str):
    """What was typed, as YAML reads it, and 1e-4 as the number that everybody means."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _sentence(problem) -> str:
    name = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("list[", "literal[")))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Config.model_fields, n=1)
        hint = "; a preset is named with --preset, or PRESET in a notebook" if name == "preset" else ""
        return f"there is no setting {name!r}" + (hint or (f", did you mean {near[0]!r}" if near else ""))
    if problem["type"] == "string_pattern_mismatch":
        return f"{name} is {problem['input']!r}: use letters, digits, _, - and . only, without spaces"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}: {message[0].lower()}{message[1:]}"
