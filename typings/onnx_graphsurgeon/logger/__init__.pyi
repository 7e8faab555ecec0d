class _Logger:
    severity: int
    CRITICAL: int

G_LOGGER: _Logger
