"""Scorers by transformers give the vectors that the libraries' own forward gives, each picture once."""

import numpy as np
import pytest
import torch
from evaluation_run import untrained_clip
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from lora_nb import models
from lora_nb.embedders import ClipEmbedder, DinoEmbedder
from lora_nb.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(3):
        Image.effect_noise((96, 128), 50 + n).convert("RGB").save(folder / f"{n}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(untrained_clip(tmp_path_factory.mktemp("clip")))


def test_clip_agrees_with_its_own_forward(clip, pictures):
    embedder, texts = ClipEmbedder(clip, batch_size=2), ["a man in the snow", "by the sea"]
    model, tokenizer, processor = models.load_clip(clip)
    pixels = processor(images=[Image.open(path) for path in pictures], return_tensors="pt").pixel_values
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
    assert embedder.pictures(pictures) == pytest.approx(expected.image_embeds.numpy(), abs=1e-5)
    assert embedder.texts(texts) == pytest.approx(expected.text_embeds.numpy(), abs=1e-5)


def test_a_picture_is_embedded_once_from_a_file_or_from_memory(clip, pictures):
    embedder = ClipEmbedder(clip)
    first = embedder.pictures([*pictures, *pictures])
    embedder.close()
    embedder._load = lambda: pytest.fail("the model was loaded again")
    assert np.array_equal(embedder.pictures(pictures), first[:3]) and np.array_equal(first[:3], first[3:])
    with_memory = ClipEmbedder(clip).pictures([Image.open(path) for path in pictures])
    assert with_memory == pytest.approx(first[:3], abs=1e-6)


def test_dino_gives_unit_vectors_of_its_class_token(tmp_path, pictures):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    vectors = DinoEmbedder(str(tmp_path)).pictures(pictures)
    assert vectors.shape == (3, 32) and np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))


def test_a_scorer_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="nobody/nothing"):
        ClipEmbedder("nobody/nothing").texts(["a"])
