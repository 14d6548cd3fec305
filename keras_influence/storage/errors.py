"""What goes wrong with bytes on disk."""


class TornStoreError(OSError):
    """A store or checkpoint on disk is incomplete or does not match its manifest."""


class StoreInUseError(OSError):
    """Another process writes in the same directory."""
