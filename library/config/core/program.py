"""Options of the console and the configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.config.declaration import Declaration
from library.config.fields import option


@dataclass(frozen=True)
class ConsoleOptions:
    """Console."""

    harmless: ClassVar[bool] = True

    console_log_level: str | None = option(
        None,
        "lowest level of log lines that are shown (INFO, if not given)",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    )
    console_log_file: str | None = option(None, "write the console's lines to this file instead")
    console_log_simple: bool = option(False, "plain lines without colours, tables and bars")


@dataclass(frozen=True)
class ConfigFileOptions:
    """Configuration file."""

    harmless: ClassVar[bool] = True

    config_file: str | None = option(None, "TOML file of these options, without their dashes; the command line wins")
    output_config: bool = option(False, "write all options to --config_file, and exit")
    strict: bool = option(False, "an option that has no effect in this run is an error instead of a warning")
    explain: str | None = option(
        None,
        "show the options that were set, their values and origins, and exit; all shows every option",
        choices=["set", "all"],
        nargs="?",
        const="set",
    )
    dry_run: bool = option(False, "check everything and show the plan, without loading weights, and exit")
    replay: str | None = option(None, "repeat the step of this .replay file, report what is not finite, and exit")


DECLARATION = Declaration(
    groups={"console": ConsoleOptions, "config": ConfigFileOptions},
)
