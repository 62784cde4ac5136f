"""The kernel and the initial file system that the demo's and the tests' guests boot.

Debian's cloud kernel and its static busybox, fetched with `apt-get download` and unpacked
in a cache directory: nothing is installed, no root is needed, and the second time nothing
is fetched. The guest's shell listens on its second serial line (`shell.py`); the first
is the kernel's log.
"""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from vswitch.errors import VswitchError

_KERNEL: Final = "linux-image-cloud-amd64"
_BUSYBOX: Final = "busybox-static"
# ethtool, which busybox has not, and what it needs: packages; files and their folders.
_TOOLS: Final = ("ethtool", "libmnl0", "libc6")
_TOOL_FILES: Final = (
    ("sbin/ethtool", "bin"),
    ("ld-linux-x86-64.so.2", "lib64"),
    ("libc.so.6", "lib"),
    ("libm.so.6", "lib"),
    ("libmnl.so.0", "lib"),
)
_MODULES: Final = ("virtio_pci", "virtio_net")
_FOLDERS: Final = ("bin", "dev", "lib", "lib64", "proc", "sys", "tmp", "www")

# One line of the harness is one command; its status follows on a line of its own. `head`
# reads it, as busybox's `read` forgets half a line when a child ends meanwhile. The
# address comes with the kernel's command line, so all guests boot the same image.
_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set lo up
address=$(sed -n 's/.*vswitch.address=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
if [ -n "$address" ] && [ -e /sys/class/net/eth0 ]; then
    ip address add "$address" dev eth0
    ip link set eth0 up
fi
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo '@@ ready'
while line=$(head -n 1); do
    eval "$line" </dev/null
    printf '\\n@@ status %d\\n' $?
done
poweroff -f
"""


class Image(NamedTuple):
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def cache_dir() -> Path:
    """Where images are kept: $VSWITCH_CACHE_DIR, else the user's cache directory."""
    chosen = os.environ.get("VSWITCH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vswitch"


def cached() -> Image | None:
    """The image if it has been made before."""
    folder = _folder()
    image = Image(folder / "vmlinuz", folder / "initramfs.cpio")
    return image if all(path.is_file() for path in image) else None


def prepare() -> Image:
    """Fetch and build the image unless it is there.

    Raises:
        VswitchError: There is no apt-get, or it does not know the packages.
    """
    image = cached()
    if image is not None:
        return image
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=folder.parent) as name:
        work = Path(name)
        built = work / "built"
        built.mkdir()
        _build(work, built)
        with suppress(OSError):  # another process was faster: its image is as good
            built.rename(folder)
    image = cached()
    if image is None:
        text = (
            f"cannot keep the guest image in {folder}: it is not there after building"
        )
        raise VswitchError(f"{text} (set VSWITCH_CACHE_DIR to a directory of yours)")
    return image


def _folder() -> Path:
    packages, files = (_KERNEL, _BUSYBOX, *_TOOLS), (_TOOL_FILES, _MODULES)
    recipe = repr((packages, files, _FOLDERS, _INIT))
    return cache_dir() / f"guest-{sha256(recipe.encode()).hexdigest()[:12]}"


def _build(work: Path, built: Path) -> None:
    unpacked = work / "unpacked"
    _fetch(work, (_real_package(_KERNEL), _BUSYBOX, *_TOOLS), unpacked)
    shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), built / "vmlinuz")
    root = work / "root"
    for folder in (*_FOLDERS, "modules"):
        (root / folder).mkdir(parents=True)
    shutil.copy(unpacked / "bin" / "busybox", root / "bin" / "busybox")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    for pattern, folder in _TOOL_FILES:
        shutil.copy(next(unpacked.rglob(pattern)), root / folder)
    _copy_modules(unpacked, root / "modules")
    _pack(root, built / "initramfs.cpio")


def _real_package(name: str) -> str:
    """The package with the kernel in it, which the name of the series depends on."""
    listing = _run(["apt-cache", "depends", "--important", name])
    found = re.search(r"Depends: (linux-image-\S+)", listing)
    if found is None:
        text = f"cannot find a guest kernel: apt-cache knows no dependency of {name}"
        raise VswitchError(f"{text} (run apt-get update as root)")
    return found[1]


def _fetch(work: Path, packages: tuple[str, ...], target: Path) -> None:
    """Download packages and unpack them without installing them."""
    # apt's own sandbox user cannot write into a private directory.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    _run(["apt-get", "download", "-qq", *sandbox, *packages], work)
    for package in sorted(work.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(target)])


def _copy_modules(unpacked: Path, target: Path) -> None:
    """Copy the wanted modules and those they need, and write down their order."""
    available = {
        path.name.split(".")[0].replace("-", "_"): path
        for path in unpacked.rglob("*.ko*")
    }
    wanted = (_with_dependencies(name, available) for name in _MODULES)
    order = list(dict.fromkeys(chain.from_iterable(wanted)))  # each once, first place
    for name in order:
        (target / f"{name}.ko").write_bytes(_module_bytes(available[name]))
    (target / "order").write_text("\n".join(order) + "\n")


def _with_dependencies(name: str, available: dict[str, Path]) -> Iterator[str]:
    """A module after all that it depends on; what is built in comes with no file."""
    if name not in available:
        return
    found = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(available[name]))
    for dependency in found[1].decode().split(",") if found else []:
        yield from _with_dependencies(dependency.replace("-", "_"), available)
    yield name


def _module_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _pack(root: Path, target: Path) -> None:
    """Pack a directory as the kernel wants it, with the busybox inside it."""
    names = "\n".join(sorted(str(p.relative_to(root)) for p in root.rglob("*")))
    archive = subprocess.run(
        [root / "bin" / "busybox", "cpio", "-o", "-H", "newc"],
        input=names.encode(),
        cwd=root,
        capture_output=True,
        check=True,
    )
    target.write_bytes(archive.stdout)


def _run(command: list[str], cwd: Path | None = None) -> str:
    tool = command[0]
    if shutil.which(tool) is None:
        text = f"cannot make a guest image: {tool} is not installed"
        raise VswitchError(f"{text} (it needs Debian's package tools)")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[
            -1
        ]
        text = f"cannot make a guest image: {tool} said {said!r}"
        raise VswitchError(f"{text} (is the package list current? apt-get update)")
    return done.stdout
