"""Print the report on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from library.data.report.findings import BUCKET_COLUMNS, KINDS, SEVERITIES, Finding, Report
from library.plain_text import visible

#: findings of a kind, tags and buckets shown at most; the rest is counted
MOST_FINDINGS, MOST_TAGS, MOST_BUCKETS = 5, 20, 40
#: letters of a caption's cut-off end
_DETAIL = 120
#: columns where the output is no terminal
_WIDTH = 300

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the summary, all kinds of findings with some examples, buckets and tags."""
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(_table(f"Data of {report.source}", ("", ""), report.summary))
    for kind, findings in report.by_kind().items():
        _print_kind(console, kind, findings)
    _print_buckets(console, report)
    _print_tags(console, report)
    for note in report.notes:
        console.print(Text(f"note: {visible(note)}", style="bold"))
    verdict = ", ".join(f"{report.count(severity)} {severity}s".replace("infos", "remarks") for severity in SEVERITIES)
    worst = next((severity for severity in SEVERITIES if report.count(severity)), "info")
    console.print(Text(verdict, style=_STYLES[worst]))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    # titles and cells as Text: captions and names may hold what looks like rich's markup
    table = Table(title=Text(visible(title), style="bold"), title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _print_kind(console: Console, kind: str, findings: Sequence[Finding]) -> None:
    table = _table(f"{KINDS[kind]}: {len(findings)}", ("", "images", "what"), ())
    for finding in findings[:MOST_FINDINGS]:
        names = "\n".join(visible(str(path)) for path in finding.images[:MOST_FINDINGS])
        more = len(finding.images) - MOST_FINDINGS
        detail = finding.detail if len(finding.detail) <= _DETAIL else f"{finding.detail[:_DETAIL]} ..."
        table.add_row(
            Text(finding.severity, style=_STYLES[finding.severity]),
            Text(names + (f"\nand {more} more" if more > 0 else "")),
            Text(visible(f"{finding.text} {detail}".strip())),
        )
    console.print(table)
    if len(findings) > MOST_FINDINGS:
        console.print(f"and {len(findings) - MOST_FINDINGS} more; --html and --json name all")


def _print_buckets(console: Console, report: Report) -> None:
    rows = [row.cells for row in report.buckets[:MOST_BUCKETS]]
    console.print(_table("Buckets", BUCKET_COLUMNS, rows))
    if len(report.buckets) > MOST_BUCKETS:
        console.print(f"and {len(report.buckets) - MOST_BUCKETS} more")


def _print_tags(console: Console, report: Report) -> None:
    if not report.tags:
        return
    once = sum(count == 1 for count in report.tags.values())
    rows = [(tag, str(count)) for tag, count in list(report.tags.items())[:MOST_TAGS]]
    console.print(_table(f"Tags: {len(report.tags)}, {once} of them in one caption only", ("tag", "captions"), rows))
