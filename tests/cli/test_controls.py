"""The figure of a run's hyper-parameters: what it shows, and how."""

import math

from bolza.cli._controls import controls_figure
from bolza.report import to_png
from bolza.training import Run

STEPS = list(range(1, 101))


def run(**controls):
    return Run(control_steps=STEPS, controls=controls)


def axes_of(figure):
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas()
    figure.draw(canvas)
    return canvas.axes


def test_only_what_changes_is_drawn_settings_first_and_the_rest_is_named():
    figure = controls_figure(run(u=STEPS, momentum=[0.9] * 100, lr=[1 / k for k in STEPS]))
    assert [a.get_title() for a in axes_of(figure)] == ["learning rate", "u"]
    assert "constant: momentum" in figure.caption and figure.sketch.startswith("learning rate")
    assert controls_figure(run(lr=[0.1] * 100)) is None and controls_figure(Run()) is None


def test_an_axis_is_logarithmic_where_a_linear_one_hides_most_and_only_there():
    cosine = [0.5 + 0.5 * math.cos(math.pi * k / 100) for k in STEPS]  # ends at 0
    growing = [10.0 ** (-8 + k / 10) if k < 60 else 0.01 for k in STEPS]
    shown = axes_of(
        controls_figure(
            run(lr=[0.3 / k for k in STEPS], a=cosine, b=[float(k - 50) for k in STEPS], c=growing)
        )
    )
    assert [a.get_yscale() for a in shown] == ["log", "linear", "linear", "log"]


def test_groups_of_parameters_share_a_panel():
    figure = controls_figure(run(lr=STEPS, lr_1=[2 * k for k in STEPS], batch_size=STEPS))
    lr, batch = axes_of(figure)
    assert len(lr.lines) == 2 and [t.get_text() for t in lr.get_legend().get_texts()] == [
        "group 1",
        "group 2",
    ]
    assert batch.get_legend() is None


def test_at_most_six_panels_are_drawn_gaps_are_left_and_the_others_named():
    late = {f"reading {i}x": [math.nan] * 10 + STEPS[10:] for i in range(9)}
    figure = controls_figure(run(**late))
    assert len(axes_of(figure)) == 6
    assert "in the JSON record only: reading 6x, reading 7x, reading 8x" in figure.caption
    assert to_png(figure)[:4] == b"\x89PNG"


def test_what_a_controller_of_the_library_logs_is_said_in_words_and_nothing_is_said_of_others():
    figure = controls_figure(run(guard=STEPS, mine=STEPS))
    assert "guard: share of the update that the loss allows" in figure.caption
    assert "guard: share" in figure.sketch and "mine:" not in figure.sketch + figure.caption
