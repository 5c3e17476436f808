"""Check the data of a training run before it starts: one report, on the console and as an HTML page.

    python tools/check_dataset.py --dataset_config dataset.toml --html report.html
    python tools/check_dataset.py --train_data_dir train --reg_data_dir reg --resolution 512 --strict
    python tools/check_dataset.py --config_file lora.toml --json report.json

It finds images that cannot be read, equal and similar images, images that are both in training and in
regularization (or validation) data, captions that are missing, empty or cut, missing masks, images that are enlarged or
cropped much, and settings without effect; it shows buckets, steps and tags.

Every other option of train_network.py is accepted too, so that a training command or its --config_file can be checked
as it is; options that do not concern the data are named and ignored.

Exit codes: 0 nothing wrong, 1 errors were found (with --strict: errors or warnings), 2 wrong options or dataset file.
docs/check_dataset.md explains every finding.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.tool_families import chosen_family
from library.config.config_file import read_args
from library.config.console import setup_console
from library.data.report import options as check_options
from library.errors import exits_on_user_error
from library.files.atomic import write_text
from library.training.cache_tool_options import AllTrainingOptions

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    return check_options.parser(__doc__, AllTrainingOptions)


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Check, write what is asked for, and return the exit code."""
    wanted = check_options.CheckOptions.from_args(args)
    options: Any = AllTrainingOptions.from_args(args)  # its class is made of all families' options
    chosen = chosen_family(args, options.family)
    setup_console(options.console)
    # only now, as torch takes seconds to load
    from library.architectures.registry import architecture
    from library.data.report.page import make_page
    from library.data.report.survey import check_data
    from library.data.report.tables import print_report

    ignored = check_options.not_looked_at(options)
    if ignored:
        logger.info("ignored, as it does not concern the data: %s", ", ".join(ignored))
    family = architecture(chosen.folder).configured(replace(options, family=chosen.options))
    report = check_data(options, wanted, family)
    print_report(report)
    if wanted.html is not None:
        write_text(wanted.html, make_page(report, max_thumbnails=wanted.max_thumbnails))
        logger.info("page: %s", wanted.html)
    if wanted.json is not None:
        write_text(wanted.json, json.dumps(report.as_json(), indent=1) + "\n")
        logger.info("JSON: %s", wanted.json)
    return report.exit_code(strict=options.config.strict)


if __name__ == "__main__":
    sys.exit(main(read_args(setup_parser())))
