"""The parts of the tiny SD3 learn, in the same bits each time, and stop and go on without a difference."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file

from sd3.common.model_parts import make_transformer
from sd3.common.tiny_sd3 import write_frame
from sd3.tiny_world import album, autoencoder, reader, train
from sd3.tiny_world.grammar import Scene, words
from sd3.tiny_world.loop import Trainer, rate, seeded
from sd3.tiny_world.measure import MODEL
from sd3.tiny_world.painter import Painter, WeightedKeys, fresh_transformer
from sd3.tiny_world.sizes import TINY_WORLD

WEIGHTS = "diffusion_pytorch_model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def random_transformer() -> SD3Transformer2DModel:
    """Weights of which none is zero, so that every path counts."""
    return seeded(lambda: make_transformer(TINY_WORLD), 0).eval()


def shipped_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pictures() -> album.Album:
    return album.make_album(shipped_vae(), reader.Reader.load(MODEL), seed=0, pictures=256)


def new_painter(pictures: album.Album, cycle: int = 0) -> Painter:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler")
    return Painter(pictures, shipped_vae(), scheduler, seed=0, cycle=cycle, steps=24)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [rate(step, 1000, 100) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[100] == 1.0
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-4


def inputs(captions: int = 2) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(captions, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([30.0, 700.0]),
        "pooled_projections": torch.randn(captions, TINY_WORLD.pooled_width, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def test_a_key_that_stands_for_many_is_as_good_as_many() -> None:
    """Forty equal tokens, and one with log 40 added to its scores, give the same prediction."""
    transformer, given = random_transformer(), inputs()
    words = torch.randn(2, 5, TINY_WORLD.t5_width)
    padding = torch.randn(2, 1, TINY_WORLD.t5_width)
    full = transformer(encoder_hidden_states=torch.cat([words, padding.expand(2, 40, -1)], dim=1), **given)[0]
    short = torch.cat([words, padding], dim=1)
    pixels = 16
    bias = torch.zeros(2, 1, 1, pixels + 6)
    transformer.set_attn_processor(WeightedKeys())
    unweighted = transformer(encoder_hidden_states=short, joint_attention_kwargs={"attention_mask": bias}, **given)[0]
    bias[..., -1] = math.log(40)
    weighted = transformer(encoder_hidden_states=short, joint_attention_kwargs={"attention_mask": bias}, **given)[0]
    torch.testing.assert_close(weighted, full, atol=1e-5, rtol=1e-4)
    assert (unweighted - full).abs().max() > 100 * (weighted - full).abs().max()


def test_the_album_weighs_what_it_leaves_out(pictures: album.Album) -> None:
    tokens = album.WORDS + album.PADS
    assert pictures.prompt.shape == (256, 2 * tokens, TINY_WORLD.t5_width)
    assert pictures.latents.shape == (256, 16, 8, 8)
    counts = pictures.bias.float().exp().unflatten(1, (2, tokens)).sum(-1)
    torch.testing.assert_close(counts[:, 0], torch.full((256,), 77.0), atol=0.1, rtol=0)
    low, high = reader.T5_TOKENS
    assert ((counts[:, 1] > low - 0.5) & (counts[:, 1] < high + 0.5)).all()
    assert len(counts[:, 1].unique()) > 2


def test_the_album_is_the_same_for_the_same_seed(pictures: album.Album) -> None:
    again = album.make_album(shipped_vae(), reader.Reader.load(MODEL), seed=0, pictures=64)
    other = album.make_album(shipped_vae(), reader.Reader.load(MODEL), seed=1, pictures=64)
    assert all(torch.equal(a, b[:64]) for a, b in zip(again, pictures, strict=True))
    assert not torch.equal(again.latents, other.latents)
    second = album.make_album(shipped_vae(), reader.Reader.load(MODEL), 0, 64, 1, Scene.is_held_out)
    assert not torch.equal(again.latents, second.latents)


def test_a_fresh_painter_predicts_nothing() -> None:
    transformer = seeded(fresh_transformer, 0)
    prompt = torch.randn(2, 12, TINY_WORLD.t5_width)
    assert not transformer(encoder_hidden_states=prompt, **inputs())[0].any()


def test_the_painter_learns_and_goes_on_in_the_same_bits(pictures: album.Album, tmp_path: Path) -> None:
    """The loss starts near 2, noise and latents each having a spread of 1, and falls by a sixth in 24 steps."""
    whole = new_painter(pictures)
    whole.train(tmp_path / "whole.safetensors")
    losses = whole.trainer.losses
    assert 1.6 < losses[0] < 2.6
    assert sum(losses[-5:]) / 5 < 5 / 6 * losses[0]
    first = new_painter(pictures)
    first.train(tmp_path / "kept.safetensors", until=6)
    second = new_painter(pictures)
    second.train(tmp_path / "kept.safetensors", until=10)
    assert second.trainer.losses == losses[:10]
    cycle = new_painter(pictures, cycle=1)
    cycle.begin_from(tmp_path / "whole.safetensors")
    for name, weight in cycle.trainer.weights.items():
        assert torch.equal(weight, whole.trainer.average[name]), name
        assert torch.equal(weight, cycle.trainer.average[name]), name
    assert cycle.loss_at(0).item() != whole.loss_at(0).item()
    whole.save(tmp_path / "transformer")
    saved = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(isinstance(one, JointAttnProcessor2_0) for one in saved.attn_processors.values())
    name = "proj_out.weight"
    written = load_file(tmp_path / "transformer" / WEIGHTS)[name]
    assert torch.equal(written, whole.trainer.average[name].half())


def test_the_trainer_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    def trained(parts: tuple[int, ...]) -> dict[str, torch.Tensor]:
        for until in parts:
            model = seeded(lambda: torch.nn.Linear(3, 2), 0)
            trainer = Trainer(model, 0.1, 12)
            if (tmp_path / "kept.safetensors").exists():
                trainer.load(tmp_path / "kept.safetensors")
            trainer.run(lambda step, model=model: model(torch.full((1, 3), float(step))).square().mean(), "test", until)
            trainer.save(tmp_path / "kept.safetensors")
        (tmp_path / "kept.safetensors").unlink()
        return trainer.weights | {f"average {name}": tensor for name, tensor in trainer.average.items()}

    whole, parts = trained((12,)), trained((5, 9, 12))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.long
def test_the_autoencoder_learns(tmp_path: Path) -> None:
    """The pixels' error after 300 steps is less than half of what it is after 2."""
    early = autoencoder.train_autoencoder(tmp_path / "early", 0, 0, steps=2)
    late = autoencoder.train_autoencoder(tmp_path / "late", 0, 0, steps=300)
    assert late < 0.5 * early, (early, late)
    saved = AutoencoderKL.from_pretrained(autoencoder.folder_of(tmp_path / "late", 0))
    written = load_file(autoencoder.folder_of(tmp_path / "late", 0) / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    with torch.no_grad():
        rng = random.Random("latents 0")
        draws = [autoencoder.render(autoencoder.draw_scene(rng), rng, loose=True) for _ in range(64)]
        latents = saved.float().encode(autoencoder.as_tensor(draws)).latent_dist.mean
    scaled = (latents - saved.config.shift_factor) * saved.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert abs(scaled.std() - 1) < 0.1


def test_a_phase_begins_with_what_the_one_before_left(tmp_path: Path) -> None:
    """One step with noise and faces shakes a trained autoencoder, which stays far better than a fresh one."""
    last = len(autoencoder.PHASES) - 1
    shutil.copytree(MODEL / "vae", autoencoder.folder_of(tmp_path, last - 1))
    before = load_file(MODEL / "vae" / WEIGHTS)
    assert autoencoder.train_autoencoder(tmp_path, 0, last, steps=1) < 0.15
    after = load_file(autoencoder.folder_of(tmp_path, last) / WEIGHTS)
    # The last phase leaves the codes alone, by which the painter may have begun to learn.
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert autoencoder.train_autoencoder(tmp_path, 0, 0, steps=1) > 0.2
    config = json.loads((autoencoder.folder_of(tmp_path, last) / "config.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.long
def test_the_reader_learns_to_tell_shapes_and_colours(tmp_path: Path) -> None:
    """In 60 steps the first CLIP's projection tells more than half of the shapes, of which there are six."""
    rows = write_frame(tmp_path, words())
    shares = reader.train_reader(tmp_path, rows, 0, steps=60)
    assert shares.shape == (5, 7)
    assert shares[:, 0].max() > 0.5
    loaded = reader.Reader.load(tmp_path)
    prompt, pooled = loaded(["a red circle", ""], 24)
    assert prompt.shape == (2, 77 + 24, TINY_WORLD.t5_width)
    assert pooled.shape == (2, TINY_WORLD.pooled_width)
    with pytest.raises(ValueError, match="expected at most 24"):
        loaded.tokens(["red " * 30], 24)


SHORT = {"seed": 0, "steps": 2, "autoencoder_steps": 1, "reader_steps": 1, "pictures": 64}


@pytest.mark.long
def test_one_command_makes_the_same_directory_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    for name in ("a", "b"):
        assert train.main(["--output", str(tmp_path / name), *arguments]) == 0
    assert "MB of at most 8" in capsys.readouterr().out
    made, again = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {name.split("/")[0] for name in made} == {*train.PARTS, "training.json"}
    made.pop("training.json"), again.pop("training.json")  # the times differ
    assert made == again
    record = json.loads((tmp_path / "a" / "training.json").read_text(encoding="utf-8"))
    assert record["settings"] == SHORT
    assert [len(record[f"painter {cycle}"]["loss"]) for cycle in (1, 2, 3)] == [2, 2, 2]
    albums = [load_file(tmp_path / "a.work" / f"album.{number}.safetensors")["latents"] for number in (0, 1)]
    assert not torch.equal(*albums)


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder, "PHASES", autoencoder.PHASES[:1])
    with monkeypatch.context() as patch:
        patch.setattr(reader, "train_reader", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "out", tmp_path / "work", SHORT)
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(reader, "train_reader", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "out", tmp_path / "work", SHORT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--steps=0"], "0 is not a positive number"), (["--seed=x"], "invalid seed value"), (["--speed"], "--speed")],
)
def test_bad_numbers_are_refused(tmp_path: Path, arguments: list[str], said: str, capsys) -> None:
    assert train.main(["--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_or_a_work_directory_of_another_run_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    assert train.main(["--output", str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err
    train.Workshop(tmp_path / "work", SHORT).stage("vocabularies", dict)
    assert train.main(["--output", str(tmp_path / "new"), "--work", str(tmp_path / "work"), "--seed=5"]) == 2
    error = capsys.readouterr().err
    assert "begun with" in error
    assert error.count("\n") == 1
