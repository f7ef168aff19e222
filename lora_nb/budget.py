"""What a training will need before a GPU is rented for it: memory, arithmetic, hours and price; and a probe that measures.

Memory and arithmetic come from a rehearsal on tensors without content (see rehearsal.py). Time comes from a measured or
published rate of matrix products: without a probe it is an estimate, and says so.
"""

import difflib
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from lora_nb import models
from lora_nb.config import Config, preset_names
from lora_nb.errors import UserError
from lora_nb.job import prepare
from lora_nb.ledger import Ledger
from lora_nb.manifest import best_manifest
from lora_nb.memory import is_out_of_memory, out_of_memory, release
from lora_nb.rehearsal import Needs, base_of, simulate
from lora_nb.report import Table
from lora_nb.runlog import only_trainer
from lora_nb.step import accumulate, optimise

# Memory in GiB as the card reports it, and the peak rate of dense 16-bit matrix products added up in 32 bits, in TFLOP/s,
# from NVIDIA's data sheets (T4, L4, A10G, A100, H100 SXM) and white papers (GA102: 3090; AD102: 4090). The 3060's is its
# 112 tensor cores x 128 operations x 1.777 GHz, by which the 3090's also comes out right.
GPUS = {
    "T4": (14.6, 65.0),
    "L4": (22.0, 121.0),
    "A10G": (22.0, 70.0),
    "RTX 3060": (11.8, 25.5),
    "RTX 3090": (23.6, 71.0),
    "RTX 4090": (23.5, 165.0),
    "A100": (79.2, 312.0),
    "A100 40GB": (39.4, 312.0),
    "H100": (79.1, 989.0),
}
NO_BF16 = ("T4",)
# The share of that rate at which a LoRA step runs. For SDXL at 1024 px a user of another trainer timed 2.4 s a step on an
# RTX 3060 and 1.23 s on a 3090 Ti (github.com/bmaltais/kohya_ss/issues/1288): 0.34 and 0.21 of their peaks.
SHARES = (0.2, 0.4)
# Beside PyTorch's tensors: the driver's context with loaded kernels, workspaces of cuBLAS and cuDNN; and what is lost
# between blocks. Assumed, not measured.
CONTEXT_GIB, FRAGMENTATION = 0.7, 1.05


@dataclass(frozen=True)
class Measured:
    """What a probe saw: seconds a step, the peak of PyTorch's tensors in GiB, and on what."""

    seconds: float
    peak_gib: float
    device: str


@dataclass(frozen=True)
class Forecast:
    """What a training needs. Sizes in GiB; `seconds` a step: (at best, at worst), both the same if measured."""

    config: Config
    device: str
    needs: Needs | None
    memory_gib: float | None  # of the device
    seconds: tuple[float, float] | None
    source: str  # of the seconds
    price_per_hour: float = 0.0
    measured: Measured | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_gib(self) -> float | None:
        return self.needs.peak / 2**30 if self.needs else None

    @property
    def wanted_gib(self) -> float | None:
        """Of the device's memory: the peak with the driver and what is lost between blocks (assumed)."""
        return None if self.needs is None else self.peak_gib * FRAGMENTATION + CONTEXT_GIB

    @property
    def fits(self) -> bool | None:
        """Whether the device holds it; None where either is unknown."""
        return None if None in (self.wanted_gib, self.memory_gib) else self.wanted_gib <= self.memory_gib

    @property
    def pictures(self) -> int:
        """Validation pictures that the run will draw, those before the first and after the last step among them."""
        config = self.config
        if not config.validate_every:
            return 0
        rounds = 1 + -(-config.max_steps // config.validate_every)
        return rounds * len(config.prompts) * config.num_validation_images

    @property
    def hours(self) -> tuple[float, float] | None:
        """Of all steps and validation pictures; loading, saving and export come on top."""
        if self.seconds is None:
            return None
        return tuple(one * self.config.max_steps / 3600 + picture for one, picture in zip(self.seconds, self.picture_hours, strict=True))

    @property
    def picture_hours(self) -> tuple[float, float]:
        """Of the validation pictures alone, at the rate of the steps."""
        if not (self.needs and self.seconds and self.pictures):
            return (0.0, 0.0)
        ratio = self.needs.picture_flop / self.needs.step_flop
        return tuple(self.pictures * one * ratio / 3600 for one in self.seconds)

    @property
    def price(self) -> tuple[float, float] | None:
        """In the currency of `price_per_hour`."""
        return self.hours and tuple(hours * self.price_per_hour for hours in self.hours)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how much, how it is known)."""
        needs, rows = self.needs, []
        if needs:
            what = "a step" if needs.step >= needs.picture else "a validation picture"
            rows += [
                ("base weights and VAE" if needs.picture and not self.config.enable_cpu_offload else "base weights", _gib(needs.base), f"{self.config.precision}, counted"),
                ("LoRA, gradients, optimizer", _gib(needs.lora), f"rank {self.config.lora_rank}, {self.config.optimizer}{_bits(self.config)}, counted"),
                ("activations" if what == "a step" or not self.config.enable_cpu_offload else "activations and VAE", _gib(needs.activations), "rehearsed"),
                ("peak memory", _gib(needs.peak), f"in {what}; a step {_gib(needs.step)}, a picture {_gib(needs.picture) if needs.picture else 'none'}"),
                ("wanted of the device", _gib(self.wanted_gib), self._verdict()),
                ("arithmetic a step", _tflop(needs.step_flop), f"{self.config.batch_size * self.config.gradient_accumulation_steps} picture(s)"),
            ]
        if self.measured:
            rows.append(("peak memory, measured", f"{self.measured.peak_gib:.2f} GiB", f"PyTorch's tensors in a step, on {self.measured.device}"))
        if self.seconds:
            rows.append(("time a step", _range(self.seconds, _seconds), self.source))
            if self.pictures:
                rows.append(("validation pictures", _range([3600 * hours for hours in self.picture_hours], _seconds), f"{self.pictures} of {self.config.validation_steps} steps, by their arithmetic"))
            rows.append(("time in all", _range([3600 * hours for hours in self.hours], _seconds), f"{self.config.max_steps} steps, without loading and saving"))
            if self.price_per_hour:
                rows.append(("price", _range(self.price, "{:.2f}".format), f"at {self.price_per_hour:g} an hour"))
        return rows

    def _verdict(self):
        assumed = f"{FRAGMENTATION:g} of the peak and {CONTEXT_GIB} GiB, assumed"
        if self.fits is None:
            return assumed
        return f"{self.device} has {self.memory_gib:.1f} GiB: {'fits' if self.fits else 'DOES NOT FIT'} ({assumed})"

    def table(self) -> Table:
        return Table((f"forecast for {self.device}", "how much", "how it is known"), [*self.rows(), *(("note", "-", note) for note in self.notes)])

    def __str__(self):
        return str(self.table())


def forecast(config: Config, gpu: str = "", price_per_hour: float = 0.0, measure: bool = False) -> Forecast:
    """What the training of `config` needs, on the GPU of this name (see GPUS) or, without one, on this device.

    Nothing is downloaded; a base that is not on this disk is taken to have SDXL's sizes. `measure` runs a probe here
    first, which needs the base and notebook 01. Whatever cannot be found out becomes a note. Raises UserError for a GPU
    that the table lacks.
    """
    name, memory, rate = _device(gpu)
    here, notes, measured, needs = not gpu, [], None, None
    if measure and here:
        try:
            measured = probe(config)
        except UserError as error:
            notes.append(f"Not measured: {error}")
    try:
        needs = simulate(config, gpu=name != "cpu")
    except UserError:
        raise
    except Exception as error:  # another PyTorch may know other ways; a forecast must not stop a notebook
        notes.append(f"The rehearsal failed ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}), so memory and arithmetic are unknown.")
    if base_of(config) != config.base_model and config.base_model != Config().base_model:
        notes.append(f"{config.base_model} is not in a folder here: SDXL's sizes were taken.")
    if "bf16" in (config.precision, config.mixed_precision) and name in NO_BF16:
        notes.append(f"The {name} has no bf16: set precision and mixed_precision to fp16.")
    seconds, source = _time(config, needs, measured, rate if gpu else None)
    if gpu and config.mixed_precision == "no":
        notes.append("mixed_precision is \"no\": published rates are for 16 bits, so there is no time.")
    return Forecast(config, name, needs, memory, seconds, source, price_per_hour, measured, tuple(notes))


def _device(gpu: str) -> tuple[str, float | None, float | None]:
    """(name, memory in GiB, published TFLOP/s); this device without a name."""
    if gpu:
        known = {_plain(name): name for name in GPUS}
        plain = _plain(gpu)
        if plain not in known:
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.3)
            raise UserError(f"There is no GPU {gpu!r} in the table" + (f", did you mean {known[near[0]]!r}" if near else "") + f"? It knows {', '.join(GPUS)}.")
        return known[plain], *GPUS[known[plain]]
    if models.default_device() == "cpu":
        return "cpu", None, None
    card = torch.cuda.get_device_properties(0)
    return card.name, card.total_memory / 2**30, None


def _plain(name: str) -> str:
    """"NVIDIA GeForce RTX 4090" and "rtx4090" are one."""
    name = name.lower().replace("-", " ")
    for word in ("nvidia", "geforce", "tesla", "rtx", "sxm", "80gb", " "):
        name = name.replace(word, "")
    return name


def _time(config, needs, measured, published) -> tuple[tuple[float, float] | None, str]:
    """Seconds a step (best, worst), and where they come from."""
    if measured:
        return (measured.seconds, measured.seconds), f"measured on {measured.device}"
    if needs is None or (published and config.mixed_precision == "no"):
        return None, ""
    dtype = models.DTYPES.get(config.mixed_precision, torch.float32)
    rate = published or matrix_rate(models.default_device(), dtype)
    tflop = needs.step_flop / 1e12
    kind = "published" if published else "measured"
    return tuple(tflop / (rate * share) for share in reversed(SHARES)), f"estimated: {SHARES[0]:.0%} to {SHARES[1]:.0%} of {rate:.3g} TFLOP/s ({kind})"


def matrix_rate(device="cpu", dtype=torch.float32, seconds: float = 0.5) -> float:
    """TFLOP/s of square matrix products on this device, the best of several rounds in `seconds`."""
    gpu = torch.device(device).type == "cuda"
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if gpu else (lambda: None)
    best, end = float("inf"), time.perf_counter() + seconds
    rounds = 10 if gpu else 1
    a @ b
    while time.perf_counter() < end or best == float("inf"):
        wait()
        began = time.perf_counter()
        for _ in range(rounds):
            a @ b
        wait()
        best = min(best, (time.perf_counter() - began) / rounds)
    return 2 * side**3 / best / 1e12


def probe(config: Config, steps: int = 3) -> Measured:
    """Seconds a step and peak memory of the first steps of this very job on this device; what they learn is thrown away.

    The run's state is not touched. Prompts that are not encoded yet are encoded, as the training would. Raises
    UserError without notebook 01, while another training writes there, and where memory is not enough, with the cures.
    """
    best_manifest(config.run_dir)  # before the lock, which would make the folder of a run that is not there
    try:
        with only_trainer(config.run_dir):
            return measure_steps(prepare(config, Accelerator(mixed_precision="no")), steps)
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config) from None
        raise
    finally:
        release()


def measure_steps(job, steps: int = 3) -> Measured:
    """The least seconds of `steps` steps of a job, after one that warms up; and the peak of PyTorch's tensors over both."""
    gpu = job.device.type == "cuda"
    ledger = Ledger(*job.parts.values())
    if gpu:
        torch.cuda.reset_peak_memory_stats(job.device)
    _step(job, 0)  # from here on the optimizer has its state
    if not gpu:  # nobody counts a processor's memory but the ledger, which slows the step down
        ledger.add([list(state.values()) for state in job.optimizer.state.values()])
        with ledger:
            _step(job, 1)
    times = []
    for step in range(1, 1 + steps):
        began = time.perf_counter()
        _step(job, step)
        if gpu:
            torch.cuda.synchronize(job.device)
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(job.device) if gpu else ledger.peak
    name = torch.cuda.get_device_name(job.device) if gpu else "cpu"
    return Measured(min(times), peak / 2**30, name)


def _step(job, step) -> None:
    accumulate(job, step)
    optimise(job, step)
    job.optimizer.zero_grad(set_to_none=True)


def preset_of(gpu: str) -> str:
    """The largest preset that the GPU of this name holds."""
    _, memory, _ = _device(gpu)
    sizes = sorted(int(name[4:-2]) for name in preset_names() if name.startswith("gpu-"))
    return f"gpu-{max([size for size in sizes if memory > 0.9 * size], default=sizes[0])}gb"


def _bits(config):
    return " in 8 bits" if config.optimizer == "adamw" and config.use_8bit_adam else ""


def _gib(value) -> str:
    value = value / 2**30 if isinstance(value, int) else value
    return f"{value:.2f} GiB"


def _tflop(value: int) -> str:
    return f"{value / 1e12:.2f} TFLOP" if value >= 1e10 else f"{value / 1e9:.2f} GFLOP"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _range(values, text) -> str:
    low, high = (text(value) for value in values)
    return low if low == high else f"{low} to {high}"
