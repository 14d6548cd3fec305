"""Bytes: fingerprints of arrays, and directories that are whole or absent. Knows no model."""

from keras_influence.storage.fingerprint import arrays_fingerprint
from keras_influence.storage.store import (
    TornStoreError,
    commit_directory,
    file_sha256,
    load_store,
    read_manifest,
    save_store,
    write_json,
)

__all__ = [
    "TornStoreError",
    "arrays_fingerprint",
    "commit_directory",
    "file_sha256",
    "load_store",
    "read_manifest",
    "save_store",
    "write_json",
]
