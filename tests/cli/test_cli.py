"""The commands, in-process on tiny networks: what they write, how they fail, and that they go on where they stopped."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from undrift.cli import main
from undrift.cli.arguments import parse, to_yaml
from undrift.cli.main import COMMANDS
from undrift.cli.train import TrainRun
from undrift.config import ConfigError, describe
from undrift.process import PSLD, VP
from undrift.report import read_npz

TINY = "{type: UNet, channels: 1, size: 8, width: 8, multipliers: [1, 1], attention: false}"
STEPS = ["--train.steps", "3", "--train.batch", "16", "--train.log_every", "1", "--progress", "false"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A trained (barely) denoiser of digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--data", "Digits", "--network", TINY, *STEPS, "--out", str(out), "--samples", "4"]) == 0
    return out


def test_train_leaves_a_complete_folder(run_folder):
    for name in ("config.yaml", "metrics.jsonl", "samples.npz", "samples.png", "model.safetensors", "report.html"):
        assert (run_folder / name).stat().st_size > 0, name
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["train"]["steps"] == 3
    assert config["network"]["width"] == 8
    assert [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    provenance = json.loads((run_folder / "run.json").read_text())
    assert provenance["command"][:2] == ["undrift", "train"]
    assert "undrift train" in (run_folder / "report.html").read_text()


def test_the_written_configuration_repeats_the_run(run_folder, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(run_folder / "config.yaml"), "--out", str(again)]) == 0
    first, second = (read_npz(f / "samples.npz")[0] for f in (run_folder, again))
    assert torch.equal(first, second)


def test_resume_equals_the_uninterrupted_run(run_folder, tmp_path):
    out = tmp_path / "halves"
    flags = ["train", "--network", TINY, *STEPS, "--samples", "4", "--out", str(out)]
    assert main([*flags, "--train.steps", "1"]) == 0
    assert main([*flags, "--resume"]) == 0
    assert torch.equal(read_npz(run_folder / "samples.npz")[0], read_npz(out / "samples.npz")[0])


def test_noise_matching_trains_all_channels_of_one_process(tmp_path, capsys):
    out = tmp_path / "psld"
    network = TINY.replace("channels: 1", "channels: 2")
    flags = ["--objective", "NoiseMatching", "--process", "PSLD", "--network", network, *STEPS, "--samples", "2"]
    assert main(["train", *flags, "--out", str(out)]) == 0
    assert main(["sample", "--run", str(out), "--process", "VP"]) == 2
    assert "predicts the noise of PSLD and of no other process" in capsys.readouterr().err


def test_sample_writes_the_data_range_settings_and_a_picture(run_folder, tmp_path):
    out = tmp_path / "s"
    flags = ["--process", "PSLD", "--process.gamma", "0.02", "--sampler", "SSCS", "--sampler.steps", "4"]
    call = [
        "sample",
        "--run",
        str(run_folder),
        *flags,
        "--n",
        "5",
        "--seed",
        "3",
        "--progress=false",
        "--out",
        str(out),
    ]
    assert main(call) == 0
    x, settings = read_npz(out / "samples.npz")
    assert x.shape == (5, 1, 8, 8)
    assert settings["process"]["gamma"] == 0.02
    assert settings["calls"] == 4
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--overwrite"]) == 0
    assert torch.equal(x, read_npz(out / "samples.npz")[0]), "the same seed gives the same samples"


def test_evaluate_measures_real_data_as_near_and_noise_as_far(run_folder, tmp_path, capsys):
    from undrift.train import Digits

    train = Digits("train").load().x
    values = {}
    for name, x in (("real", train[:100]), ("noise", torch.randn(100, 1, 8, 8))):
        path = tmp_path / name / "samples.npz"
        path.parent.mkdir()
        np.savez(path, x=x.numpy())
        extra = ["--run", str(run_folder), "--likelihood", "1", "--rtol", "0.02"] if name == "real" else []
        assert main(["evaluate", "--samples", str(path), "--points", "100", *extra]) == 0
        measures = json.loads((path.parent / "evaluation.json").read_text())["measures"]
        values[name] = {m["name"]: float(m["value"]) for m in measures}
    for measure in values["noise"]:
        assert values["real"][measure] < values["noise"][measure], measure
    assert values["real"]["median distance to the nearest training point"] == 0, "a copy is seen to be one"
    assert np.isfinite(values["real"]["bits per dimension"])
    assert "bits per dimension" in capsys.readouterr().out


COMPARE = ["--processes", "[VP, FlowMatching]", "--samplers", "[SSCS, Ancestral]", "--calls", "[2, 3]", "--n", "80"]


def test_compare_resumes_and_names_what_does_not_apply(run_folder, tmp_path, capsys):
    out = tmp_path / "compare"
    call = ["compare", "--run", str(run_folder), *COMPARE, "--repeats", "2", "--out", str(out)]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "left out: FlowMatching with SSCS" in printed
    rows = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    assert [(r["process"], r["sampler"], r["calls"]) for r in rows] == [
        *[("VP", s, c) for s in ("SSCS(order=1)", "Ancestral") for c in (2, 3)],
        *[("FlowMatching", "Ancestral", c) for c in (2, 3)],
    ]
    assert all(r["std_error"] > 0 for r in rows)
    # One cell is lost and one is cut short, as by kill -9: only these are computed again, to the same values.
    lines = (out / "comparison.jsonl").read_text().splitlines()
    (out / "comparison.jsonl").write_text("\n".join([*lines[:4], lines[4][:50]]))
    assert main(call) == 0
    assert sum(line.startswith("[") for line in capsys.readouterr().out.splitlines()) == 2
    again = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    assert [r["distance"] for r in again] == [r["distance"] for r in rows]
    # Another seed is another question: its report shows its own cells alone, and the old ones stay.
    assert main([*call, "--seed", "1"]) == 0
    assert len((out / "comparison.jsonl").read_text().splitlines()) == 2 * len(rows)
    assert (out / "report.html").read_text().count('scope="row"') == 3 + 2, "three pairs, two checks for copies"


# -- configuration -----------------------------------------------------------------------------------------------------


def test_printed_configuration_is_complete_and_reads_back(tmp_path, capsys):
    flags = ["--process", "PSLD", "--process.gamma", "0.02", "--train.lr=1e-3", "--data", "Ring", "--data.n", "50"]
    assert main(["train", *flags, "--print-config"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    config = yaml.safe_load(text)
    assert config["process"]["gamma"] == 0.02
    assert config["process"]["nu"] == PSLD().nu
    assert config["train"]["lr"] == 1e-3


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_defaults_read_back(name):
    required = {
        "sample": ["--run", "x"],
        "evaluate": ["--samples", "x"],
        "compare": ["--run", "x"],
        "report": ["--run", "x"],
    }
    run, _ = parse(COMMANDS[name], required.get(name, []))
    from undrift.config import build

    assert describe(build(yaml.safe_load(to_yaml(run)), COMMANDS[name])) == describe(run)


def test_a_flag_overrides_the_file_and_a_name_starts_from_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("process: {type: PSLD, gamma: 0.05}\ntrain: {steps: 7}\n")
    run, _ = parse(TrainRun, ["--config", str(file), "--train.batch", "9", "--process.nu", "5"])
    assert (run.train.steps, run.train.batch, run.process.gamma, run.process.nu) == (7, 9, 0.05, 5.0)
    run, _ = parse(TrainRun, ["--config", str(file), "--process", "VP"])
    assert describe(run.process) == describe(VP())
    run, _ = parse(TrainRun, ["--data", "Dequantised", "--data.source.split", "test"])
    assert (run.data.source.split, run.data.bins) == ("test", 256)  # what lies deeper starts from its default too


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_lists_every_key(name, capsys):
    from undrift.config import schema

    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for key in schema(COMMANDS[name]):
        assert f"--{key}  " in text
    if name == "train":
        assert "PSLD  gamma=0.01" in text


# -- wrong input -------------------------------------------------------------------------------------------------------


def _pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return path


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


BAD = {
    "no such command": (lambda p, r: ["fit"], "unknown command 'fit'; one of train, sample"),
    "a word that is no flag": (lambda p, r: ["train", "digits"], "'digits': expected a flag"),
    "a flag without value": (lambda p, r: ["train", "--out"], "--out: needs a value"),
    "unknown key": (lambda p, r: ["train", "--trian.steps", "5"], "trian: unknown key (did you mean 'train'?)"),
    "misspelt process key": (
        lambda p, r: ["train", "--process", "PSLD", "--process.gama", "1"],
        "process.gama: unknown key (did you mean 'gamma'?); PSLD takes gamma, nu",
    ),
    "unknown process": (
        lambda p, r: ["train", "--process", "PSLDD"],
        "process.type: unknown 'PSLDD' (did you mean 'PSLD'?)",
    ),
    "bad type": (lambda p, r: ["train", "--train.steps", "many"], "train.steps: expected a whole number, got 'many'"),
    "negative steps": (lambda p, r: ["train", "--train.steps", "-5"], "steps must be at least 1, got -5"),
    "value outside a process's range": (
        lambda p, r: ["train", "--process", "PSLD", "--process.gamma", "-1"],
        "process: PSLD: gamma must",
    ),
    "no such file of data": (
        lambda p, r: ["train", "--data", "Npz", "--data.path", str(p / "none.npz")],
        "no such file or folder",
    ),
    "batch larger than the data": (
        lambda p, r: ["train", "--data", "{type: Ring, n: 10}", "--out", str(p / "o")],
        "batch is 128, but ring-8 has 10 points",
    ),
    "noise matching without a process": (
        lambda p, r: ["train", "--objective", "NoiseMatching"],
        "process: NoiseMatching learns the noise of one process",
    ),
    "network of another shape": (
        lambda p, r: ["train", "--network", "{type: MLP, features: 3}", "--out", str(p / "o")],
        "network: does not fit digits-train, points of shape (1, 8, 8)",
    ),
    "a run is there": (
        lambda p, r: ["train", "--network", TINY, *STEPS, "--out", str(r)],
        "already holds a run (last.safetensors",
    ),
    "resume nothing": (lambda p, r: ["train", "--resume", "--out", str(p / "o")], "holds no run to resume"),
    "resume with other settings": (
        lambda p, r: ["train", "--network", TINY, *STEPS, "--train.lr", "0.5", "--resume", "--out", str(r)],
        "lr: 0.001 -> 0.5",
    ),
    "no such configuration file": (lambda p, r: ["train", "--config", str(p / "none.yaml")], "--config: cannot read"),
    "configuration that is not YAML": (
        lambda p, r: ["train", "--config", str(_text(p / "a.yaml", "data: [1"))],
        "a.yaml is not YAML",
    ),
    "unknown key in a file": (
        lambda p, r: ["train", "--config", str(_text(p / "b.yaml", "train:\n  step: 3\n"))],
        "train.step: unknown key (did you mean 'steps'?)",
    ),
    "no such checkpoint": (lambda p, r: ["sample", "--run", str(p / "none")], "does not exist"),
    "a folder without a model": (lambda p, r: ["sample", "--run", str(p)], "holds no model.safetensors"),
    "a pickle as a checkpoint": (lambda p, r: ["sample", "--run", str(_pickle(p / "m.pt"))], "pickle"),
    "a sampler that does not apply": (
        lambda p, r: ["sample", "--run", str(r), "--process", "VE", "--sampler", "SSCS"],
        "sampler: SSCS splits off a stationary process, and VE is not",
    ),
    "no steps": (
        lambda p, r: ["sample", "--run", str(r), "--sampler", "SSCS", "--sampler.steps", "0"],
        "steps must be at least 1",
    ),
    "no samples": (lambda p, r: ["sample", "--run", str(r), "--n", "0"], "n: expected at least 1, got 0"),
    "a class for a network without": (lambda p, r: ["sample", "--run", str(r), "--y", "3"], "takes no classes, got 3"),
    "data of another shape": (
        lambda p, r: ["compare", "--run", str(r), "--data", "Ring", "--holdout", "null"],
        "data: points of ring-8 have shape (2,)",
    ),
    "samplers that apply nowhere": (
        lambda p, r: ["compare", "--run", str(r), "--processes", "[VE]", "--samplers", "[SSCS]"],
        "samplers: SSCS(order=1) applies to none of the processes",
    ),
    "a list where one is needed": (lambda p, r: ["compare", "--run", str(r), "--calls", "5"], "calls: expected a list"),
    "no file of samples": (lambda p, r: ["evaluate", "--samples", str(p / "x.npz")], "x.npz: no such file"),
    "likelihood without a model": (
        lambda p, r: ["evaluate", "--samples", "x.npz", "--likelihood", "3"],
        "run: the likelihood is the model's",
    ),
    "a report of nothing": (lambda p, r: ["report", "--run", str(p)], "holds nothing of a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_named_and_exits_with_status_2(case, run_folder, tmp_path, capsys):
    call, message = BAD[case]
    before = {f: f.stat().st_mtime_ns for f in run_folder.rglob("*")}
    assert main(call(tmp_path, run_folder)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 or "settings it was started with" in captured.err, "one message"
    assert {f: f.stat().st_mtime_ns for f in run_folder.rglob("*")} == before, "nothing was touched"


def test_the_required_first_key_may_stand_alone(run_folder):
    short, long = (parse(COMMANDS["sample"], words)[0] for words in (["x", "--n", "3"], ["--run", "x", "--n", "3"]))
    assert describe(short) == describe(long)
    assert main(["report", str(run_folder)]) == 0


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="either resume or overwrite"):
        TrainRun(resume=True, overwrite=True)


# -- as a program ------------------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-m", "undrift.cli"]


def test_errors_show_no_traceback():
    done = subprocess.run([*PROGRAM, "train", "--process", "VPP"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("undrift: process.type: unknown 'VPP'")
    assert done.stdout == ""


def test_interrupt_saves_and_exits_with_status_130(tmp_path):
    out = tmp_path / "long"
    flags = ["train", "--network", TINY, *STEPS, "--train.steps", "1000000", "--out", str(out)]
    program = subprocess.Popen(
        [*PROGRAM, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert program.poll() is None, program.communicate()
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    printed, errors = program.communicate(timeout=60)
    assert program.returncode == 130, errors
    assert "--resume" in printed
    assert (out / "last.safetensors").exists()
