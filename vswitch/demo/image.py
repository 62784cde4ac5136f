"""The kernel and the initial file system that the demo's and the tests' guests boot.

Debian's cloud kernel and its static busybox, fetched with `apt-get download` and unpacked
in a cache directory: nothing is installed, no root is needed, and the second time nothing
is fetched. What goes into an image is its recipe: tests and measurements have one with
Python, iperf3 and VLANs as well. The guest's shell listens on its second serial line
(`shell.py`); the first is the kernel's log.
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

_FOLDERS: Final = ("bin", "dev", "proc", "sys", "tmp", "www")

# One line of the harness is one command; its status follows on a line of its own. `head`
# reads it, as busybox's `read` forgets half a line when a child ends meanwhile.
_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set lo up
{set_up}exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo '@@ ready'
while line=$(head -n 1); do
    eval "$line" </dev/null
    printf '\\n@@ status %d\\n' $?
done
poweroff -f
"""


# The address comes with the kernel's command line, so all guests boot the same image.
_TAKE_ADDRESS: Final = """\
address=$(sed -n 's/.*vswitch.address=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
if [ -n "$address" ] && [ -e /sys/class/net/eth0 ]; then
    ip address add "$address" dev eth0
    ip link set eth0 up
fi
"""


class Recipe(NamedTuple):
    """What an image is made of.

    Attributes:
        kernel: The Debian package that depends on the newest kernel of its kind.
        packages: Those that files are taken from; busybox is in every image.
        files: Patterns of these files.
        modules: Kernel modules that are loaded at boot, after what they need.
        set_up: Lines of shell before the guest is ready.
    """

    kernel: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    modules: tuple[str, ...]
    set_up: str


# With ethtool, which busybox has not.
PLAIN: Final = Recipe(
    kernel="linux-image-cloud-amd64",
    packages=("ethtool", "libmnl0", "libc6"),
    files=(
        *("sbin/ethtool", "lib64/*", "usr/lib/x86_64-linux-gnu/libmnl.so.*"),
        *("lib/x86_64-linux-gnu/ld-linux*", "lib/x86_64-linux-gnu/lib[cm].so.6"),
    ),
    modules=("virtio_pci", "virtio_net"),
    set_up=_TAKE_ADDRESS,
)

# Of Debian 12's packages these are those that the tools run with, without what only their
# installation needs.
TOOLS: Final = PLAIN._replace(
    packages=(
        *PLAIN.packages,
        *("python3.11-minimal", "libpython3.11-minimal", "libexpat1", "zlib1g"),
        *("iperf3", "libiperf0", "libsctp1", "libssl3"),
    ),
    files=(
        *PLAIN.files,
        *("usr/bin/python3*", "usr/bin/iperf3", "usr/lib/python3*/**/*.py"),
        *("lib/x86_64-linux-gnu/*.so*", "usr/lib/x86_64-linux-gnu/*.so*"),
    ),
    modules=(*PLAIN.modules, "8021q"),
)


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


def cached(recipe: Recipe = PLAIN) -> Image | None:
    """The recipe's image, if it has been made before."""
    folder = _folder(recipe)
    image = Image(folder / "vmlinuz", folder / "initramfs.cpio")
    return image if all(path.is_file() for path in image) else None


def prepare(recipe: Recipe = PLAIN) -> Image:
    """Fetch and build the recipe's image unless it is there.

    Raises:
        VswitchError: There is no apt-get, or it does not know the packages.
    """
    image = cached(recipe)
    if image is not None:
        return image
    folder = _folder(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=folder.parent) as name:
        work = Path(name)
        built = work / "built"
        built.mkdir()
        _build(work, built, recipe)
        with suppress(OSError):  # another process was faster: its image is as good
            built.rename(folder)
    image = cached(recipe)
    if image is None:
        text = (
            f"cannot keep the guest image in {folder}: it is not there after building"
        )
        raise VswitchError(f"{text} (set VSWITCH_CACHE_DIR to a directory of yours)")
    return image


def _folder(recipe: Recipe) -> Path:
    text = repr((recipe, _FOLDERS, _INIT))
    return cache_dir() / f"guest-{sha256(text.encode()).hexdigest()[:12]}"


def _build(work: Path, built: Path, recipe: Recipe) -> None:
    unpacked = work / "unpacked"
    kernel = _real_package(recipe.kernel)
    _fetch(work, (kernel, "busybox-static", *recipe.packages), unpacked)
    shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), built / "vmlinuz")
    root = work / "root"
    for folder in (*_FOLDERS, "modules"):
        (root / folder).mkdir(parents=True)
    shutil.copy(unpacked / "bin" / "busybox", root / "bin" / "busybox")
    (root / "init").write_text(_INIT.replace("{set_up}", recipe.set_up))
    (root / "init").chmod(0o755)
    _copy_files(unpacked, recipe.files, root)
    _copy_modules(unpacked, recipe.modules, root / "modules")
    for python in (root / "usr" / "bin").glob("python3*"):
        _prepare_python(root, python.name)
    _pack(root, built / "initramfs.cpio")


def _copy_files(unpacked: Path, patterns: tuple[str, ...], root: Path) -> None:
    """Copy what matches, and links as links: their targets are in the guest."""
    for path in {path for pattern in patterns for path in unpacked.glob(pattern)}:
        copy = root / path.relative_to(unpacked)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy, follow_symlinks=False)


def _prepare_python(root: Path, name: str) -> None:
    """Do what its installation would."""
    (root / "bin" / "python3").symlink_to(Path("/usr/bin") / name)
    # Or it says that it has none.
    (root / "usr" / "lib" / name / "lib-dynload").mkdir()


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


def _copy_modules(unpacked: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy the wanted modules and those they need, and write down their order."""
    available = {
        path.name.split(".")[0].replace("-", "_"): path
        for path in unpacked.rglob("*.ko*")
    }
    wanted = (_with_dependencies(name, available) for name in names)
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
