from pathlib import Path

import pytest

from vswitch.control.endpoint import Endpoint, check_name, parse
from vswitch.errors import ConfigError

HERE = Path("/home/user")


@pytest.mark.parametrize(
    ("text", "endpoint", "name"),
    [
        ("vm1.sock", Endpoint("vhost", "/home/user/vm1.sock"), "vm1"),
        ("./vm1.sock", Endpoint("vhost", "/home/user/vm1.sock"), "vm1"),
        ("../x/vm1.sock", Endpoint("vhost", "/home/x/vm1.sock"), "vm1"),
        ("/run/vm2.sock", Endpoint("vhost", "/run/vm2.sock"), "vm2"),
        ("vhost:vm3", Endpoint("vhost", "/home/user/vm3"), "vm3"),
        ("vhost:a:b.sock", Endpoint("vhost", "/home/user/a:b.sock"), "a:b"),
        ("./tap:b.sock", Endpoint("vhost", "/home/user/tap:b.sock"), "tap:b"),
        ("tap:up0", Endpoint("tap", "up0"), "up0"),
        ("eth:eth1", Endpoint("eth", "eth1"), "eth1"),
        ("xdp:eth1", Endpoint("xdp", "eth1"), "eth1"),
    ],
)
def test_endpoints_are_kept_in_full_and_name_their_port(text, endpoint, name):
    assert parse(text, HERE) == endpoint
    assert endpoint.default_name == name
    assert parse(endpoint.text, Path("/elsewhere")) == endpoint


@pytest.mark.parametrize("text", ["tapp:up0", "afp:up0", "x:y.sock"])
def test_an_unknown_kind_is_refused_with_those_that_are_known(text):
    with pytest.raises(ConfigError, match=r"known: PATH, vhost:\.\.\., tap:\.\.\."):
        parse(text, HERE)


@pytest.mark.parametrize("text", ["tap:", "eth:", "vhost:", ""])
def test_an_endpoint_that_leads_nowhere_is_refused(text):
    with pytest.raises(ConfigError, match="leads nowhere"):
        parse(text, HERE)


@pytest.mark.parametrize("text", ["a\0.sock", "a\n.sock", "tap:\x1b[2J", "\udcff.sock"])
def test_an_endpoint_that_cannot_be_shown_is_refused(text):
    with pytest.raises(ConfigError, match="a character of it cannot be printed"):
        parse(text, HERE)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "\x1b[2J", "x" * 65])
def test_names_that_would_spoil_a_listing_are_refused(name):
    with pytest.raises(ConfigError, match="--name"):
        check_name(name)


@pytest.mark.parametrize("name", ["vm1", "a:b", "größe", "x" * 64])
def test_other_names_are_taken_as_they_are(name):
    assert check_name(name) == name
