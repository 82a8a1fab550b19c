"""One file a method: a frozen dataclass of settings with `select`."""
