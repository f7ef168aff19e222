"""The cache: made once, by content, never used where it does not fit; and training from it is training without it."""

import errno
import json

import pytest
import torch
from conftest import write_dataset
from PIL import Image
from safetensors.torch import load_file

from lora_nb import cache, models
from lora_nb.errors import UserError
from lora_nb.events import Notice, Progress
from lora_nb.manifest import PLAIN, WITH_LATENTS, read_manifest


def encode(config, **options):
    return cache.encode(config.run_dir / PLAIN, config.base_model, config.vae_model, **options)


def counts(done):
    return done.latents_made, done.latents_found, done.embeddings_made, done.embeddings_found


def test_second_run_encodes_nothing(make_run, monkeypatch):
    config = make_run()
    events = []
    first = encode(config, captions=["a prompt"], on_event=events.append)
    assert counts(first) == (7, 0, 9, 0)  # seven captions, the prompt and the empty caption
    totals = {event.stage: (event.done, event.total) for event in events if isinstance(event, Progress)}
    assert totals == {"latents": (7, 7), "text_embeddings": (9, 9)}
    before = (config.run_dir / WITH_LATENTS).read_bytes()
    for name in ("load_vae", "load_text_encoders"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("an encoder was loaded"))
    assert counts(encode(config, captions=["a prompt"])) == (0, 7, 0, 9)
    assert (config.run_dir / WITH_LATENTS).read_bytes() == before


def test_latents_are_the_vaes_distribution(make_run):
    config = make_run(pictures=4)
    encode(config)
    manifest = read_manifest(config.run_dir / WITH_LATENTS)
    vae = models.load_part(config.base_model, "vae")
    shapes = set()
    for sample in manifest.samples:
        tensors = load_file(manifest.path_of(sample.latent_path))
        pixels = torch.from_numpy(cache.pixels_of(manifest, sample).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        assert torch.allclose(tensors["mean"], posterior.mean[0], atol=1e-5) and torch.allclose(tensors["logvar"], posterior.logvar[0], atol=1e-5)
        shapes.add(tuple(tensors["mean"].shape))
    assert len(manifest.samples) == 4 and len(shapes) == 2


def test_one_edit_means_one_encoding(make_run, project, tmp_path):
    config = make_run()
    encode(config)
    picture = project / "data" / "images" / "p2.png"
    Image.open(picture).rotate(180).save(picture)
    write_dataset(project / "data", config)
    assert counts(encode(config)) == (1, 6, 0, 8)
    (project / "data" / "images" / "p3.png").rename(project / "data" / "images" / "p9.png")
    plain = config.run_dir / PLAIN
    plain.write_text(plain.read_text().replace("images/p3.png", "images/p9.png").replace("number 4 of", "number four of"))
    assert counts(encode(config)) == (0, 7, 1, 7)  # a rename is nothing, a caption is one


def test_new_weights_mean_all(make_run, tmp_path):
    config = make_run(pictures=3)
    encode(config)
    vae = models.load_part(config.base_model, "vae")
    with torch.no_grad():
        vae.quant_conv.bias += 0.1
    vae.save_pretrained(tmp_path / "vae")
    done = cache.encode(config.run_dir / PLAIN, config.base_model, str(tmp_path / "vae"))
    assert counts(done) == (3, 0, 0, 4)


def test_flips_are_entries_of_their_own(make_run):
    config = make_run(pictures=2, random_flip=True)
    assert counts(encode(config, random_flip=True)) == (4, 0, 3, 0)
    manifest = read_manifest(config.run_dir / WITH_LATENTS)
    source = cache.cached_samples(manifest, cache.weights_of(config.base_model), random_flip=True)
    fresh = cache.fresh_samples(manifest, config.base_model)
    for sample in manifest.samples:
        assert not torch.equal(source.latents(sample, True), source.latents(sample, False))
        assert torch.equal(source.latents(sample, True), fresh.latents(sample, True))


def test_cached_is_fresh_bit_for_bit(make_run):
    config = make_run()
    encode(config)
    manifest = read_manifest(config.run_dir / WITH_LATENTS)
    cached = cache.cached_samples(manifest, cache.weights_of(config.base_model))
    fresh = cache.fresh_samples(manifest, config.base_model)
    for sample in manifest.samples:
        assert torch.equal(cached.latents(sample), fresh.latents(sample))
    for caption in ["", *(sample.caption for sample in manifest.samples)]:
        assert all(torch.equal(a, b) for a, b in zip(cached.embeddings(caption), fresh.embeddings(caption), strict=True))
    assert len(manifest.samples) == 7


def test_empty_caption_is_what_the_base_expects(make_run, tiny_base, tmp_path):
    config = make_run(pictures=1)
    fresh = cache.fresh_samples(read_manifest(config.run_dir / PLAIN), config.base_model)
    assert not any(part.any() for part in fresh.embeddings(""))  # SDXL's zeros
    index = json.loads((tiny_base / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    loaded = models.load_text_encoders(config.base_model)
    assert all(part.any() for part in cache.encode_caption(*loaded, "", zeros_for_empty=False))


def fitting(config):
    return cache.cached_samples(read_manifest(config.run_dir / WITH_LATENTS), cache.weights_of(config.base_model, config.vae_model), config.random_flip)


def test_a_cache_that_does_not_fit_is_refused(make_run, project, tmp_path):
    config = make_run(pictures=3)
    encode(config)
    fitting(config)
    with pytest.raises(UserError, match="flips were not encoded"):
        fitting(config.model_copy(update={"random_flip": True}))
    vae = models.load_part(config.base_model, "vae")
    with torch.no_grad():
        vae.quant_conv.bias += 0.1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="the VAE is another one.*notebook 02"):
        fitting(config.model_copy(update={"vae_model": str(tmp_path / "vae")}))

    path = config.run_dir / WITH_LATENTS
    content = path.read_text()
    path.write_text(content.replace("number 1 of", "number one of"))
    with pytest.raises(UserError, match="a caption has changed"):
        fitting(config)
    path.write_text(content)
    (config.run_dir / PLAIN).write_text((config.run_dir / PLAIN).read_text().replace("hero", "heroine"))
    with pytest.raises(UserError, match="dataset_manifest.json has changed"):
        fitting(config)


@pytest.mark.parametrize("record", ["x", None, {"source": 5}, {"source": "../../etc/passwd"}, {}])
def test_a_hostile_record_is_none(make_run, record):
    config = make_run(pictures=1)
    encode(config)
    path = config.run_dir / WITH_LATENTS
    content = json.loads(path.read_text())
    content["metadata"]["settings"]["cache"] = record
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="do not fit.*notebook 02"):
        fitting(config)
    assert cache.encode(path, config.base_model).latents_found == 1 and fitting(config)  # the cure works


def test_a_picture_without_latents_is_told(make_run):
    config = make_run(pictures=2)
    encode(config)
    path = config.run_dir / WITH_LATENTS
    content = json.loads(path.read_text())
    content["samples"][1]["latent_path"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a picture has no latents"):
        fitting(config)


def test_a_full_disk_ends_encoding_with_a_sentence(make_run, monkeypatch):
    def full(*what):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_safetensors", full)
    with pytest.raises(UserError, match="is full: make room"):
        encode(make_run(pictures=3))


def test_edited_pictures_and_damaged_files_are_named(make_run, project):
    config = make_run(pictures=3)
    encode(config)
    source = fitting(config)
    samples = source.manifest.samples
    Image.new("RGB", (80, 80)).save(project / "data" / "images" / "p0.png")
    with pytest.raises(UserError, match=r"images/p0\.png"):
        source.latents(samples[0])
    file = source.manifest.path_of(samples[1].latent_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="missing or damaged.*notebook 02"):
        source.latents(samples[1])
    assert encode_again(config) == 1


def encode_again(config):
    """The damaged one is made again; p0's edit makes another manifest necessary, so it is put back first."""
    manifest = read_manifest(config.run_dir / PLAIN)
    write_dataset(manifest.root, config, pictures=3)
    return encode(config).latents_made - 1  # p0 has new pixels


def test_overflow_is_named():
    class Overflowing(torch.nn.Linear):
        def encode(self, image):
            value = torch.full((1, 4, 2, 2), float("nan"))
            return type("E", (), {"latent_dist": type("D", (), {"mean": value, "logvar": value})})

    import numpy as np

    with pytest.raises(cache.NonFiniteLatent, match="cat.png"):
        cache.encode_image(Overflowing(1, 1), np.zeros((16, 16, 3), np.uint8), "cat.png")


def test_long_captions_are_told(make_run):
    config = make_run(pictures=1)
    events = []
    encode(config, captions=["word " * 90], on_event=events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert len(told) == 1 and "75 tokens" in told[0]


def test_encoding_what_is_encoded_makes_nothing_and_still_fits(make_run):
    config = make_run(pictures=3)
    first = encode(config)
    again = cache.encode(first.manifest_path, config.base_model)
    assert (again.latents_made, again.latents_found, again.embeddings_made) == (0, 3, 0)
    manifest = read_manifest(again.manifest_path)
    latents = cache.cached_samples(manifest, cache.weights_of(config.base_model)).latents(manifest.samples[0])
    assert latents.shape[0] == 2 and torch.isfinite(latents).all()
