"""Everything on the far side of a port; importable without the switch."""
