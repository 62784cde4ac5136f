"""What is given to the kernel's bpf call, byte by byte, and read from what it tells."""

import struct

import pytest

from ports import bpf

# linux/btf.h
INT, ARRAY, STRUCT, ENUM, FUNC, PROTO, VAR, SECTION, TAG, ENUM64 = (
    *(1, 3, 4, 6, 12, 13),
    *(14, 15, 17, 19),
)


def test_instructions_are_laid_out_as_the_kernel_reads_them():
    lines = [
        (0xB7, 3, 0, 0, -1),  # r3 = -1
        (0x55, 0, 0, "end", 7),  # if r0 != 7 go to end
        "again",
        (0x6B, 2, 4, 14, 0),  # *(u16 *)(r2 + 14) = r4
        (0x55, 0, 0, "again", 0),
        "end",
        (0x95, 0, 0, 0, 0),
    ]
    assert bpf.assemble(lines).hex(" ", 8) == (
        "b7030000ffffffff 5500020007000000 6b420e0000000000"
        " 5500feff00000000 9500000000000000"
    )


class Btf:
    """Type information as a kernel has it in /sys/kernel/btf."""

    def __init__(self):
        self.types, self.texts = b"", b"\0"

    def add(self, kind, name="", members=0, behind=0):
        """Describe a type; `behind` are bytes after it."""
        text = len(self.texts) if name else 0
        self.texts += name.encode() + b"\0" if name else b""
        self.types += struct.pack("<3I", text, kind << 24 | members, 0) + bytes(behind)

    def bytes(self):
        sizes = (0, len(self.types), len(self.types), len(self.texts))
        return struct.pack("<HBB5I", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.texts


def test_a_function_is_found_behind_types_of_every_kind():
    btf = Btf()
    for kind, members, behind in (
        *((INT, 0, 4), (ARRAY, 0, 12), (STRUCT, 3, 36), (STRUCT + 1, 2, 24)),
        *((ENUM, 5, 40), (PROTO, 2, 16), (VAR, 0, 4), (SECTION, 2, 24)),
        *((TAG, 0, 4), (ENUM64, 3, 36), (2, 0, 0), (7, 0, 0), (18, 0, 0)),
    ):
        btf.add(kind, "wanted" if kind == STRUCT else "other", members, behind)
    btf.add(FUNC, "not_wanted")
    assert bpf.find_function(btf.bytes(), "wanted") == 0
    btf.add(FUNC, "wanted_too")
    btf.texts = btf.texts.replace(b"wanted_too", b"the_function")
    assert bpf.find_function(btf.bytes(), "the_function") == 15
    assert bpf.find_function(btf.bytes(), "function") == 0


@pytest.mark.parametrize(
    ("have", "lacking"),
    [
        ("000001ffffffffff", "capabilities outside of our user namespace"),
        ("0000000000000000", "CAP_NET_ADMIN and no CAP_NET_RAW and no CAP_BPF"),
        ("0000008000001000", "CAP_NET_RAW"),
        ("0000000000200000", "CAP_NET_ADMIN and no CAP_NET_RAW"),
    ],
)
def test_the_rights_that_are_lacking_are_named(tmp_path, monkeypatch, have, lacking):
    status = tmp_path / "status"
    status.write_text(f"CapPrm:\t0\nCapEff:\t{have}\nCapBnd:\t0\n")
    monkeypatch.setattr(bpf, "_STATUS", status)
    assert bpf.missing_rights() == lacking
