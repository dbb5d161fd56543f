"""Pictures print the names that they are given."""

import pytest
from matplotlib.figure import Figure

from dropformer.metrics.analysis.plots import save


def drawn(name):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], [0.01, 10], label=name)
    axes.set_yscale("log")
    axes.set_title(name)
    axes.set_xticks([1, 2])
    axes.set_xticklabels([name, "b"])
    axes.legend()
    return figure, axes


@pytest.mark.parametrize("name", ["a$\\bad{$", "m$odel$_x", "$\\frac$"])
def test_dollars_in_a_name_begin_no_formula(tmp_path, name):
    figure, axes = drawn(name)
    save(figure, tmp_path / "a.png")
    texts = [axes.title, axes.get_legend().get_texts()[0], axes.get_xticklabels()[0]]
    assert [text.get_text() for text in texts] == [name] * 3
    assert not any(text.get_parse_math() for text in texts)


def test_numbers_of_an_axis_stay_formulas(tmp_path):
    figure, axes = drawn("a")
    save(figure, tmp_path / "a.png")
    assert all(text.get_parse_math() for text in axes.get_yticklabels())
