"""Generated results: complete, and noticed when out of date."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from models.base.errors import NestlingError
from models.checkpoint.family import Member
from train.report.results import fill_readme, main, read_result, stale_files

ROOT = Path(__file__).parents[3]
BLOCK = "<!-- results:begin tiny -->\n<!-- results:end -->"


@pytest.fixture
def content(members: list[Member]) -> dict[str, Any]:
    speed = [
        {"engine": "nestling", "mode": "plain", "dtype": "fp32", "tokens_per_second": 200.0},
        {
            "engine": "nestling",
            "mode": "speculative",
            "draft": "S",
            "dtype": "fp32",
            "tokens_per_second": 300.0,
        },
    ]
    return {
        "title": "A tiny family",
        "command": "nestling train --config configs/tiny.yaml",
        "card": {
            "commit": "0123456789abcdef",
            "hardware": {"cpu": "Some CPU", "gpu": None},
            "date": "2025-11-24T10:00",
        },
        "members": [dataclasses.asdict(member) for member in members],
        "speed": speed,
    }


@pytest.fixture
def root(tmp_path: Path, content: dict[str, Any]) -> Path:
    """A repository with one result that nothing was generated from."""
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/tiny.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(f"# A project\n\n{BLOCK}\n\nThe end.\n")
    return tmp_path


def names(root: Path, stale: dict[Path, str]) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in stale)


def test_no_number_in_this_repository_was_typed_by_hand() -> None:
    assert names(ROOT, stale_files(ROOT)) == []


def test_writing_makes_everything_current(root: Path) -> None:
    assert names(root, stale_files(root)) == ["README.md", "docs/results/tiny.md", "docs/results/tiny.svg"]
    assert main(["--root", str(root)]) == 0
    assert stale_files(root) == {}
    assert main(["--check", "--root", str(root)]) == 0


def test_check_names_what_is_out_of_date_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--root", str(root)]) == 1
    assert "tiny.svg is out of date" in capsys.readouterr().out
    assert not (root / "docs/results/tiny.md").exists()


def test_the_readme_gets_picture_table_and_machine_and_keeps_the_rest(root: Path) -> None:
    main(["--root", str(root)])
    text = (root / "README.md").read_text()
    assert text.startswith("# A project\n\n<!-- results:begin tiny -->\n")
    assert text.endswith("<!-- results:end -->\n\nThe end.\n")
    for part in (
        "](docs/results/tiny.svg)",
        "| nestling | speculative | S | fp32 | 300.0 | 1.50× |",
        "A tiny family, Some CPU, commit 0123456789ab, 2025-11-24.",
        "(docs/results/tiny.md)",
    ):
        assert part in text


def test_the_page_names_the_command_and_the_whole_card(root: Path) -> None:
    main(["--root", str(root)])
    text = (root / "docs/results/tiny.md").read_text()
    for part in (
        "# A tiny family",
        "](tiny.svg)",
        "| XL | full | 3.70M | 1.770 |",
        "| nestling | speculative | S | fp32 | 300.0 | 1.50× |",
        "nestling train --config",
        "| hardware.cpu | Some CPU |",
    ):
        assert part in text


@pytest.mark.parametrize("file", ["README.md", "docs/results/tiny.md"])
def test_a_number_changed_by_hand_is_noticed(root: Path, file: str) -> None:
    main(["--root", str(root)])
    path = root / file
    path.write_text(path.read_text().replace("300.0", "310.0"))
    assert names(root, stale_files(root)) == [file]


def test_a_new_measurement_makes_text_and_picture_stale(root: Path, content: dict[str, Any]) -> None:
    main(["--root", str(root)])
    content["members"][0]["loss"] = 1.0
    content["speed"][1]["tokens_per_second"] = 400.0
    (root / "docs/results/tiny.json").write_text(json.dumps(content))
    assert names(root, stale_files(root)) == ["README.md", "docs/results/tiny.md", "docs/results/tiny.svg"]


def test_a_picture_drawn_with_other_fonts_is_current(root: Path) -> None:
    main(["--root", str(root)])
    picture = root / "docs/results/tiny.svg"
    picture.write_text(picture.read_text().replace('width="', 'width="1'))
    assert stale_files(root) == {}


def test_what_training_costs_is_a_table_too(root: Path, content: dict[str, Any]) -> None:
    rows = [
        {"engine": "nestling", "mode": "full", "tokens_per_second": 8305.4, "step_ratio": 1.0, "mfu": 0.472}
    ]
    rows.append({"engine": "transformers", "mode": "full", "tokens_per_second": 6231.0, "step_ratio": 1.329})
    alone = {key: content[key] for key in ("title", "command", "card")} | {"training": rows}
    (root / "docs/results/tiny.json").write_text(json.dumps(alone))
    assert main(["--root", str(root)]) == 0
    for file in ("README.md", "docs/results/tiny.md"):
        text = (root / file).read_text()
        assert "| engine | trains | tokens/s | x full | MFU |" in text
        assert "| transformers | full | 6,231 | 1.33 | - |" in text


def test_speeds_alone_have_no_picture(root: Path, content: dict[str, Any]) -> None:
    del content["members"]
    (root / "docs/results/tiny.json").write_text(json.dumps(content))
    assert names(root, stale_files(root)) == ["README.md", "docs/results/tiny.md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "has no title"),
        ({"card": None, "command": None}, "has no command, no card"),
        ({"members": [], "speed": []}, "has no members, speed, training or alone"),
        ({"members": [{"name": "S"}]}, "is not a measured member"),
        ({"training": "abc"}, "has no list of objects as training"),
        ({"speed": [3]}, "has no list of objects as speed"),
    ],
)
def test_a_result_that_lacks_something_is_named(
    root: Path, content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    path = root / "docs/results/tiny.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(NestlingError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_block_without_a_result_or_an_end_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NestlingError, match=r"there is no docs/results/tiny\.json"):
        fill_readme(BLOCK, {})
    with pytest.raises(NestlingError, match="has no `<!-- results:end -->`"):
        fill_readme("<!-- results:begin tiny -->", {})
    (root / "README.md").write_text("<!-- results:begin other -->\n<!-- results:end -->")
    assert main(["--root", str(root)]) == 1
    assert capsys.readouterr().err.startswith("error: README.md: results:begin other")
