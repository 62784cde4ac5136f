"""The directions in which the code may know itself, held by reading its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ports", "vswitch")

# The manager and the CLI must start in an instant and never stall on a compile.
NUMBA_FREE = (
    "ports.base",
    "ports.burst",
    "ports.cache",
    "ports.counters",
    "ports.eth",
    "ports.tap",
    "ports.vhost.channel",
    "ports.vhost.messages",
    "ports.vhost.session",
    "ports.vhost.virtio",
    "ports.vhost_net",
    "ports.vhost_user",
    "ports.xdp",
    "vswitch.cli",
    "vswitch.control.client",
    "vswitch.manager",
    "vswitch.privileges",
    "vswitch.records",
    "vswitch.shared",
    "vswitch.syscalls",
)

# Low may not know high: the first name may not import the second.
FORBIDDEN = (
    ("ports", "vswitch"),
    ("vswitch.datapath", "vswitch.manager"),
    ("vswitch.datapath", "vswitch.worker"),
    ("vswitch.datapath", "vswitch.control"),
    ("vswitch.control", "vswitch.manager"),
    ("vswitch.guest", "ports.vhost.packed"),
    ("vswitch.guest", "ports.vhost.split"),
    ("vswitch.guest", "ports.vhost.session"),
    ("vswitch.guest", "vswitch.datapath"),
    ("ports.vhost", "ports.dispatch"),
    ("ports.tap_data", "ports.vhost"),
    ("ports.eth_data", "ports.vhost"),
    ("ports.xdp_data", "ports.vhost"),
    ("ports.vhost_net_data", "ports.vhost.split"),
)


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("low", "high"), FORBIDDEN)
def test_low_does_not_import_high(low, high):
    offenders = [
        name
        for name, path in modules()
        if within(name, low) and any(within(i, high) for i in imports_of(path))
    ]
    assert offenders == []


def test_only_native_knows_numba():
    users = [
        name
        for name, path in modules()
        if any(within(i, "numba") or within(i, "llvmlite") for i in imports_of(path))
    ]
    assert users == ["ports.native"]


@pytest.mark.parametrize("module", NUMBA_FREE)
def test_the_control_side_does_not_load_numba(module):
    code = f"import sys, {module}; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_commands_do_not_wait_for_numpy():
    """It takes longer to load than most commands to run."""
    code = "import sys, vswitch.cli; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_jitted_code_never_raises_or_formats():
    offenders = []
    for name, path in modules():
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            decorators = [ast.unparse(d) for d in function.decorator_list]
            if "jit" not in decorators:
                continue
            offenders += [
                f"{name}.{function.name}"
                for node in ast.walk(function)
                if isinstance(node, ast.Raise | ast.JoinedStr | ast.Try | ast.Assert)
            ]
    assert offenders == []
