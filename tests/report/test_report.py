"""Parts of the report: files that are whole or not there, tables, labels, plans at a budget of calls, figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from undrift.denoise import MixtureDenoiser
from undrift.pixels import dequantise
from undrift.process import CLD, MALDA, PSLD, VE, VP, FlowMatching, LearnedProcess, LinearClock
from undrift.report import (
    JsonLines,
    Tones,
    at_calls,
    cells,
    compare,
    label,
    read_npz,
    text_table,
    write_bytes,
    write_npz,
)
from undrift.report.comparison import number, table
from undrift.report.html import Page
from undrift.report.learned import (
    add_learned_process,
    fixed_processes,
    learned_clock_figure,
    matrices_figure,
    prior_gap,
)
from undrift.report.plots import (
    comparison_figure,
    grid_image,
    kernel_figure,
    png,
    samples_figure,
    training_figure,
    walk_figure,
)
from undrift.sample import SSCS, Ancestral, Exponential, Heun, ProbabilityFlow, sample


def test_labels_say_what_differs_from_the_defaults():
    assert label(PSLD()) == "PSLD"
    assert label(PSLD(gamma=0.02)) == "PSLD(gamma=0.02)"
    assert label(VP(clock=LinearClock(0.1, 10.0))) == "VP(clock=LinearClock(beta_max=10.0))"
    assert label(Exponential(steps=7)) == label(Exponential(steps=9)) == "Exponential(order=2)"


def test_labels_of_learned_processes_hold_settings_and_not_what_was_learned():
    assert label(LearnedProcess()) == "LearnedProcess"
    assert label(LearnedProcess.random(3, seed=1)) == "LearnedProcess(channels=3)"
    assert label(LearnedProcess(start_cov=0.02, learn=("Q", "D", "start"))) == (
        "LearnedProcess(learn=['Q', 'D', 'start'])"
    )
    assert label(LearnedProcess(D=[[0.7, 0.1], [0.1, 0.3]], learn=("Q",))) == (
        "LearnedProcess(D=[[0.7, 0.1], [0.1, 0.3]], learn=['Q'])"
    )


@pytest.mark.parametrize("calls", [1, 2, 5, 10, 21])
def test_two_stage_methods_stay_within_the_budget_and_use_it(calls):
    for sampler in (Ancestral(), Exponential(), Heun(), SSCS(order=2)):
        chosen, plan = at_calls(sampler, VP(), calls)
        assert calls - 1 <= plan.calls <= calls
        assert type(chosen) is type(sampler)


def test_pairs_that_do_not_apply_are_named_with_the_reason():
    found, refused = cells([VP(), VE()], [SSCS(), ProbabilityFlow()], [3])
    assert [c.names for c in found] == [("VP", "SSCS(order=1)")]
    assert "VE is not built from (D, Q, S)" in refused["VE", "SSCS(order=1)"]
    assert "chooses its own number of calls" in refused["VP", "ProbabilityFlow"]


def test_the_standard_error_is_that_of_the_mean_over_sets():
    """The mean of each set of n draws of N(0, 1) has variance 1/n; the reported error estimates its standard error.

    With R sets the squared error has mean 1/(n R) and relative deviation sqrt(2/(R - 1)); four of them.
    """
    denoiser = MixtureDenoiser(torch.ones(1), torch.zeros(1, 1), 1.0)
    work, _ = cells([VP()], [Ancestral()], [30])
    n, repeats = 50, 64
    (row,) = compare(denoiser, work, lambda x: float(x.mean()), (1,), n=n, repeats=repeats)
    assert abs(row["std_error"] ** 2 * n * repeats - 1) < 4 * math.sqrt(2 / (repeats - 1))


def test_a_row_is_reused_only_for_the_same_question(tmp_path):
    denoiser = MixtureDenoiser.ring(modes=4, std=0.3)
    work, _ = cells([VP()], [Ancestral()], [3])
    log, said = JsonLines(tmp_path / "rows.jsonl"), []

    def ask(**changed):
        compare(
            denoiser,
            work,
            lambda x: float(x.mean()),
            (2,),
            log=log,
            say=said.append,
            **{"n": 10, "repeats": 2, **changed},
        )
        return len(said)

    assert [ask(), ask(), ask(seed=1), ask(n=11), ask(identity={"checkpoint": "b"}), ask(n=11)] == [1, 1, 2, 3, 4, 4]


def test_tables_align_and_leave_gaps_where_nothing_was_measured():
    def row(process, budget, distance, error):
        return {
            "process": process,
            "sampler": "S",
            "budget": budget,
            "calls": budget,
            "distance": distance,
            "std_error": error,
        }

    head, lines = table([row("A", 5, 1.2345, 0.031), row("A", 10, 0.5, 0.0042), row("B", 5, 1234.5, 42.0)])
    assert head == ["process", "sampler", "5 calls", "10 calls"]
    assert lines == [["A", "S", "1.234 ± 0.031", "0.5000 ± 0.0042"], ["B", "S", "1234 ± 42", "–"]]
    widths = {len(line) for line in text_table(head, lines).splitlines()}
    assert len(widths) == 1
    assert number({"distance": 2.0, "std_error": None}) == "2.000"


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "deep" / "file", b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path], "nothing half-written stays"


def test_samples_come_back_with_their_settings_and_pickles_are_refused(tmp_path):
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    path = write_npz(tmp_path / "a.npz", x, {"seed": 4, "process": {"type": "VP"}})
    back, settings = read_npz(path)
    assert torch.equal(x, back)
    assert settings == {"seed": 4, "process": {"type": "VP"}}
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a file of samples"):
        read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", y=np.zeros(3))
    with pytest.raises(ValueError, match="holds no array 'x', only y"):
        read_npz(tmp_path / "c.npz")


def test_a_grid_shows_every_pixel_in_its_place():
    import io

    from PIL import Image

    x = torch.full((3, 1, 2, 2), -1.0)
    x[1, 0, 0, 1] = 1.0
    picture = np.asarray(Image.open(io.BytesIO(grid_image(x, columns=3))))
    scale = picture.shape[1] // (3 * 2 + 2)
    small = picture[::scale, ::scale, 0]
    assert small.tolist() == [[0, 0, 128, 0, 255, 128, 0, 0], [0, 0, 128, 0, 0, 128, 0, 0]]


def test_pixels_show_as_what_they_are_whatever_the_transform():
    """0 ... 16 of one row of pixels are seventeen even shades, though their logits are far from even."""
    pixels = torch.arange(17).reshape(1, 1, 1, 17)
    for transform in ("logit", "center"):
        keys = {"transform": transform, "bins": 17, "alpha": 0.05}
        y, _ = dequantise(pixels, transform, bins=17, noise=torch.rand(1, 1, 1, 17))
        tones = Tones.read(Tones(-3.0, 3.0, keys).notes)
        assert torch.equal(tones(y), pixels.float() / 16)
    assert Tones.read({})(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 0.5, 1.0]


def _learned():
    begun = LearnedProcess(3, learn=("Q", "D", "S", "start", "clock"), knots=3)
    now = LearnedProcess.like(MALDA(), learn=begun.learn, clock=LinearClock(0.5, 8.0), knots=3)
    return begun, now


def test_the_learned_process_is_drawn_as_it_was_and_as_it_is():
    begun, now = _learned()
    figure = matrices_figure([("where it began", begun), ("learned", now)])
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [f"{m}, {stage}" for stage in ("where it began", "learned") for m in ("Q", "D", "S", "start")]
    for process, row in ((begun, figure.axes[:4]), (now, figure.axes[4:])):
        d, q, s = process.terms()
        for ax, m in zip(row, (q, d, s, process.start()), strict=True):
            assert np.array_equal(ax.images[0].get_array(), m.detach().numpy())
            written = [float(t.get_text().replace("−", "-")) for t in ax.texts]
            assert np.allclose(written, m.detach().flatten(), rtol=5e-3, atol=1e-12)
    clocks = learned_clock_figure([("where it began", begun), ("learned", now)])
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    t[0] = 1e-4
    names = [line.get_label() for line in clocks.axes[2].lines]
    assert names == ["where it began", "learned", "VP", "CLD", "MALDA"]
    assert np.allclose(clocks.axes[0].lines[1].get_ydata(), 0.5 + 7.5 * t)
    assert np.allclose(clocks.axes[1].lines[1].get_ydata(), 0.5 * t + 3.75 * t.square())
    assert np.allclose(clocks.axes[2].lines[1].get_ydata(), now.sigma(t).detach())
    assert np.allclose(clocks.axes[1].lines[2].get_ydata(), LinearClock(0.1, 10.0).integral(t))


def test_the_prior_gap_is_the_divergence_of_the_end_from_the_prior():
    """VP has z_T = a x + sqrt(1 - a^2) xi: with E x^2 = 1, KL = -ln(1 - a^2)/2, since a^2 + 1 - a^2 = 1."""
    a2 = math.exp(-float(LinearClock(0.1, 10.0).integral(torch.tensor(1.0, dtype=torch.float64))))
    assert math.isclose(prior_gap(fixed_processes()["VP"]), -0.5 * math.log1p(-a2), rel_tol=1e-9)
    begun, _ = _learned()
    assert prior_gap(begun) > 0


def test_the_section_on_the_learned_process_stands_with_and_without_its_start(monkeypatch):
    monkeypatch.setattr("undrift.report.learned.png", lambda figure: b"png")  # takes seconds
    begun, now = _learned()
    for start, expected in ((begun, 5), (None, 4)):
        page = Page("p", "l")
        add_learned_process(page, now, start)
        html = page.render()
        assert f"{now.degrees} effective degrees of freedom" in html
        assert html.count('<th scope="row"') == expected
        assert ("where it began" in html) == (start is not None)
    page = Page("p", "l")
    add_learned_process(page, LearnedProcess(1, learn=()), None)
    assert "nothing of it trained" in page.render()


def test_training_is_drawn_with_the_gradient_of_the_process_where_there_is_one():
    rows = [{"step": i, "loss": 1.0 - i, "gradient_norm": 2.0, "process_gradient_norm": 0.5 + i} for i in (1, 2, 3)]
    figure = training_figure(rows, "minus the bound")
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "minus the bound",
        "norm of the gradient",
        "norm of the process's gradient",
    ]
    assert figure.axes[2].lines[0].get_ydata().tolist() == [1.5, 2.5, 3.5]
    assert [ax.get_yscale() for ax in figure.axes] == ["symlog", "log", "log"], "a bound on a density takes both signs"
    plain = [{k: v for k, v in row.items() if k != "process_gradient_norm"} for row in rows]
    assert len(training_figure(plain).axes) == 2


def test_figures_draw_the_numbers_they_are_given():
    rows = [
        {"process": p, "sampler": s, "calls": c, "budget": c, "distance": d, "std_error": 0.1}
        for p in ("VP", "CLD")
        for s, d in (("A", 2.0), ("B", 3.0))
        for c in (5, 10)
    ]
    figure = comparison_figure(rows, "distance", floor=0.5)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["VP", "CLD"]
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    assert any(np.array_equal(y, [2.0, 2.0]) for y in drawn)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["A", "B", "held-out data (floor)"]
    kernels = kernel_figure([VP(), CLD(), MALDA(), FlowMatching()])
    assert [len(ax.lines) for ax in kernels.axes[:5]] == [2, 4, 6, 2, 4]
    assert png(kernels).startswith(b"\x89PNG")


def test_clouds_and_walks_of_points_are_drawn():
    denoiser = MixtureDenoiser.ring(modes=4, std=0.3)
    from undrift import Diffusion

    process = CLD()
    walk = sample(Diffusion(process, denoiser), 20, (2,), Ancestral(steps=6), seed=0, trajectory=True)
    figure = walk_figure(walk, process)
    assert len(figure.axes) == 2 * 7
    assert samples_figure(walk.x).startswith(b"\x89PNG")
    assert samples_figure(walk.x[:, :1]).startswith(b"\x89PNG")


def test_a_page_escapes_what_it_shows():
    page = Page("a < b", "lead & more")
    page.section("S")
    page.code("<script>alert(1)</script>")
    page.picture(b"png", 'say "x"', "<i>")
    html = page.render()
    assert "<script" not in html
    assert "a &lt; b" in html
    assert 'alt="say &quot;x&quot;"' in html
