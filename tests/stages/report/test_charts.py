"""stages/report/charts.py: every point is inside its chart."""

from tutor.stages.report.charts import curves, quantizations


def test_every_point_is_inside_its_chart() -> None:
    chart = curves({"training": [(1, 3.0), (2, 700.0)], "held out": [(0, 3.0), (2, 0.1)]}, 2)
    assert chart
    for line in chart["lines"]:
        for dot in line["dots"]:
            assert chart["left"] <= dot["x"] <= chart["right"]
            assert chart["top"] <= dot["y"] <= chart["floor"]
    figures = {"F16": {"size": 9, "kl": 0.0}, "Q8_0": {"size": 5, "kl": 1e-9}, "Q4_0": {"size": 4.9, "kl": 2.0}}
    drawn = quantizations(figures, 0.01, "Q8_0")
    for dot in drawn["dots"]:
        assert drawn["left"] <= dot["x"] <= drawn["right"]
        assert drawn["top"] <= dot["y"] <= drawn["floor"]
    assert curves({"training": [(1, 3.0)]}) is None
