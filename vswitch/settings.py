"""What a switch is set to: its ports and pinned addresses, changed and kept.

A change is made, written to the state file (`control/state.py`), and only then answered;
one at a time, so the file always holds a state that was. A port that was there before and
cannot be opened now does not keep the others from coming up: it is shown with the reason
and tried again, and its addresses stay in the file.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from ports.aio import unbroken
from ports.errors import PortError
from ports.vhost.sockets import remove_stale
from vswitch.control import config, endpoint, rundir, state
from vswitch.control.config import Config, Words
from vswitch.control.mac import format_mac, parse_key
from vswitch.errors import VswitchError
from vswitch.portbook import Entry, PortBook
from vswitch.workers import Workers

_RETRY_S: Final = 2.0

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What there was before, and what of it did not come back yet."""

    ports: int
    addresses: int
    troubles: list[str]


class Settings:
    """All that is set while a switch runs."""

    def __init__(
        self, run_dir: Path, book: PortBook, workers: Workers, switch: Words
    ) -> None:
        """Begin with nothing; `switch` are the options that somebody gave."""
        self._run_dir = run_dir
        self._book = book
        self._workers = workers
        self._switch = switch
        self._ports: dict[str, Words] = {}
        self._addresses: dict[int, Words] = {}  # by their keys in the fdb
        self._changing = asyncio.Lock()
        self._written = ""
        self._made: set[str] = set()

    # --- changes ---

    async def add_port(self, wanted: Words) -> tuple[Entry, bool]:
        """Add a port; False with it where it was there already.

        Raises:
            VswitchError: It makes no sense, cannot be opened, or cannot be kept.
        """
        words = config.port_words(wanted)
        async with self._changing:
            entry, added = await self._open(words)
            if added:
                self._ports[entry.port.name] = words
            await self._keep()
        return entry, added

    async def del_port(self, name: str) -> None:
        """Remove a port and forget the addresses behind it.

        Raises:
            VswitchError: There is none of that name, or the change cannot be kept.
        """
        async with self._changing:
            await self._book.remove(name)
            self._ports.pop(name, None)
            for key in self._pinned_to(name):
                del self._addresses[key]
            await self._keep()

    async def add_address(self, mac: str, vlan: int, name: str) -> None:
        """Pin an address to a port.

        Raises:
            VswitchError: It is none, its bucket is full, or it cannot be kept.
        """
        key = parse_key(mac, vlan)
        async with self._changing:
            await self._pin(key, name)
            self._addresses[key] = _address(key, name)
            await self._keep()

    async def del_address(self, mac: str, vlan: int) -> None:
        """Forget an address, learned or pinned.

        Raises:
            VswitchError: It is not there, or the change cannot be kept.
        """
        key = parse_key(mac, vlan)
        async with self._changing:
            removed = await self._workers.change_fdb("remove", key)
            if not self._addresses.pop(key, None) and not removed:
                text = f"cannot delete {mac}: it is not in the table"
                raise VswitchError(f"{text} (vswitch fdb show)")
            await self._keep()

    # --- what was set before ---

    async def restore(self, file: Config, before: Config) -> Restored:
        """Set what a configuration file says, and beside it what was set before.

        Where both speak of a port or an address, the file counts.

        Raises:
            VswitchError: A port that only the file knows cannot be opened.
        """
        for port in (*file.ports, *before.ports):
            self._ports.setdefault(port["name"], port)
        self._addresses = _by_key(before.fdb) | _by_key(file.fdb)
        known = {port["name"] for port in before.ports}
        async with self._changing:
            await self._book.resume(list(self._ports.values()))
            for name, words in self._ports.items():
                try:
                    _, added = await self._open(words)
                    if not added:  # a killed manager's, maybe about to remove it
                        await self._pin_all(name)
                except VswitchError as error:
                    if name not in known:
                        raise
                    self._miss(words, error)
            self._remove_unanswered()
            troubles = [
                f"port {entry.port.name}: {entry.port.state().reason}"
                for entry in self._book.missing
            ]
            try:
                await self._keep()
            except VswitchError as error:  # better than no switch
                troubles.append(str(error))
        for trouble in troubles:
            _log.warning("%s", trouble)
        if known:
            _log.info("restored ports=%d addresses=%d", len(known), len(before.fdb))
        return Restored(len(known), len(before.fdb), troubles)

    async def retry_forever(self) -> None:
        """Open what could not be opened as soon as it can."""
        while True:
            await asyncio.sleep(_RETRY_S)
            async with self._changing:
                for entry in self._book.missing:
                    words = self._ports[entry.port.name]
                    try:
                        await self._open(words)
                    except VswitchError as error:
                        self._miss(words, error)

    # --- steps ---

    async def _open(self, words: Words) -> tuple[Entry, bool]:
        self._note_made(words)
        entry, added = await self._book.add(words)
        if added:
            await self._pin_all(words["name"])
        return entry, added

    async def _pin_all(self, name: str) -> None:
        """Pin what is pinned to a port."""
        for key in self._pinned_to(name):
            try:
                await self._pin(key, name)
            except VswitchError as error:  # the table is hashed anew in each run
                _log.warning("%s", error)

    def _miss(self, words: Words, error: VswitchError) -> None:
        reason = str(error).removeprefix(f"port {words['name']}: ")
        self._book.miss(words, reason)

    async def _pin(self, key: int, name: str) -> None:
        slot = self._book.named(name).slot
        if not await self._workers.change_fdb("set", key, slot):
            text = f"cannot add {format_mac(key)}: its bucket is full of static entries"
            raise VswitchError(f"{text} (delete one)")

    def _pinned_to(self, name: str) -> list[int]:
        return [
            key for key, address in self._addresses.items() if address["ifname"] == name
        ]

    async def _keep(self) -> None:
        """Write what is set, if that is not what the file says."""
        now = Config(
            self._switch, list(self._ports.values()), list(self._addresses.values())
        )
        text = state.format_text(now)
        if text != self._written:
            await unbroken(self._write(text))

    async def _write(self, text: str) -> None:
        # A disk may take its time, and front-ends wait for our answers.
        await asyncio.to_thread(state.write, self._run_dir, text)
        self._written = text

    def _remove_unanswered(self) -> None:
        """Remove a socket that was made for a port before it was kept that there is one."""
        paths = [
            endpoint.parse(p["endpoint"], Path("/")).rest for p in self._ports.values()
        ]
        made = self._run_dir / rundir.MADE
        for line in made.read_text().splitlines() if made.exists() else []:
            if line not in paths:
                with contextlib.suppress(PortError, OSError):
                    remove_stale(Path(line))

    def _note_made(self, words: Words) -> None:
        """Remember a socket file outside the run directory, should we be killed."""
        leads_to = endpoint.parse(words["endpoint"], Path("/"))
        listens = leads_to.kind == endpoint.VHOST and words.get("mode") != "client"
        if listens and leads_to.rest not in self._made:
            self._made.add(leads_to.rest)
            with (self._run_dir / rundir.MADE).open("a") as made:
                made.write(f"{leads_to.rest}\n")


def _by_key(addresses: Iterable[Words]) -> dict[int, Words]:
    keys = ((parse_key(a["mac"], a.get("vlan", 0)), a["ifname"]) for a in addresses)
    return {key: _address(key, name) for key, name in keys}


def _address(key: int, name: str) -> Words:
    return {"mac": format_mac(key), "ifname": name, "vlan": key >> 48}
