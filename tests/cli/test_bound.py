"""Training by the evidence bound and its bits per dimension, from the command line: models, pixels, errors."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
import yaml

from undrift.cli import main
from undrift.cli.arguments import parse, to_yaml
from undrift.cli.evaluate import EvaluateRun
from undrift.cli.train import TrainRun
from undrift.config import ConfigError, build, describe
from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.measure import elbo, log_likelihood
from undrift.pixels import quantise
from undrift.process import LearnedProcess, LinearProcess
from undrift.report import Tones, read_npz
from undrift.train import Dequantised, Digits, EvidenceBound, load, notes

DATA = "{type: Dequantised, transform: logit, bins: 17}"
TEST = "{type: Dequantised, source: {type: Digits, split: test}, transform: logit, bins: 17}"
TINY = "{type: UNet, channels: 1, size: 8, width: 8, multipliers: [1, 1], attention: false}"
# Full matrices: a description that came back changed in its last bits would not resume.
LEARNED = "{type: learned, D: [[0.7, 0.1], [0.1, 0.3]], learn: [Q, D, clock], knots: 3}"
STEPS = ["--train.batch", "16", "--train.log_every", "1", "--train.warmup", "1", "--train.process_lr", "0.05"]
TRAIN = ["--data", DATA, "--objective", "EvidenceBound", *STEPS, "--samples", "4", "--progress", "false"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A denoiser and a process, trained together for four steps."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    call = ["train", *TRAIN, "--network", TINY, "--process", LEARNED, "--train.steps", "4", "--out", str(out)]
    assert main(call) == 0
    return out


def test_a_learned_process_is_trained_and_saved_with_the_denoiser(run_folder):
    model = load(run_folder / "model.safetensors")
    assert isinstance(model, Diffusion)
    assert isinstance(model.process, LearnedProcess)
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    begun = build(config["process"], LinearProcess)
    assert config["process"]["D"] == [[0.7, 0.1], [0.1, 0.3]], "the configuration holds where it began"
    for now, then in zip(model.process.terms()[:2], begun.terms()[:2], strict=True):
        assert not torch.equal(now, then)
    assert not torch.equal(model.process.clock.log_rates, begun.clock.log_rates)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["process_gradient_norm"] > 0 for row in rows)


@pytest.mark.parametrize("kind", ["denoiser", "noise"])
def test_resume_equals_the_uninterrupted_run_to_the_bit(kind, tmp_path, monkeypatch):
    """Also where the settings are read back from the run's own config.yaml, and the process is in mid-course."""
    monkeypatch.setattr("undrift.cli.train.write_report", lambda out: out)  # takes longer than all the rest
    network = TINY if kind == "denoiser" else TINY.replace("channels: 1", "channels: 2")
    flags = [*TRAIN, "--network", network, "--process", LEARNED, "--model", kind, "--train.checkpoint_every", "1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(["train", *flags, "--train.steps", "4", "--out", str(whole)]) == 0
    assert main(["train", *flags, "--train.steps", "2", "--out", str(halves)]) == 0
    again = ["--config", str(halves / "config.yaml"), "--train.steps", "4", "--out", str(halves), "--resume"]
    assert main(["train", *again]) == 0
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    assert (whole / "last.safetensors").read_bytes() == (halves / "last.safetensors").read_bytes()
    assert torch.equal(read_npz(whole / "samples.npz")[0], read_npz(halves / "samples.npz")[0])


@pytest.mark.parametrize(
    "words", [["learned"], ["Learned"], ["LearnedProcess"], ["learned", "--process.channels", "2"]]
)
def test_a_short_name_is_the_class_at_its_defaults(words):
    run, _ = parse(TrainRun, ["--objective", "EvidenceBound", "--process", *words])
    assert describe(run.process) == describe(LearnedProcess())
    assert describe(build(yaml.safe_load(to_yaml(run)), TrainRun)) == describe(run)


def test_the_model_is_what_was_asked_for_and_the_denoiser_reaches_the_decoder():
    data = Dequantised(Digits("test"), "logit", 17).load()

    def model(**settings):
        return TrainRun(process=LearnedProcess(), **settings).new_model(data)

    for level, expected in ((1e-3, 1e-3), (0.01, 0.002)):
        made = model(objective=EvidenceBound(sigma_min=level))
        assert isinstance(made, Diffusion)
        assert isinstance(made.denoiser, NetworkDenoiser)
        assert made.denoiser.sigma_min == expected
    first = EvidenceBound(t_min=1e-9)
    made = model(objective=first)
    assert made.denoiser.sigma_min == float(made.process.sigma(1e-9).detach()) < 1e-3
    assert isinstance(model(objective=first, model="noise"), NoiseDiffusion)
    run = TrainRun(process=LearnedProcess(), objective=first)
    made = run.new_model(data)
    assert made.process is not run.process, "training in place must not move the configuration"


def test_pixels_are_noted_and_shown_as_pixels(run_folder):
    noted = notes(run_folder / "model.safetensors")
    assert noted["pixels"] == {"transform": "logit", "bins": 17, "alpha": 0.05}
    assert noted["sigma_min"] == EvidenceBound().sigma_min
    x, settings = read_npz(run_folder / "samples.npz")
    tones = Tones.read(settings)
    assert tones.pixels == noted["pixels"]
    assert torch.equal(tones(x) * 16, quantise(x, "logit", bins=17).float())
    assert not torch.allclose(tones(x), Tones(tones.low, tones.high)(x), atol=0.05), "a linear scale is another picture"


def test_bits_are_those_of_the_library_and_the_terms_add_up(run_folder, tmp_path, capsys):
    call = ["evaluate", "--run", str(run_folder), "--data", DATA, "--holdout", TEST, "--bpd", "50", "--bpd-times", "2"]
    call += ["--likelihood", "2", "--rtol", "0.2", "--progress=false"]
    assert main([*call, "--out", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    measures = {m["name"]: float(m["value"]) for m in found["measures"]}
    bits, *terms = list(measures.values())[:5]
    assert abs(bits - sum(terms)) < 3e-4, "five numbers rounded to 1e-4"

    data = Dequantised(Digits("test"), "logit", 17).load()
    generator = torch.Generator().manual_seed(0)
    y, log_det = data.pixels.draw(torch.randperm(len(data), generator=generator)[:50], generator)
    expected = elbo(load(run_folder / "model.safetensors"), y.float(), sigma_min=1e-3, samples=2, seed=0)
    value, error = expected.bits_per_dim(log_det, 17)
    assert abs(bits - value) < 1e-4
    assert found["measures"][0]["std_error"] == f"{error:.4f}"
    assert f"{value:.4f} ± {error:.4f}" in capsys.readouterr().out
    report = (tmp_path / "e" / "report.html").read_text()
    assert f"{value:.4f} ± {error:.4f}" in report

    index = torch.randperm(len(data), generator=generator.manual_seed(0))[:2]
    y, log_det = data.pixels.draw(index, generator)
    model = load(run_folder / "model.safetensors")
    flow = log_likelihood(model, y.float(), rtol=0.2, atol=0.2, seed=0).bits_per_dim(log_det, 17)
    assert abs(measures["bits per dimension, probability flow, 2 points"] - float(flow.mean())) < 1e-4


def test_samples_of_pixels_are_measured_at_the_centres_of_their_bins(tmp_path):
    """Training points with dequantisation noise of their own are copies, and are seen to be."""
    data = Dequantised(transform="logit", bins=17).load()
    y = data.draw(torch.arange(100), torch.Generator().manual_seed(0))
    np.savez(tmp_path / "samples.npz", x=y.numpy())
    call = ["evaluate", str(tmp_path / "samples.npz"), "--data", DATA, "--holdout", TEST, "--points", "60"]
    assert main(call) == 0
    measures = json.loads((tmp_path / "evaluation.json").read_text())["measures"]
    values = {m["name"]: float(m["value"]) for m in measures}
    assert values["median distance to the nearest training point"] == 0


def test_a_process_of_its_own_can_be_bounded_and_classes_do_no_harm(tmp_path):
    """A denoiser with classes, without them as in sampling, under a process that it was not trained for."""
    out = tmp_path / "classes"
    network = "{type: UNet, channels: 1, size: 8, width: 8, multipliers: [1, 1], attention: false, classes: 10}"
    flags = ["--data", DATA, "--objective", "Denoising", "--network", network, *STEPS, "--train.steps", "2"]
    assert main(["train", *flags, "--samples", "0", "--out", str(out), "--progress", "false"]) == 0
    call = ["evaluate", "--run", str(out), "--data", DATA, "--holdout", TEST, "--bpd", "20", "--progress=false"]
    assert main([*call, "--process", "CLD"]) == 0
    assert (out / "evaluate" / "config.yaml").exists()
    found = json.loads((out / "evaluate" / "evaluation.json").read_text())
    assert np.isfinite(float(found["measures"][0]["value"]))
    assert "0.002 on" in found["remarks"][0], "from the lowest level that the denoiser knows"
    assert main([*call, "--sigma_min", "0.001", "--overwrite"]) == 0
    remarks = json.loads((out / "evaluate" / "evaluation.json").read_text())["remarks"]
    assert any("down to noise level 0.002" in r for r in remarks)


BOUND = ["train", "--objective", "EvidenceBound"]
BAD = {
    "a bound of no process": (lambda r: BOUND, "process: EvidenceBound is the bound of one process"),
    "denoising learns no process": (
        lambda r: ["train", "--process", "learned"],
        "process: Denoising gives a LearnedProcess no gradient, so it would stay where it begins; train it with "
        "--objective EvidenceBound",
    ),
    "noise matching learns no process": (
        lambda r: ["train", "--process", "learned", "--objective", "NoiseMatching"],
        "process: NoiseMatching gives a LearnedProcess no gradient",
    ),
    "denoising a noise network": (
        lambda r: ["train", "--model", "noise", "--process", "VP"],
        "model: Denoising trains a model of kind denoiser, got noise; EvidenceBound trains either",
    ),
    "matching the noise with a denoiser": (
        lambda r: ["train", "--objective", "NoiseMatching", "--model", "denoiser", "--process", "VP"],
        "model: NoiseMatching trains a model of kind noise, got denoiser",
    ),
    "an unknown model": (lambda r: [*BOUND, "--model", "score"], "model: expected one of 'denoiser', 'noise'"),
    "a non-linear objective": (
        lambda r: ["train", "--objective", "LocalScoreMatching"],
        "objective: LocalScoreMatching is for non-linear processes",
    ),
    "data read in another way": (
        lambda r: ["evaluate", "--run", str(r), "--bpd", "5"],
        "holdout: the model of",
    ),
    "samples read in another way": (
        lambda r: ["evaluate", "--samples", str(r / "samples.npz")],
        "data: " + "{run}/samples.npz is of dequantised pixels, and digits-train is read in another way",
    ),
    "comparison read in another way": (lambda r: ["compare", "--run", str(r)], "data: the model of"),
    "nothing to evaluate": (lambda r: ["evaluate", "--run", str(r)], "samples: give a file of samples, or --run with"),
    "bits of no model": (lambda r: ["evaluate", "--bpd", "5"], "run: the likelihood is the model's"),
    "no times": (lambda r: ["evaluate", "--run", str(r), "--bpd", "5", "--bpd-times", "0"], "bpd_times: expected 1"),
    "a process twice": (
        lambda r: ["compare", "--run", str(r), "--processes", "[VP, VP]"],
        "processes: VP is there twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused_before_any_work(case, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call, message = BAD[case]
    before = {f: f.stat().st_mtime_ns for f in run_folder.rglob("*")}
    assert main(call(run_folder)) == 2
    assert message.replace("{run}", str(run_folder)) in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in run_folder.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_the_flag_that_an_error_gives_is_right(run_folder, tmp_path, capsys):
    """Both for a model of pixels, and for one that never heard of them."""
    call = ["evaluate", "--run", str(run_folder), "--bpd", "3", "--progress=false", "--out", str(tmp_path / "e")]
    assert main(call) == 2
    flag = capsys.readouterr().err.partition("give ")[2].strip().removesuffix(".")
    assert main([*call, *shlex.split(flag)]) == 0
    run, _ = parse(EvaluateRun, [*call[1:], *shlex.split(flag)])
    assert describe(run.holdout) == describe(Dequantised(Digits("test"), "logit", 17))

    plain = tmp_path / "plain"
    flags = ["--network", TINY, *STEPS, "--train.steps", "1", "--samples", "0", "--out", str(plain)]
    assert main(["train", *flags, "--progress", "false"]) == 0
    call = ["evaluate", "--run", str(plain), "--bpd", "3", "--progress=false"]
    capsys.readouterr()
    assert main(call) == 2
    error = capsys.readouterr().err
    assert "bits per dimension are of pixels with dequantisation noise, and digits-test has none" in error
    flag = error.partition("give ")[2].partition(", where bins")[0].replace("bins: 256", "bins: 17")
    assert main([*call, *shlex.split(flag)]) == 0
    assert "does not say that it was trained on dequantised pixels" in capsys.readouterr().out


def test_a_process_that_is_kept_may_serve_any_objective():
    run = TrainRun(process=LearnedProcess(learn=()))
    assert run.model is None
    with pytest.raises(ConfigError, match="no gradient"):
        TrainRun(process=LearnedProcess(learn=("clock",)))
