"""The findings of a data set check, as values for the console, the page and scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.plain_text import printable

#: training would stop or learn wrong data | probably not intended | good to know
Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

#: version of the JSON report; increased when a meaning changes
JSON_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """One finding."""

    kind: str  # one of KINDS
    severity: Severity
    text: str  # one line, without the images' names where ``images`` has them
    images: tuple[Path, ...] = ()
    detail: str = ""  # a detail that may be long, such as the cut part of a caption


#: kind -> heading; the order of the report
KINDS = {
    "unreadable": "Images that cannot be read",
    "data": "Data that is missing or wrong",
    "leakage": "The same image on both sides",
    "caption_missing": "Images without a caption",
    "caption_empty": "Empty captions",
    "caption_too_long": "Captions that are cut",
    "masks": "Masks and conditioning images",
    "duplicate": "Equal files",
    "near_duplicate": "Images that look alike",
    "enlarged": "Images that are enlarged",
    "crop": "Images that lose much by the crop",
    "settings": "Settings",
    "turned": "Images turned by EXIF",
    "buckets": "Buckets with few images",
}


@dataclass(frozen=True)
class ImageRow:
    """One image as one dataset uses it."""

    path: Path
    dataset: int  # from 1
    subset: int  # from 1
    size: tuple[int, int]  # (W, H) pixels, upright
    bucket: tuple[int, int]  # (W, H)
    scale: float  # of the resize before the crop; above 1 the image is enlarged
    crop_loss: float  # share of the area that is cut off, 0 to 1
    caption: str  # as in its file
    tokens: int | None  # of the longest possible caption; None: not counted
    validation: bool = False  # held out for validation
    conditioning: Path | None = None  # its mask or conditioning image


BUCKET_COLUMNS = ("dataset", "bucket", "images", "uses an epoch", "batches", "cut off on average")


@dataclass(frozen=True)
class BucketRow:
    dataset: int  # from 1
    size: tuple[int, int]  # (W, H)
    images: int
    uses: int  # in an epoch
    batches: int
    mean_crop_loss: float  # over its images, 0 to 1

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the row as texts, for ``BUCKET_COLUMNS``."""
        numbers = map(str, (self.images, self.uses, self.batches))
        return (str(self.dataset), f"{self.size[0]}x{self.size[1]}", *numbers, f"{self.mean_crop_loss:.1%}")


@dataclass(frozen=True)
class Report:
    """The report on one data set."""

    source: str
    findings: Sequence[Finding]
    images: Sequence[ImageRow]
    buckets: Sequence[BucketRow]
    tags: dict[str, int]  # tag -> captions that have it, most frequent first
    summary: Sequence[tuple[str, str]]
    notes: Sequence[str]  # what was not checked, and why

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return findings in the order of ``KINDS``, the most severe of a kind first; only kinds that were found."""
        found = {kind: [f for f in self.findings if f.kind == kind] for kind in KINDS}
        return {
            kind: sorted(of_kind, key=lambda f: SEVERITIES.index(f.severity))
            for kind, of_kind in found.items()
            if of_kind
        }

    def exit_code(self, *, strict: bool) -> int:
        """Return 0, or 1 if there are errors or, with ``strict``, warnings."""
        return int(self.count("error") > 0 or (strict and self.count("warning") > 0))

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "version": JSON_VERSION,
            "source": printable(self.source),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "counts_by_kind": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [
                {
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "text": printable(finding.text),
                    "images": [printable(str(path)) for path in finding.images],
                    "detail": printable(finding.detail),
                }
                for finding in self.findings
            ],
            "images": [asdict(row) | {"path": printable(str(row.path))} for row in self.images],
            "buckets": [asdict(row) for row in self.buckets],
            "tags": self.tags,
            "summary": dict(self.summary),
            "notes": list(self.notes),
        }


@dataclass
class Collector:
    """Collects findings while the data set is checked."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, severity: Severity, text: str, images: Sequence[Path] = (), *, detail: str = "") -> None:
        self.findings.append(Finding(kind, severity, text, tuple(images), detail))
