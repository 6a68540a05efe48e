"""What charts show, and that everyone can see it."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint.family import Member
from models.decode.tune.predict import MAX_GAMMA, speedup
from train.report.charts import curve, family_chart, family_rows, speed_up_contour
from train.report.style import COLORS, SHAPES, SVG_STYLE, Key, digest, save_svg, styled, to_svg

LEAST_CONTRAST = 3.0  # WCAG 2.2, 1.4.11: graphical objects
PAPERS = ("#ffffff", "#14171c", "#171b20")  # of the SVG files in both themes, and of the page's dark cards


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("color", COLORS)
def test_a_colour_is_seen_on_light_and_dark_paper(color: str) -> None:
    assert min(contrast(color, paper) for paper in PAPERS) >= LEAST_CONTRAST


def test_each_series_has_a_shape_of_its_own_and_the_full_model_the_colour_of_text() -> None:
    key = Key("member", ("S", "XL", "M", "L"), full="XL")
    looks = [key.look(name) for name in key.names]
    assert looks[1][0] == "currentColor"
    assert len({color for color, _ in looks}) == len({shape for _, shape in looks}) == 4


def test_more_series_than_colours_still_have_a_look() -> None:
    key = Key("run", tuple(map(str, range(20))))
    assert {key.look(name) for name in key.names} <= set(zip(COLORS, SHAPES, strict=True))


def test_the_frontier_holds_the_members_that_no_smaller_one_beats() -> None:
    losses = {"a": (10, 2.0), "b": (20, 2.1), "c": (30, 1.9), "d": (40, None), "e": (50, 1.9)}
    members = [Member(name=n, granularity="x", parameters=p, loss=loss) for n, (p, loss) in losses.items()]
    assert [row["member"] for row in family_rows(members) if row["frontier"]] == ["a", "c"]


@pytest.mark.parametrize("speed", [1.5, 2.0, 3.0])
def test_on_a_contour_the_best_draft_length_gives_that_speed_up(speed: float) -> None:
    points = speed_up_contour(speed)
    for point in points:
        best = max(
            speedup(point["alpha"], gamma, point["fraction"], 1.0) for gamma in range(1, MAX_GAMMA + 1)
        )
        assert best == pytest.approx(speed, rel=1e-6)
    assert points[-1]["end"]
    assert points[-1]["alpha"] == pytest.approx(1.0)


def values_of(chart: Any) -> list[dict[str, Any]]:
    spec = chart.to_dict()
    return (
        list(chain.from_iterable(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]
    )


def test_the_family_chart_holds_every_member_in_two_panels(members: list[Member]) -> None:
    chart = family_chart(members)
    svg = to_svg(chart)
    assert len(chart.to_dict()["hconcat"]) == 2
    for member in members:
        assert svg.count(f">{member.name}</text>") == 2


def test_a_family_without_alpha_has_one_panel() -> None:
    members = [Member(name="XL", granularity="full", parameters=10, loss=1.0)]
    assert len(family_chart(members).to_dict()["hconcat"]) == 1


def test_an_svg_is_the_same_each_time_whatever_was_drawn_before(
    members: list[Member], tmp_path: Path
) -> None:
    rows = [{"run": "a", "member": "S", "step": 1, "tokens": tokens, "value": 2.0} for tokens in (1, 2)]
    save_svg(family_chart(members), tmp_path / "family.svg")
    to_svg(styled(curve(rows, Key("member", ("S",)), title="loss", points=True)))
    assert (tmp_path / "family.svg").read_text() == to_svg(family_chart(members))


def test_an_svg_follows_the_theme_and_names_no_other_ink(members: list[Member]) -> None:
    svg = to_svg(family_chart(members))
    assert SVG_STYLE in svg
    inks = set(re.findall(r'<text[^>]*fill="([^"]+)"', svg))
    assert inks == {"currentColor"}


def test_the_digest_tells_other_data_apart(members: list[Member]) -> None:
    assert digest(family_chart(members)) == digest(family_chart(members))
    assert digest(family_chart(members)) != digest(family_chart(members[1:]))


def test_a_curve_ends_at_its_top() -> None:
    rows = [{"run": "a", "member": "S", "step": s, "tokens": s, "value": 10.0 / s} for s in range(1, 11)]
    chart = curve(rows, Key("member", ("S",)), title="loss", points=True, top=5.0)
    domain = chart.to_dict()["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert domain == pytest.approx([0.8, 5.2])
