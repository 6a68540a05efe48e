"""One self-contained HTML page about a run, or a comparison of several.

The charts are Vega-Lite, drawn in the browser by a bundle that the page carries: it asks no network for
anything, follows the reader's light or dark theme, and fits a phone.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from train.report.read import Run, read_runs
from train.report.write import write_text


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page.

    Args:
        runs: run folders; one is shown by itself, several are compared.
        out: the file; one that stands there is replaced, whole or not at all.

    Returns:
        `out`.

    Raises:
        UsageError: if a run does not exist or `out` is a folder.
        NestlingError: if a folder is not a run's, or holds nothing to show.
    """
    return write_text(Path(out), render(read_runs(runs)))


def render(runs: Sequence[Run]) -> str:
    """Return the page as text, the same for the same runs."""
    # Charts take a second to import: they wait until the runs were read and found good.
    import altair
    import vl_convert

    from train.report.sections import sections

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script = vl_convert.javascript_bundle(_resource("page.js"), vl_version=version)
    return Template(_resource("page.html")).substitute(
        title=escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"),
        style=_resource("page.css"),
        body=sections(runs),
        script=script.replace("</script", "<\\/script"),
    )


def _resource(name: str) -> str:
    return files("train.report").joinpath(name).read_text(encoding="utf-8")
