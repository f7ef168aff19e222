"""Order, noise, timesteps, flips and dropout are functions of (seed, step, sample) alone."""

from collections import Counter

import pytest
import torch

from lora_nb.draws import Order, draw, epoch_order

CASES = [(32, 4, 3), (7, 2, 3), (5, 8, 1), (1, 4, 1), (24, 6, 5), (33, 4, 2), (10, 10, 10)]


@pytest.mark.parametrize(("count", "batch", "kinds"), CASES)
def test_every_epoch_takes_every_sample_once(count, batch, kinds):
    buckets = tuple(n % kinds for n in range(count))
    order, steps = Order(buckets, batch, seed=1), -(-4 * count // batch)
    stream = [index for step in range(steps) for index in order.at(step)]
    for epoch in range(len(stream) // count):
        assert Counter(stream[epoch * count : (epoch + 1) * count]) == Counter(range(count))
    assert len(stream) // count >= 4


def test_batches_keep_to_one_bucket_where_numbers_allow():
    buckets = (0,) * 8 + (1,) * 8 + (2,) * 4
    even, uneven = Order(buckets, 4, seed=3), Order(buckets[:-1], 4, seed=3)
    kinds = [len({buckets[i] for i in even.at(step)}) for step in range(50)]
    assert kinds == [1] * 50
    mixed = [len({buckets[i] for i in uneven.at(step)}) for step in range(95)]
    assert mixed.count(1) > 75


def test_epochs_and_seeds_differ():
    buckets = (0,) * 16
    orders = {epoch_order(buckets, 4, seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 6


def test_a_draw_depends_on_its_place_alone():
    first, again = (draw(3, 11, (4, 8, 6), seed=5) for _ in range(2))
    other = draw(3, 12, (4, 8, 6), seed=5)
    assert first.timestep == again.timestep and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise) and not torch.equal(first.noise, first.posterior_noise)


def test_one_setting_moves_nothing_of_another():
    plain = draw(0, 7, (4, 8, 8), seed=0)
    busy = draw(0, 7, (4, 8, 8), seed=0, flips=True, caption_dropout=1.0, noise_offset=0.1)
    assert plain.timestep == busy.timestep and torch.equal(plain.posterior_noise, busy.posterior_noise)
    offset = (busy.noise - plain.noise).flatten(1)
    assert torch.allclose(offset, offset[:, :1].expand_as(offset), atol=1e-6) and offset.abs().sum() > 0


def test_shares_are_as_asked():
    draws = [draw(0, position, (1, 1, 1), seed=0, flips=True, caption_dropout=0.1) for position in range(2000)]
    assert 0.45 < sum(one.flip for one in draws) / 2000 < 0.55
    assert 0.07 < sum(one.drop_caption for one in draws) / 2000 < 0.13
    assert 450 < sum(one.timestep for one in draws) / 2000 < 550 and {one.timestep for one in draws} <= set(range(1000))
