"""Write the report as one HTML file: it loads nothing from elsewhere, and escapes every text of the data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from library.data.image_io import read_image
from library.data.report.findings import BUCKET_COLUMNS, KINDS, SEVERITIES, Finding, ImageRow, Report
from library.data.report.looks import THREADS
from library.errors import UserError
from library.plain_text import printable

#: findings of a kind, images and tags on the page; the JSON report has all
MOST_FINDINGS, MOST_IMAGES, MOST_TAGS = 200, 500, 300
#: images of one finding, such as a group of equal files
MOST_OF_FINDING = 12

THUMBNAIL = 160  # pixels of the longer side
_QUALITY = 75

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5em 0 1.5em}th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left;
vertical-align:top;overflow-wrap:anywhere}th{background:#f2f4f7}td.n{text-align:right;white-space:nowrap}
.error{color:#b00020;font-weight:600}.warning{color:#8a5a00;font-weight:600}.info{color:#225c8a}
figure{display:inline-block;margin:0 .6em .4em 0;max-width:170px;font-size:12px;overflow-wrap:anywhere}
img{display:block;max-width:160px}summary{cursor:pointer;font-size:1.2em;margin:.6em 0}q{background:#ffe9e0}
.note{background:#fff6d6;padding:.5em .8em;border-left:4px solid #d9a400}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181a1d}th{background:#26292e}td,th{border-color:#444}
.error{color:#ff7b8a}.warning{color:#f0b849}.info{color:#7cc0f0}q{background:#5a3020}.note{background:#3a3315}}
"""


def make_page(report: Report, *, max_thumbnails: int) -> str:
    """Return the whole file's text.

    Args:
        max_thumbnails: thumbnails at most; the page says how many it left out.
    """
    kept = {row.path: row for row in report.images}
    wanted = list(dict.fromkeys(_images_on_page(report)))
    thumbnails = _make_thumbnails(wanted[:max_thumbnails], kept)
    notes = list(report.notes)
    if len(wanted) > max_thumbnails:
        notes.append(
            f"{len(wanted) - max_thumbnails} small images were left out, as --max_thumbnails is {max_thumbnails}."
        )
    verdict = ", ".join(f"{report.count(severity)} {severity}s" for severity in SEVERITIES).replace("infos", "remarks")
    title = f"Data of {report.source}"
    parts = [
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        # the page itself loads nothing, whatever is in captions
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1><p><b>{verdict}</b></p>",
        *(f"<p class=note>{_text(note)}</p>" for note in notes),
        _table((), ((_text(name), _text(value)) for name, value in report.summary)),
        *(_kind(kind, findings, thumbnails) for kind, findings in report.by_kind().items()),
        _buckets(report),
        _images(report, thumbnails),
        _tags(report),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _text(value: object) -> str:
    return escape(printable(str(value)), quote=True)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; columns are plain text, cells are HTML."""
    head = "<tr>" + "".join(f"<th>{_text(column)}</th>" for column in columns) + "</tr>" if columns else ""
    body = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{''.join(body)}</table>"


# ---- parts ----


def _kind(kind: str, findings: Sequence[Finding], thumbnails: Mapping[Path, str]) -> str:
    rows = []
    for finding in findings[:MOST_FINDINGS]:
        detail = f" <q>{_text(finding.detail)}</q>" if finding.detail else ""
        images = "".join(_figure(path, thumbnails) for path in finding.images[:MOST_OF_FINDING])
        more = len(finding.images) - MOST_OF_FINDING
        images += f"and {more} more" if more > 0 else ""
        what = f"<span class={finding.severity}>{finding.severity}</span>: {_text(finding.text)}{detail}"
        rows.append((images, what) if finding.images else ("", what))
    rest = _more(len(findings) - MOST_FINDINGS)
    open_ = " open" if any(finding.severity != "info" for finding in findings) else ""
    return (
        f"<details{open_}><summary>{_text(KINDS[kind])}: {len(findings)}</summary>"
        f"{_table(('images', 'what'), rows)}{rest}</details>"
    )


def _figure(path: Path, thumbnails: Mapping[Path, str]) -> str:
    image = f'<img src="{thumbnails[path]}" alt="">' if path in thumbnails else ""
    return f'<figure title="{_text(path)}">{image}<figcaption>{_text(path.name)}</figcaption></figure>'


def _more(count: int) -> str:
    return f"<p>and {count} more; the report of --json has all</p>" if count > 0 else ""


def _buckets(report: Report) -> str:
    return f"<h2>Buckets</h2>{_table(BUCKET_COLUMNS, (row.cells for row in report.buckets))}"


def _most_cut(report: Report) -> list[ImageRow]:
    return sorted(report.images, key=lambda row: -row.crop_loss)[:MOST_IMAGES]


def _images(report: Report, thumbnails: Mapping[Path, str]) -> str:
    paired = any(row.conditioning for row in report.images)
    rows = (
        (
            _figure(row.path, thumbnails),
            *([_figure(row.conditioning, thumbnails) if row.conditioning else ""] if paired else []),
            f"{row.dataset}.{row.subset}",
            f"{row.size[0]}x{row.size[1]}",
            f"{row.bucket[0]}x{row.bucket[1]}",
            f"{row.scale:.2f}",
            f"{row.crop_loss:.1%}",
            "" if row.tokens is None else str(row.tokens),
            _text(row.caption),
        )
        for row in _most_cut(report)
    )
    columns = (
        "image",
        *(("mask or conditioning image",) if paired else ()),
        "dataset.subset",
        "size",
        "bucket",
        "resized by",
        "cut off",
        "tokens",
        "caption",
    )
    more = _more(len(report.images) - MOST_IMAGES)
    return (
        "<details><summary>All images, those that lose most by the crop first</summary>"
        "<p>What the frame in a small image holds is what is trained on, unless crops move.</p>"
        f"{_table(columns, rows)}{more}</details>"
    )


def _tags(report: Report) -> str:
    if not report.tags:
        return ""
    once = sum(count == 1 for count in report.tags.values())
    rows = ((_text(tag), str(count)) for tag, count in list(report.tags.items())[:MOST_TAGS])
    return (
        f"<details><summary>Tags: {len(report.tags)}, {once} of them in one caption only</summary>"
        f"{_table(('tag', 'captions'), rows)}{_more(len(report.tags) - MOST_TAGS)}</details>"
    )


# ---- small images ----


def _images_on_page(report: Report) -> Iterable[Path]:
    """Return images in order of importance: those of findings first."""
    for findings in report.by_kind().values():
        for finding in findings[:MOST_FINDINGS]:
            if finding.kind != "unreadable":
                yield from finding.images[:MOST_OF_FINDING]
    for row in _most_cut(report):
        yield row.path
        if row.conditioning is not None:
            yield row.conditioning


def _make_thumbnails(paths: Sequence[Path], rows: Mapping[Path, ImageRow]) -> dict[Path, str]:
    """Return data URIs; unreadable images have none."""
    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda path: thumbnail(path, rows.get(path)), paths))
    return {path: uri for path, uri in zip(paths, made, strict=True) if uri is not None}


def thumbnail(path: Path, row: ImageRow | None) -> str | None:
    """Return a small JPEG as data URI, with a frame around the crop; ``None`` if the image cannot be read."""
    try:
        image = Image.fromarray(read_image(path))
    except UserError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    if row is not None and row.crop_loss > 0:
        width, height = image.size
        ratio = row.bucket[0] / row.bucket[1]
        kept_width, kept_height = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        frame = (left, top, left + kept_width - 1, top + kept_height - 1)
        ImageDraw.Draw(image).rectangle(frame, outline=(255, 60, 60))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
