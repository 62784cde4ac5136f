"""Options of a manager: the command line over a configuration file over defaults."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ports.errors import PortError
from ports.vhost.sockets import access
from vswitch.control import config
from vswitch.errors import ConfigError
from vswitch.records import MAX_WORKERS


def default_cpus() -> list[int]:
    """The CPUs that we may use, without the first, which the rest of the host likes."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[1:] or cpus


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `python -m vswitch.manager`, over those of a configuration file.

    Beside each option there are `file`, what the file says, `said`, the options that
    somebody gave, there or here, and `foreground`, whether nobody waits for our start.

    Raises:
        VswitchError: The file cannot be read, or makes no sense.
    """
    parser = _Parser(prog="vswitch.manager", argument_default=argparse.SUPPRESS)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--spares", type=int)
    parser.add_argument("--cpus", type=_cpu_list)
    parser.add_argument("--poll", choices=config.POLLS)
    parser.add_argument("--idle-us", type=int)
    parser.add_argument("--ageing", type=int)
    parser.add_argument("--forward-reserved", action=argparse.BooleanOptionalAction)
    parser.add_argument("--socket-group")
    parser.add_argument("--socket-mode")
    said = vars(parser.parse_args(arguments))
    run_dir, path = said.pop("run_dir"), said.pop("config", None)
    foreground = said.pop("status_fd", None) is None
    config.check_switch(said)
    file = config.read(path) if path else config.NOTHING
    said = file.switch | said
    return argparse.Namespace(
        **_defaults() | said,
        run_dir=run_dir,
        file=file,
        said=said,
        foreground=foreground,
    )


def under(options: argparse.Namespace, before: config.Words) -> argparse.Namespace:
    """The options, with those of an earlier run where nobody said anything now."""
    said = before | options.said
    return argparse.Namespace(**vars(options) | before | options.said | {"said": said})


def _defaults() -> config.Words:
    return {
        "workers": 1,
        "spares": 1,
        "cpus": default_cpus(),
        "poll": config.POLLS[0],
        "idle_us": 100,
        "ageing": 300,
        "forward_reserved": True,
        "socket_group": "",
        "socket_mode": "0660",
    }


class _Parser(argparse.ArgumentParser):
    """Its errors are ours, to be told like any other."""

    def error(self, message: str) -> NoReturn:
        """What is wrong with the options."""
        raise ConfigError(f"cannot start: {message}")


def _cpu_list(text: str) -> list[int]:
    try:
        return [int(cpu) for cpu in text.split(",")]
    except ValueError:
        message = f"{text!r} is no list of CPUs (write it as 1,2)"
        raise argparse.ArgumentTypeError(message) from None


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot work on this machine.

    Raises:
        ConfigError: Too many workers, a CPU that we may not use, or a group that is not
            there.
    """
    total = options.workers + options.spares
    if options.workers < 1 or options.spares < 0 or total > MAX_WORKERS:
        text = f"cannot start {options.workers} workers and {options.spares} spares"
        raise ConfigError(f"{text}: at least one and at most {MAX_WORKERS} in all")
    allowed = os.sched_getaffinity(0)
    for cpu in options.cpus:
        if cpu not in allowed:
            text = f"cannot pin a worker to cpu {cpu}: we may use {sorted(allowed)}"
            raise ConfigError(f"{text} (choose with --cpus)")
    try:
        access(options.socket_group, options.socket_mode)
    except PortError as error:
        raise ConfigError(str(error)) from error
