"""Bytes: arrays, records, and directories that are whole or absent. Knows no model."""

from keras_influence.storage.errors import StoreInUseError, TornStoreError
from keras_influence.storage.files import (
    commit_directory,
    file_sha256,
    sealed,
    unsealed,
    write_json,
    writing,
)
from keras_influence.storage.fingerprint import arrays_fingerprint
from keras_influence.storage.index import StoredIndex
from keras_influence.storage.journal import Records
from keras_influence.storage.mirror import MirroredIndex
from keras_influence.storage.rows import StoredRows, block_width, generation
from keras_influence.storage.store import (
    MANIFEST,
    fill_store,
    load_store,
    read_manifest,
    save_store,
)
from keras_influence.storage.zarr import ArrayFile

__all__ = [
    "MANIFEST",
    "ArrayFile",
    "MirroredIndex",
    "Records",
    "StoreInUseError",
    "StoredIndex",
    "StoredRows",
    "TornStoreError",
    "arrays_fingerprint",
    "block_width",
    "commit_directory",
    "file_sha256",
    "fill_store",
    "generation",
    "load_store",
    "read_manifest",
    "save_store",
    "sealed",
    "unsealed",
    "write_json",
    "writing",
]
