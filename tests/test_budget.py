"""The forecast: its parts against real tensors and real optimizers, how it moves with the settings, and what it refuses."""

import json

import pytest
import torch
from accelerate import Accelerator

from lora_nb import budget, memory, models, rehearsal
from lora_nb.__main__ import main
from lora_nb.config import build
from lora_nb.errors import UserError
from lora_nb.job import prepare
from lora_nb.ledger import Ledger
from lora_nb.optimizers import build_optimizer
from lora_nb.rehearsal import FakeTensorMode, optimizer_bytes, rehearsal_job, simulate
from lora_nb.step import losses_of

SMALL = {
    "resolution": 64, "precision": "fp32", "mixed_precision": "no", "use_8bit_adam": False, "batch_size": 2, "lora_rank": 4,
    "lora_alpha": 4, "gradient_checkpointing": False, "lora_target_modules": "attention+feed_forward", "validate_every": None,
}  # fmt: skip


@pytest.fixture
def small(tiny_base):
    return lambda **settings: build(SMALL | {"base_model": str(tiny_base)} | settings)


@pytest.fixture(scope="module")
def needs(tiny_base):
    """simulate(settings), each once."""
    known = {}

    def simulated(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = simulate(build(SMALL | {"base_model": str(tiny_base)} | settings))
        return known[key]

    return simulated


# --- the ledger ----------------------------------------------------------------------------------------------


def test_ledger_counts_storages_once_and_forgets_them():
    with Ledger() as ledger:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]  # no memory of its own
        c = a + 1
        assert ledger.live == 8000
        del a
        assert ledger.live == 8000  # b still holds it
        del b, c
        assert ledger.live == 0 and ledger.peak == 8000


def test_ledger_counts_operations_as_torch_does():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.zeros(1, 2, 16, 8, requires_grad=True)
    weight = torch.zeros(8, 8)

    def compute():
        torch.nn.functional.scaled_dot_product_attention(q @ weight, q, q).sum().backward()

    with Ledger() as ours:
        compute()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        compute()
    # the fused attention computes q k' once more in the backward pass: 2 * heads * 16 * 16 * 8 operations
    assert ours.flop == theirs.get_total_flops() + 2 * 2 * 16 * 16 * 8


# --- rehearsed and real --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"precision": "bf16", "mixed_precision": "bf16"}, {"train_text_encoder": True, "gradient_accumulation_steps": 2},
     {"precision": "nf4", "gradient_checkpointing": True}, {"precision": "nf4", "mixed_precision": "bf16"}],
    ids=lambda settings: " ".join(map(str, settings.values())) or "plain",
)  # fmt: skip
def test_the_rehearsal_holds_what_real_tensors_hold(make_run, settings):
    """The job that training prepares, on real tensors, counted by the same ledger."""
    config = make_run(**{**SMALL, "pictures": 4, "buckets": False, "caption_dropout": 0.0, **settings})
    job = prepare(config, Accelerator(mixed_precision="no"))
    real, needs = budget.measure_steps(job, steps=1), simulate(config, gpu=job.device.type == "cuda")
    assert needs.step / 2**30 == pytest.approx(real.peak_gib, rel=0.1)
    assert needs.activations > 0


@pytest.mark.parametrize("settings", [{}, {"train_text_encoder": True}, {"train_text_encoder": True, "text_encoder_learning_rate": 0}])
def test_the_made_up_job_trains_what_the_real_one_trains(make_run, settings):
    config = make_run(**SMALL, **settings)
    real, ours = prepare(config, Accelerator(mixed_precision="no")), rehearsal_job(config)
    assert {name: value.shape for name, value in ours.trainable.items()} == {name: value.shape for name, value in real.trainable.items()}
    assert ours.base_rates == real.base_rates and (ours.batch, ours.micro_batch) == (real.batch, real.micro_batch)
    assert [p.dtype for p in ours.unet.parameters()] == [p.dtype for p in real.unet.parameters()]


def test_the_made_up_job_takes_a_step(small):
    measured = budget.measure_steps(rehearsal_job(small()), steps=1)
    assert 0 < measured.seconds < 60 and 0 < measured.peak_gib < 1


def test_nf4_takes_the_bytes_of_bitsandbytes(tiny_base):
    real = models.load_part(str(tiny_base), "unet")
    memory.quantize_nf4(real)
    real.to("cpu")
    ours = models.empty_part(str(tiny_base), "unet")
    rehearsal.pretend_nf4(ours, torch.float32)

    def packed(weight):
        state = weight.quant_state
        parts = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        return sum(part.numel() * part.element_size() for part in parts)

    theirs = {name: packed(module.weight) for name, module in real.named_modules() if type(module).__name__ == "Linear4bit"}
    mine = {name: module.weight.numel() + module.quant_state.numel() for name, module in ours.named_modules() if isinstance(module, rehearsal.FourBit)}
    assert mine == theirs and len(mine) > 50


@pytest.mark.parametrize("settings", [{}, {"use_8bit_adam": True}, {"optimizer": "adafactor"}])
def test_the_optimizers_state_is_exact(settings):
    weights = {"a.lora_A": torch.nn.Parameter(torch.randn(16, 640)), "a.lora_B": torch.nn.Parameter(torch.zeros(640, 16)), "b.lora_A": torch.nn.Parameter(torch.randn(4, 40))}
    config = build(SMALL | settings)
    optimizer = build_optimizer(config.optimizer, [{"params": list(weights.values()), "lr": 1e-3}], use_8bit_adam=config.use_8bit_adam)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    on_host = {"step"} if config.optimizer == "adafactor" else set()
    states = [item for state in optimizer.state.values() for item in state.items()]
    tensors = {value.data_ptr(): value for name, value in states if isinstance(value, torch.Tensor) and name not in on_host}  # tables are shared
    assert optimizer_bytes(config, {name: weight.shape for name, weight in weights.items()}) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_gpu_keeps_norms_in_fp32(small, needs):
    half = {"precision": "bf16", "mixed_precision": "bf16"}
    assert needs(**half).step > simulate(small(**half), gpu=False).step
    assert needs().step == simulate(small(), gpu=False).step


# --- how it moves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "less"),
    [({"resolution": 128}, {}), ({"batch_size": 4}, {}), ({}, {"gradient_checkpointing": True}), ({"lora_rank": 16}, {}), ({}, {"use_8bit_adam": True}),
     ({"train_text_encoder": True}, {}), ({}, {"precision": "nf4"}), ({"gradient_accumulation_steps": 2}, {})],
)  # fmt: skip
def test_memory_follows_the_settings(needs, more, less):
    assert needs(**more).step > needs(**less).step


def test_arithmetic_follows_the_settings(needs):
    plain, double, recomputed = needs(), needs(batch_size=4), needs(gradient_checkpointing=True)
    assert double.step_flop == pytest.approx(2 * plain.step_flop, rel=0.01)  # what depends on the timestep's table is there once
    assert needs(gradient_accumulation_steps=2).step_flop == 2 * plain.step_flop
    assert 1.2 < recomputed.step_flop / plain.step_flop < 1.6  # one forward pass more


def test_pictures_count(small):
    config = small(validate_every=100, max_steps=250, validation_prompts=["a", "b"], num_validation_images=3)
    result = budget.forecast(config)
    assert result.pictures == 4 * 2 * 3  # before the first step, at 100, 200 and 250
    assert result.needs.picture > 0 and sum(result.picture_hours) > 0
    assert budget.forecast(small()).pictures == 0 == budget.forecast(small()).needs.picture


def test_a_vae_that_stays_is_in_the_step(needs):
    stays, leaves = needs(validate_every=10), needs(validate_every=10, enable_cpu_offload=True)
    assert stays.step > leaves.step == needs().step and stays.picture == leaves.picture


def test_full_size_sdxl_has_the_known_arithmetic():
    """512 px, 1.59 TFLOP forward; 2567.5 M weights in 16 bits and 11.6 M of the LoRA in 32."""
    config = build({"resolution": 512, "validate_every": None, "gradient_checkpointing": False})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    job = rehearsal_job(config, fake=fake)
    group = rehearsal.micro_batches(job, rehearsal.draws_at(job, 0))[0]
    with fake, torch.no_grad(), Ledger(*job.parts.values()) as ledger:
        held = ledger.live
        losses_of(job, group)
    assert ledger.flop / 1e12 == pytest.approx(1.59, abs=0.03)
    assert held / 2**30 == pytest.approx(2567.5e6 * 2 / 2**30 + 11.6e6 * 4 / 2**30, rel=0.01)


# --- what is said --------------------------------------------------------------------------------------------


def test_a_named_gpu_is_an_estimate_with_a_price(small):
    config = small(precision="bf16", mixed_precision="bf16", max_steps=1000, lr_warmup_steps=0)
    cheap, dear = budget.forecast(config, "T4", 0.5), budget.forecast(config, "NVIDIA GeForce RTX 4090", 0.5)
    assert (cheap.device, dear.device) == ("T4", "RTX 4090") and cheap.fits and dear.fits
    assert cheap.seconds[0] > dear.seconds[0] and cheap.seconds[0] < cheap.seconds[1]
    assert cheap.price == pytest.approx([0.5 * hours for hours in cheap.hours])
    said = str(cheap)
    assert "estimated" in said and dict((row[0], row[2]) for row in cheap.rows())["wanted of the device"].startswith("T4 has 14.6 GiB: fits")
    assert "has no bf16" in said and "has no bf16" not in str(dear)


def test_what_does_not_fit_is_said(small, monkeypatch):
    monkeypatch.setitem(budget.GPUS, "T4", (0.5, 65.0))
    result = budget.forecast(small(), "t4")
    assert result.fits is False and "DOES NOT FIT" in str(result)
    assert result.seconds is None and "no time" in str(result)  # fp32 has no published rate here


def test_an_unknown_gpu_is_refused_with_the_nearest(small, capsys):
    with pytest.raises(UserError, match="did you mean 'RTX 4090'"):
        budget.forecast(small(), "RTX 4009")
    assert main(["forecast", "--gpu", "Voodoo 2"]) == 1
    assert "There is no GPU 'Voodoo 2'" in capsys.readouterr().err


def test_a_rehearsal_that_fails_is_a_note(small, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("no such mode")

    monkeypatch.setattr(budget, "simulate", fail)
    said = str(budget.forecast(small()))
    assert "no such mode" in said and "Traceback" not in said


def test_the_probe_measures_and_leaves_the_run_alone(make_run, monkeypatch):
    config = make_run(**SMALL, pictures=4)
    before = sorted(path.name for path in config.run_dir.rglob("*"))
    result = budget.forecast(config, measure=True, price_per_hour=2.0)
    assert result.measured.seconds == result.seconds[0] == result.seconds[1] > 0
    assert "measured on cpu" in str(result) and "price" in str(result)
    after = sorted(path.name for path in config.run_dir.rglob("*"))
    assert set(after) - set(before) <= {".training.lock"} and not (config.run_dir / "status.json").exists()


def test_a_probe_that_cannot_run_is_a_note(small):
    config = small(run_name="never_made")
    said = str(budget.forecast(config, measure=True))
    assert "Not measured" in said and "base weights" in said and not config.run_dir.exists()


def test_the_command_prints_a_table(tiny_base, tmp_path, capsys):
    settings = tmp_path / "mine.yaml"
    settings.write_text(json.dumps(SMALL | {"base_model": str(tiny_base), "precision": "fp16", "mixed_precision": "fp16"}))
    assert main(["forecast", "--gpu", "t4", "--price", "0.35", "--config", str(settings)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("preset gpu-16gb") and "peak memory" in said and "at 0.35 an hour" in said


def test_every_card_has_a_preset():
    chosen = {name: budget.preset_of(name) for name in budget.GPUS}
    assert len(chosen) >= 8 and chosen["T4"] == "gpu-16gb" and chosen["RTX 3060"] == "gpu-12gb" and chosen["H100"] == "gpu-80gb"
    assert {chosen["RTX 3090"], chosen["RTX 4090"], chosen["L4"], chosen["A10G"]} == {"gpu-24gb"}
