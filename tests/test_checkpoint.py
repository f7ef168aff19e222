"""Checkpoints are whole or absent."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lora_nb import checkpoint as ck
from lora_nb.errors import UserError
from lora_nb.events import Notice
from lora_nb.lora_file import read_safetensors, write_safetensors
from lora_nb.optimizers import build_optimizer, learning_rate_factor, pack_state, unpack_state


def save(folder, step, keep=None, size=10):
    tensors = {"unet.a.lora_A.weight": torch.full((size,), float(step))}
    return ck.save_checkpoint(folder, step, (tensors, {"format": "pt"}), {"state.0.exp_avg": torch.ones(size)}, {"step": step}, keep)


def test_saved_is_loaded(tmp_path):
    path = save(tmp_path, 5)
    lora, optimizer, state = ck.load_checkpoint(path)
    assert lora["unet.a.lora_A.weight"].tolist() == [5.0] * 10 and optimizer["state.0.exp_avg"].shape == (10,) and state == {"step": 5}
    assert ck.damage(path) is None and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5"]


def test_newest_are_kept_in_order_of_steps(tmp_path):
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in ck.list_checkpoints(tmp_path)] == [10, 100]


@pytest.mark.parametrize("name", [ck.LORA, ck.OPTIMIZER, ck.STATE, ck.MANIFEST])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, name, how):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    told = []
    assert ck.latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-1"
    assert [type(event) for event in told] == [Notice] and "checkpoint-2 is damaged" in told[0].message
    assert ck.damage(save(tmp_path, 2)) is None  # and it can be made again


def test_none_at_all(tmp_path):
    assert ck.latest_checkpoint(tmp_path / "absent") is None


def test_leftovers_of_a_kill_are_not_seen_and_swept(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp" / ck.LORA).write_bytes(b"half")
    assert ck.latest_checkpoint(tmp_path).name == "checkpoint-1"
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_damaged_ones_set_aside_cost_no_whole_one(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / ck.STATE).write_text("?")
    ck.set_aside(tmp_path, after=2)
    ck.set_aside(tmp_path, after=2)  # a run that is killed again does it again
    assert [step for step, _ in ck.list_checkpoints(tmp_path)] == [2]
    save(tmp_path, 3, keep=1)
    assert ck.latest_checkpoint(tmp_path).name == "checkpoint-3" and (tmp_path / "checkpoint-6.damaged" / ck.LORA).is_file()


def test_full_disk_leaves_the_last_one_whole(tmp_path):
    """RLIMIT_FSIZE in a child: every limit from nothing to all makes a whole checkpoint or none, and a sentence."""
    save(tmp_path, 1)
    child = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_checkpoint import ck, save
        from lora_nb.errors import UserError
        folder, refused = Path(sys.argv[1]), 0
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in (0, 100, 2000, 4096, 40_000, 41_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                save(folder, 2, keep=1, size=10_000)
            except UserError as error:
                refused += "is full" in str(error)
            assert [s for s, _ in ck.list_checkpoints(folder)] == ([1] if limit < 41_000 else [2]), limit
            assert ck.latest_checkpoint(folder, lambda e: sys.exit(f"damaged {e}")) is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert refused == 5, refused
    """)
    result = subprocess.run([sys.executable, "-c", child, tmp_path, Path(__file__).parent], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_too_little_space_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(ck.shutil, "disk_usage", lambda _: type("U", (), {"free": 5 << 20}))
    ck.check_space(tmp_path, 1 << 20, "x")
    with pytest.raises(UserError, match="save_total_limit"):
        ck.check_space(tmp_path / "not" / "yet", 50 << 20, "The run")


# --- the optimizer's state ---------------------------------------------------------------------------------------

KINDS = [{"name": "adamw"}, {"name": "adamw", "use_8bit_adam": True}, {"name": "adafactor"}]


def advance(optimizer, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS, ids=["adamw", "adamw8bit", "adafactor"])
def test_a_step_is_as_long_as_its_rate_whatever_the_optimizer(kind):
    """A LoRA's up matrix begins at zero: an optimizer that scales steps by the weights would leave it there."""
    up = torch.nn.Parameter(torch.zeros(80, 64))
    optimizer = build_optimizer(**kind, groups=[{"params": [up], "lr": 0.01}])
    advance(optimizer, [up], [1])
    assert up.detach().square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("kind", KINDS, ids=["adamw", "adamw8bit", "adafactor"])
def test_state_goes_through_tensors_and_json(kind, tmp_path):
    def fresh():
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((80, 64), (64, 80), (7,))]
        return parameters, build_optimizer(**kind, groups=[{"params": [p], "lr": 0.01} for p in parameters])

    whole, optimizer = fresh()
    advance(optimizer, whole, range(6))
    half, optimizer = fresh()
    advance(optimizer, half, range(3))
    tensors, tree = pack_state(optimizer)
    again, second = fresh()
    for parameter, value in zip(again, half, strict=True):
        parameter.data.copy_(value.data)
    tensors, _ = read_safetensors(write_safetensors(tmp_path / "optimizer.safetensors", tensors))
    unpack_state(second, tensors, json.loads(json.dumps(tree)))
    advance(second, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    if kind.get("use_8bit_adam"):
        assert any(value.dtype == torch.uint8 for value in tensors.values())


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_rates_are_diffusers_schedules(name):
    from lora_nb.models import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20, num_cycles=2, power=2.0)
    factor = learning_rate_factor(name, 5, 20, 0.3, cycles=2, power=2.0)
    for step in range(20):
        assert 0.3 * factor(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
