import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch.control.mac import format_mac, parse_key
from vswitch.errors import VswitchError


def test_an_address_is_written_as_on_the_wire():
    assert format_mac(0x563412005452) == "52:54:00:12:34:56"
    assert format_mac(7 << 48 | 0x52) == "52:00:00:00:00:00"


@given(st.binary(min_size=6, max_size=6), st.integers(0, 4094), st.booleans())
def test_a_key_is_an_address_and_a_vlan(address, vlan, upper):
    address = bytes((address[0] & 0xFE, *address[1:5], address[5] | 1))
    text = address.hex(":").upper() if upper else address.hex(":")
    key = parse_key(text, vlan)
    assert key >> 48 == vlan
    assert key & (1 << 48) - 1 == int.from_bytes(address, "little")
    assert format_mac(key) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "5254.0012.3456",
        "52-54-00-12-34-56",
        "52:54:00:12:34:5g",
        " 52:54:00:12:34:56",
        "52:54:00:12:34:56\n",
    ],
)
def test_what_is_no_address_is_quoted(text):
    with pytest.raises(VswitchError, match="not six hexadecimal bytes") as raised:
        parse_key(text, 0)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    "text", ["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:80:c2:00:00:00"]
)
def test_no_station_has_a_groups_address_or_zero(text):
    with pytest.raises(VswitchError, match="a group's or zero"):
        parse_key(text, 0)


@pytest.mark.parametrize("vlan", [-1, 4095, 1 << 16])
def test_a_vlan_has_twelve_bits(vlan):
    with pytest.raises(VswitchError, match="not within 0 to 4094"):
        parse_key("52:54:00:12:34:56", vlan)
