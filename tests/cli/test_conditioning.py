"""Conditional generation and inverse problems from the command line, against closed forms on models of known law.

A fresh network is zero, and NetworkDenoiser then is the exact denoiser of N(0, sigma_data^2 C): samples, posteriors and
evidence of such a checkpoint are those of Gaussians.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from undrift import ModalDiffusion, NoiseDiffusion, load, sample, save
from undrift.cli import main
from undrift.container import read_file
from undrift.denoise import NetworkClassifier, NetworkDenoiser, PseudoInverse
from undrift.guided_noise import guide
from undrift.networks import MLP, MLPClassifier, SpectralNet, UNet
from undrift.observe import GaussianNoise, Matrix, Observation
from undrift.process import CLD, PSLD
from undrift.report import read_npz
from undrift.report.posterior import PosteriorRecord
from undrift.sample import Ancestral, twisted
from undrift.space import Cosine, FunctionSpace, Matern
from undrift.train import Ring

QUIET = ["--progress", "false"]
NOISE = ["--noise", "{type: GaussianNoise, std: 0.5}"]


def run(*words: object) -> int:
    return main([*map(str, words), *QUIET])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints: vectors, images with classes (weights at random), a classifier, functions."""
    place = tmp_path_factory.mktemp("models")
    save(place / "vectors.safetensors", NetworkDenoiser(MLP(2, 8, 1), 1.0), {"event": [2], "low": -3, "high": 3})
    three = NetworkDenoiser(MLP(2, 8, 1, condition_features=3), 1.0)
    save(place / "told_three.safetensors", three, {"event": [2]})
    torch.manual_seed(0)
    network = UNet(1, 4, width=8, multipliers=(1, 1), attention=False, classes=3)
    classifier = MLPClassifier(16, 3, 8, 1)
    for parameter in [*network.parameters(), *classifier.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    save(place / "images.safetensors", NetworkDenoiser(network), {"event": [1, 4, 4]})
    save(place / "classifier.safetensors", NetworkClassifier(classifier), {"event": [1, 4, 4]})
    space = FunctionSpace(Cosine(), Matern(2.0, 3.0, 1.0))
    model = NetworkDenoiser(SpectralNet(width=4, modes=4, depth=1), 1.0, space=space)
    save(place / "functions.safetensors", model, {"event": [16], "data": "fields"})
    generator = torch.Generator().manual_seed(1)
    for name, optional in (("always", False), ("told", True)):
        network = MLP(2, 8, 1, condition_features=1, condition_optional=optional)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save(place / f"{name}.safetensors", NetworkDenoiser(network), {"event": [2], "data": "pairs"})
    np.savez(place / "truth.npz", x=torch.randn(1, 4, 4, generator=generator).numpy())
    return place


def samples(out):
    return read_npz(out / "samples.npz")[0]


WRONG = {
    "--label 3": "label: is the class that a classifier guides to",
    "--classifier c": "label: a classifier needs the class",
    "--guidance 2": "guidance: nothing guides",
    "--y 1 --interval [0.1,5]": "interval: the noise levels of guidance",
    "--y 1 --guidance 2 --interval [5,1]": "interval: must be [low, high]",
    "--mask left": "mask: of what?",
    "--known a.npz --simulate 3": "known: the known values are those of the simulated truth",
    "--truth a.npz --simulate 3 --mask left": "truth: give either",
    "--source Digits": "source: is where",
    "--observe Identity --data y.npz": "noise: an observation has a law",
    "--observe Identity --noise.std 0.1 --noise.type GaussianNoise": "data: of what was observed",
    "--observe Identity --noise {type:\\ GaussianNoise,\\ std:\\ 1} --data y --method replace": "method: replace is",
    "--observe Identity --known a.npz": "observe: known and mask are an observation already",
    "--mask left --simulate 3 --method dps": "noise: dps needs a likelihood of the known values",
    "--mask left --simulate 3 --noise {type:\\ GaussianNoise,\\ std:\\ 1}": "noise: known takes known values as exact",
    "--method twisted": "method: twisted of what?",
    "--particles 8 --mask left --simulate 3": "particles: belong to --method twisted",
    "--potential dps --mask left --simulate 3": "potential: is what twisted sampling",
    "--mask left --simulate 3 --method replace --guidance 2": "guidance: is the strength of a potential's gradient",
    "--mask left --simulate 3 --guidance 2": "guidance: is the strength of a potential's gradient, and known has none",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_combinations_are_said_before_the_run_is_looked_for(flags, capsys):
    import shlex

    assert main(["sample", "--run", "nowhere", *shlex.split(flags)]) == 2
    assert capsys.readouterr().err.startswith(f"undrift: {WRONG[flags]}")


def test_what_does_not_fit_the_model_is_said_and_nothing_is_written(folder, tmp_path, capsys):
    vectors, images = folder / "vectors.safetensors", folder / "images.safetensors"
    np.savez(tmp_path / "y.npz", y=np.zeros(3, np.float32))
    np.savez(tmp_path / "one.npz", y=np.zeros(1, np.float32))
    observe = ["--observe", "{type: Matrix, matrix: [[1.0, 0.0]]}", *NOISE]
    ode = ["--sampler", "Exponential", "--sampler.order", 1]
    whole = ["--observe", "Identity", *NOISE, "--truth", folder / "truth.npz"]
    for flags, said in (
        ([vectors, "--y", 1], "y: the network of"),
        ([vectors, *observe, "--data", tmp_path / "y.npz"], "data: has shape (3,), Matrix sees (1,)"),
        ([vectors, *observe, "--data", tmp_path / "none.npz"], "data: no such file"),
        ([vectors, *observe, "--simulate", 0], "simulate: no configuration beside the model"),
        ([images, "--mask", "middle", "--truth", folder / "truth.npz"], "mask: 'middle' is neither one of left"),
        ([images, "--truth", folder / "truth.npz"], "truth: of what?"),
        ([vectors, "--mask", "left", "--truth", folder / "truth.npz"], "truth: "),
        ([images, "--classifier", images, "--label", 1], "classifier: "),
        ([folder / "classifier.safetensors"], "run: "),
        (
            [images, "--classifier", folder / "classifier.safetensors", "--label", 1, "--guidance", 2, *whole],
            "guidance: would be the strength of both the classifier and the observation, which guides by moments",
        ),
        (
            [folder / "told_three.safetensors", *observe, "--data", tmp_path / "one.npz"],
            "data: MLP: observed must have the shape",
        ),
        ([images, "--classifier", folder / "classifier.safetensors", "--label", 7], "label: "),
        (
            [images, "--observe", "PhaseRetrieval", *NOISE, "--truth", folder / "truth.npz", "--method", "pigdm"],
            "method: ",
        ),
        (
            [images, "--mask", "left", "--truth", folder / "truth.npz", "--method", "twisted", *NOISE, *ode],
            "sampler: the steps of Exponential(order=1) draw no noise",
        ),
    ):
        out = tmp_path / "out"
        assert run("sample", *flags, "--out", out) == 2, flags
        assert capsys.readouterr().err.startswith(f"undrift: {said}"), flags
        assert not out.exists(), "before any work"


@pytest.mark.parametrize(("method", "process"), [("known", "PSLD"), ("replace", "VP")])
def test_known_values_are_in_their_place(folder, tmp_path, method, process):
    out = tmp_path / "o"
    flags = ["--truth", folder / "truth.npz", "--mask", "top", "--method", method, "--n", 3, "--out", out]
    steps = ["--process", process, "--sampler", "Ancestral", "--sampler.steps", 4]
    assert run("sample", folder / "images.safetensors", *flags, *steps) == 0
    truth = torch.from_numpy(np.load(folder / "truth.npz")["x"])
    x = samples(out)
    torch.testing.assert_close(x[:, :, :2], truth[:, :2].expand(3, 1, 2, 4), rtol=1e-5, atol=1e-5)
    assert float((x[:, :, 2:] - truth[:, 2:]).abs().min()) > 0
    about = json.loads((out / "posterior.json").read_text())
    assert about["errors"]["places"] == 8
    assert "The known part" in (out / "report.html").read_text()


def test_a_process_of_low_noise_is_guided_too(folder, tmp_path):
    low = ["--process", "VE", "--process.clock", "{type: GeometricClock, sigma_min: 0.01, sigma_max: 0.9}"]
    data = ["--truth", folder / "truth.npz", "--mask", "left", "--method", "dps", *NOISE, "--n", 1]
    few = ["--sampler", "Ancestral", "--sampler.steps", 2, "--out", tmp_path / "o"]
    assert run("sample", folder / "images.safetensors", *data, *low, *few) == 0


def test_guidance_at_its_neutral_settings_is_none(folder, tmp_path):
    def x(name, *flags):
        assert (
            run(
                "sample",
                folder / "images.safetensors",
                "--n",
                4,
                "--sampler.steps",
                3,
                *flags,
                "--out",
                tmp_path / name,
            )
            == 0
        )
        return samples(tmp_path / name)

    plain, free = x("a", "--y", 1), x("b")
    torch.testing.assert_close(x("c", "--y", 1, "--guidance", 1), plain)
    torch.testing.assert_close(x("d", "--y", 1, "--guidance", 4, "--interval", "[1000, 2000]"), plain)
    assert not torch.allclose(x("e", "--y", 1, "--guidance", 4), plain)
    guide = ["--classifier", folder / "classifier.safetensors", "--label", 2]
    torch.testing.assert_close(x("f", *guide, "--guidance", 0), free)
    assert not torch.allclose(x("g", *guide), free)


def test_a_network_that_may_be_told_nothing_makes_prior_posterior_and_beyond(folder, tmp_path, capsys):
    np.savez(tmp_path / "y.npz", y=np.array([1.2], np.float32))
    seen = ["--observe", "{type: Matrix, matrix: [[1.0, 0.5]]}", *NOISE, "--data", tmp_path / "y.npz"]
    always, told = folder / "always.safetensors", folder / "told.safetensors"

    def x(name, *flags):
        steps = ["--n", 4, "--sampler.steps", 3, "--out", tmp_path / name]
        assert run("sample", told, *steps, *flags) == 0, capsys.readouterr().err
        return samples(tmp_path / name)

    prior, given = x("prior"), x("given", *seen)
    assert not (tmp_path / "prior" / "posterior.json").exists()
    assert not torch.allclose(given, prior, atol=1e-2)
    torch.testing.assert_close(x("zero", *seen, "--guidance", 0), prior)
    assert not torch.allclose(x("two", *seen, "--guidance", 2, "--interval", "[0.1, 50]"), given, atol=1e-2)
    about = json.loads((tmp_path / "two" / "posterior.json").read_text())
    assert about["warnings"] == ["Guidance at a strength other than 1 is no draw of the posterior."]
    assert (about["settings"]["guidance"], about["settings"]["interval"]) == (2, [0.1, 50])
    assert about["lead"].endswith("with GaussianNoise at strength 2.")
    # one that was always told has no prior: not to draw from, not to guide away from, not to measure
    capsys.readouterr()
    ring = ["--data", "{type: Ring, n: 50}", "--holdout", "{type: Ring, n: 50}"]
    for command, said in (
        (["sample", always], "data: the network of"),
        (["sample", always, *seen, "--guidance", 2], "was always told what was observed and knows no prior"),
        (["evaluate", "--run", always, *ring, "--likelihood", 4], "give pairs, as in --holdout '{type: Simulated"),
        (["compare", always, *ring], "undrift compare tells it nothing"),
        (["design", "--run", always, *ring], "undrift design tells it nothing"),
        (["invert", always], "undrift invert tells it nothing"),
    ):
        assert main([*map(str, command), "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert "is told what was observed" in error or "was always told" in error
        assert said in error
    assert not (tmp_path / "no").exists()


def test_the_likelihood_is_of_what_the_network_is_told(tmp_path):
    """A fresh network is the exact denoiser of N(0, 1), told or not; with pairs it is told, and without if it can."""
    ring = "{type: Ring, n: 60}"
    pairs = f"{{type: Simulated, source: {ring}, operator: {{type: Matrix, matrix: [[1.0, 0.0]]}}}}"
    bits = []
    for optional, data in ((False, pairs), (True, pairs), (True, ring)):
        network = MLP(2, 8, 1, condition_features=1, condition_optional=optional)
        save(tmp_path / "m.safetensors", NetworkDenoiser(network, 1.0), {"event": [2], "data": "pairs"})
        flags = ["--data", data, "--holdout", data, "--likelihood", 20, "--overwrite", "--out", tmp_path / "e"]
        assert run("evaluate", "--run", tmp_path / "m.safetensors", *flags) == 0
        about = json.loads((tmp_path / "e" / "evaluation.json").read_text())
        assert ("given what was observed of each" in about["remarks"][0]) == (data == pairs)
        bits.append(float(about["measures"][0]["value"]))
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]
    points = Ring(n=60).load().x[index].double()
    exact = float((0.5 * points.square() + 0.5 * math.log(2 * math.pi)).mean()) / math.log(2)
    assert bits == pytest.approx([exact] * 3, abs=2e-3)  # the solver's tolerance of 1e-4, and four printed digits


def test_training_with_dropped_observations_makes_a_network_that_does_without(tmp_path, capsys):
    data = "{type: Simulated, source: {type: Ring, n: 100}, operator: {type: Matrix, matrix: [[1.0, 0.0]]}}"
    steps = ["--train.batch", 16, "--train.steps", 2, "--train.observed_dropout", 0.5, "--samples", 0]
    assert run("train", "--data", data, *steps, "--out", tmp_path / "run") == 0
    network = read_file(tmp_path / "run" / "model.safetensors")[1]["model"]["denoiser"]["network"]
    assert (network["condition_features"], network["condition_optional"]) == (1, True)
    assert run("sample", tmp_path / "run", "--simulate", 3, "--guidance", 2, "--n", 2, "--out", tmp_path / "t") == 0
    capsys.readouterr()
    for flags in (
        ["--data", "{type: Ring, n: 100}"],
        ["--data", data, "--network", "{type: MLP, features: 2, condition_features: 1}"],
    ):
        assert run("train", *flags, *steps, "--out", tmp_path / "no") == 2
        assert "undrift: train.observed_dropout: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_twisted_evidence_and_mean_are_those_of_gaussians(folder, tmp_path):
    """x ~ N(0, I), y = x1 + x2 + n: p(y) = N(y; 0, 2.25), E[x | y] = y / 2.25 (1, 1); moments are exact here, so what
    is left is the sampler's own error and that of 200 particles."""
    out, y = tmp_path / "o", 1.2
    np.savez(tmp_path / "y.npz", y=np.array([y], np.float32))
    observe = ["--observe", "{type: Matrix, matrix: [[1.0, 1.0]]}", *NOISE, "--data", tmp_path / "y.npz"]
    flags = ["--method", "twisted", "--particles", 200, "--runs", 2, "--n", 50, "--out", out]
    assert run("sample", folder / "vectors.safetensors", *observe, *flags) == 0
    about = json.loads((out / "posterior.json").read_text())
    exact = -0.5 * (y * y / 2.25 + math.log(2 * math.pi * 2.25))
    assert about["log_evidence"] == pytest.approx(exact, abs=0.05)
    # posterior deviation of a coordinate is sqrt(1 - 1 / 2.25) = .745: 4 standard errors of 200 effective draws
    assert about["ess"] > 200
    record = PosteriorRecord.load(out)
    assert record.mean.tolist() == pytest.approx([y / 2.25] * 2, abs=4 * 0.745 / math.sqrt(200))
    assert record.std.tolist() == pytest.approx([0.745] * 2, rel=0.2)
    with np.load(out / "particles.npz") as file:
        weights = np.exp(file["log_weights"])
        assert weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(weights @ file["x"], record.mean, atol=1e-5)
    assert samples(out).shape == (50, 2)


@pytest.mark.parametrize("method", ["dps", "linearised"])
def test_guided_methods_run_on_functions(folder, tmp_path, method):
    out = tmp_path / "o"
    np.savez(tmp_path / "x.npz", x=np.linspace(-1, 1, 16, dtype=np.float32))
    flags = ["--observe", "{type: Points, locations: [0.2, 0.8]}", *NOISE, "--truth", tmp_path / "x.npz"]
    assert run("sample", folder / "functions.safetensors", *flags, "--method", method, "--n", 40, "--out", out) == 0
    record = PosteriorRecord.load(out)
    assert record.about["kind"] == "curve"
    assert record.sites.tolist() == [[0.2], [0.8]]
    assert record.predicted.shape == (40, 2)
    # data pull: at the places seen the posterior is narrower than the prior, of deviation about 1
    assert float(record.predicted.std(0).max()) < 0.8


# -- training ----------------------------------------------------------------------------------------------------------

STEPS = ["--train.batch", 16, "--train.log_every", 1, "--samples", 2]


def test_a_clock_of_modes_is_trained_and_walked(folder, tmp_path, capsys):
    """Blurring from the command line: the library's samples of the file, and no command that would misread levels."""
    generator = torch.Generator().manual_seed(0)
    x = FunctionSpace(Cosine(), Matern(2.0, 3.0, 1.0)).colour(torch.randn(32, 16, generator=generator))
    np.savez(tmp_path / "f.npz", x=x.numpy())
    train = ["train", "--data", f"{{type: Npz, path: {tmp_path / 'f.npz'}}}", "--space", "data", "--clock", "Blurring"]
    assert run(*train, "--out", tmp_path / "no") == 2
    assert "clock: a clock of modes is trained with --objective SpectralDenoising" in capsys.readouterr().err
    assert run(*train, "--objective", "SpectralDenoising", "--process", "VE", "--out", tmp_path / "no") == 2
    assert "process: ModalDiffusion: the clock's modes reach" in capsys.readouterr().err
    assert not (tmp_path / "no").exists(), "before any work"
    network = ["--network", "{type: SpectralNet, width: 4, modes: 4, depth: 1}"]
    place, out = tmp_path / "r", tmp_path / "o"
    flags = ["--objective", "SpectralDenoising", "--train.steps", 3, *STEPS, *network, "--out", place]
    assert run(*train, *flags) == 0
    steps = ["--sampler", "Ancestral", "--sampler.steps", 4, "--n", 3, "--seed", 2]
    assert run("sample", place, "--process", "CLD", *steps, "--out", out) == 0
    diffusion = ModalDiffusion(CLD(), load(place / "model.safetensors"))
    torch.testing.assert_close(samples(out), sample(diffusion, 3, (16,), Ancestral(4), 2))
    left = ["--mask", "left", "--simulate", 1]
    assert run("sample", place, *left, *steps, "--out", out, "--overwrite", "true") == 0
    assert "overwrite: false" in (out / "config.yaml").read_text(), "or it could not be given with --resume"
    torch.testing.assert_close(samples(out)[:, :8], x[1, :8].expand(3, 8), rtol=1e-4, atol=1e-4)
    for flags, said in (
        (["sample", place, *left, *NOISE, "--method", "moments"], "guidance asks a potential at one noise level"),
        (["sample", place, "--process", "VE"], "process: ModalDiffusion: the clock's modes reach"),
        (["sample", place, "--sampler", "ProbabilityFlow"], "sampler: a clock of modes is walked by a table"),
        (
            ["sample", place, "--sampler", "Heun", "--sampler.grid", "Rho"],
            "sampler: Heun: a modal clock sets the times",
        ),
        (["invert", place], "was trained on a Blurring clock"),
    ):
        assert run(*flags, "--out", tmp_path / "p") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_noise_network_is_guided_too(folder, tmp_path, capsys):
    """The papers' parametrisation: what the command draws is what the library draws, and differs from the prior's."""
    torch.manual_seed(1)
    model, path = NoiseDiffusion(PSLD(), MLP(4, 8, 1), data_std=1.5), tmp_path / "noise.safetensors"
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save(path, model, {"event": [2], "low": -3, "high": 3})
    np.savez(tmp_path / "y.npz", y=np.ones(1, np.float32))
    observe = ["--observe", "{type: Matrix, matrix: [[1.0, -0.5]]}", *NOISE, "--data", tmp_path / "y.npz"]
    steps = ["--sampler", "Ancestral", "--sampler.steps", 4, "--n", 3, "--seed", 2]
    out = tmp_path / "o"
    assert run("sample", path, *observe, "--method", "pigdm", "--guidance", 0.7, *steps, "--out", out) == 0
    seen = Observation(Matrix([[1.0, -0.5]]), GaussianNoise(0.5), torch.ones(1))
    guided = guide(load(path), PseudoInverse(seen, prior_variance=1.5**2), 0.7)
    torch.testing.assert_close(samples(out), sample(guided, 3, (2,), Ancestral(4), 2))
    assert float((samples(out) - sample(load(path), 3, (2,), Ancestral(4), 2)).abs().min()) > 1e-3
    twist = ["--method", "twisted", "--potential", "pigdm", "--particles", 8, "--runs", 1]
    assert run("sample", path, *observe, *twist, *steps, "--out", tmp_path / "t") == 0
    found = twisted(load(path), seen, PseudoInverse(seen, prior_variance=1.5**2), 8, (2,), Ancestral(4), 2)
    about = json.loads((tmp_path / "t" / "posterior.json").read_text())
    assert about["log_evidence"] == pytest.approx(found.log_evidence, abs=1e-4)
    assert run("sample", path, "--mask", "left", "--truth", folder / "truth.npz", "--out", tmp_path / "p") == 2
    assert "predicts the noise of PSLD, and --method known needs a denoiser" in capsys.readouterr().err


def test_a_classifier_is_trained_resumed_and_judged(tmp_path):
    network = "{type: MLPClassifier, features: 64, classes: 10, width: 8, depth: 1}"
    flags = ["train", "--objective", "Classification", "--network", network, *STEPS]
    held = ["--holdout", "{type: Digits, split: test}"]
    assert run(*flags, "--train.steps", 4, "--out", tmp_path / "whole") == 0
    assert run(*flags, "--train.steps", 2, "--out", tmp_path / "parts") == 0
    assert run(*flags, "--train.steps", 4, *held, "--out", tmp_path / "parts", "--resume") == 0
    whole, parts = (read_file(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    names = [m["name"] for m in json.loads((tmp_path / "parts" / "evaluation.json").read_text())["measures"]]
    assert "accuracy at sigma 0" in names


def test_functions_are_learned_on_the_spectrum_of_the_data_and_told_data_are_used(tmp_path, capsys):
    space = FunctionSpace(Cosine(), Matern(2.0, 3.0, 1.0))
    x = space.colour(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)))
    np.savez(tmp_path / "x.npz", x=x.float().numpy())
    source, observe = f"{{type: Npz, path: {tmp_path / 'x.npz'}}}", "{type: Points, locations: [0.25, 0.75]}"
    data = f"{{type: Simulated, source: {source}, operator: {observe}, noise: {{type: GaussianNoise, std: 0.1}}}}"
    out = tmp_path / "run"
    assert run("train", "--data", data, "--space", "matched", *STEPS, "--train.steps", 2, "--out", out) == 0
    model = read_file(out / "model.safetensors")[1]["model"]["denoiser"]
    assert model["network"]["type"] == "SpectralNet"
    assert model["network"]["condition_features"] == 2
    assert model["space"]["spectrum"]["type"] == "EmpiricalSpectrum"
    # the noise has the spectrum of the data, so their relative deviation is 1 but for modes at the floor
    assert model["sigma_data"] == pytest.approx(1, abs=0.01)
    assert run("sample", out, "--simulate", 3, "--n", 3, "--out", tmp_path / "s") == 0
    assert json.loads((tmp_path / "s" / "posterior.json").read_text())["settings"]["method"] == "amortised"
    capsys.readouterr()
    assert run("sample", out, "--n", 3, "--out", tmp_path / "t") == 2
    assert "is told what was observed; give --data FILE" in capsys.readouterr().err
    assert run("train", "--data", source, "--objective", "SpectralDenoising", "--out", tmp_path / "no") == 2
    assert "space: SpectralDenoising is for functions" in capsys.readouterr().err


# -- invert ------------------------------------------------------------------------------------------------------------

LINEAR = ["--observe", "{type: Points, locations: [0.3, 0.6]}", "--grid", "[16]", "--noise.std", 0.2]


@pytest.mark.parametrize("method", ["pcn", "langevin", "tempered", "twisted"])
def test_invert_meets_the_closed_form(tmp_path, method):
    """Gap of the posterior mean in deviations, and ratio of deviations, over 300 effective draws or more: 4 standard
    errors are .23, and .16 for the ratio; particles have fewer, and the sampler's own error."""
    out = tmp_path / "o"
    sizes = {"pcn": ["--steps", 300], "langevin": ["--steps", 150]}.get(method, ["--particles", 200])
    assert run("invert", *LINEAR, "--method", method, *sizes, "--seed", 1, "--out", out) == 0
    about = json.loads((out / "posterior.json").read_text())
    words = dict(about["facts"])["closed form"]
    gap, ratio = float(words.split()[3]), float(words.split(", deviations ")[1].split()[0])
    assert gap < 0.3
    assert ratio == pytest.approx(1, abs=0.2)
    if "log_evidence" in about:
        exact = float(words.rsplit(" ", 1)[1])
        assert about["log_evidence"] == pytest.approx(exact, abs=0.3)
    else:
        assert all(q["rhat"] < 1.05 for q in about["quantities"])


def test_invert_refuses_a_step_that_would_be_biased(tmp_path, capsys):
    flags = ["invert", "--method", "langevin", "--informed", "false", "--step", 0.5, "--steps", 40]
    assert run(*flags, "--out", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert said.startswith("undrift: step: at iteration 0, gamma b_max = 0.5 x")
    assert "the scheme is not stable. Give --step 0.00" in said


def test_invert_ranks_truths(tmp_path):
    out = tmp_path / "o"
    assert run("invert", *LINEAR, "--steps", 30, "--calibrate", 20, "--out", out) == 0
    calibration = json.loads((out / "posterior.json").read_text())["calibration"]
    assert calibration["experiments"] == 20
    assert all(sum(s["histogram"]) == 20 and s["uniformity"] > 1e-4 for s in calibration["scalars"])
    assert "Calibration" in (out / "report.html").read_text()


def test_invert_takes_a_run_as_the_prior_on_a_finer_grid(folder, tmp_path, capsys):
    out = tmp_path / "o"
    sizes = ["--method", "langevin", "--steps", 40, "--chains", 4]
    flags = [folder / "functions.safetensors", "--grid", "[24]", *sizes, "--out", out]
    assert run("invert", *flags) == 0
    assert PosteriorRecord.load(out).mean.shape == (24,)
    capsys.readouterr()
    for wrong, said in (
        ([folder / "images.safetensors"], "run: "),
        ([folder / "functions.safetensors", "--method", "pcn"], "method: pcn accepts by the prior's density"),
        ([folder / "functions.safetensors", "--method", "tempered"], "moves: tempering a run needs moves"),
        (["--step", 0.1], "step: is that of --method langevin"),
        (["--grid", "[8,8]"], "grid: the prior has 1 axes"),
        (["--prior", "FunctionSpace", "--prior.spectrum", "{type: Matern, alpha: 0.4}"], "prior.spectrum"),
    ):
        code = run("invert", *wrong, "--out", tmp_path / "no")
        assert code == 2, wrong
        err = capsys.readouterr().err
        assert err.startswith(f"undrift: {said}") or "not trace class" in err, err


def test_noise_of_the_data_is_not_that_of_the_sampler(folder, tmp_path):
    out = tmp_path / "o"
    flags = [folder / "images.safetensors", "--truth", folder / "truth.npz", "--observe", "Identity", *NOISE]
    assert run("sample", *flags, "--method", "dps", "--n", 1, "--sampler.steps", 2, "--seed", 3, "--out", out) == 0
    record = PosteriorRecord.load(out)
    noise = (record.y - record.truth) / 0.5
    drawn = torch.empty(1, 1, 1, 4, 4).normal_(generator=torch.Generator().manual_seed(3))
    assert float((noise.float() - drawn[0, 0]).abs().max()) > 0.1


def test_what_invert_cannot_begin_with_is_said_before_results_are_replaced(tmp_path, capsys):
    (tmp_path / "posterior.json").write_text("kept")
    for flags, said in (
        (["--method", "twisted", "--potential", "moments"], "method: TweedieMoments: needs a linear operator"),
        (
            ["--method", "twisted", "--potential", "linearised", "--grid", "[1100]", "--observe", "Identity"],
            "potential",
        ),
        (["--method", "langevin", "--step", -1], "step: must be positive"),
        (["--method", "langevin", "--trust", 0], "trust: must be positive"),
        (["--method", "langevin", "--annealing", "{tau_start: 1, share: 1}"], "annealing: takes the whole run"),
        (["--observe", "Darcy2d"], "observe: Darcy2d does not fit events of shape (64,)"),
    ):
        assert run("invert", *flags, "--out", tmp_path, "--overwrite") == 2, flags
        assert capsys.readouterr().err.startswith(f"undrift: {said}"), flags
        assert (tmp_path / "posterior.json").read_text() == "kept"
