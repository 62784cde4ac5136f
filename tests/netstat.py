"""What a network stack has against the frames that it got."""

ERRORS = "cat /proc/net/snmp /proc/net/snmp6 /sys/class/net/*/statistics/rx_*errors"


def errors_in(said):
    """The counts in the output of ERRORS that are not zero, by their names."""
    found = {}
    heads = {}
    for line in said.splitlines():
        name, *values = line.split()
        if name in heads:
            found |= {
                f"{name}{key}": int(value)
                for key, value in zip(heads[name], values, strict=True)
                if key == "InCsumErrors"
            }
        elif name.endswith(":"):
            heads[name] = values
        elif "InCsumErrors" in name:
            found[name] = int(values[0])
        elif not values:
            found[f"interfaces {len(found)}"] = int(name)
    assert len(found) > 10, said
    return {name: count for name, count in found.items() if count}
