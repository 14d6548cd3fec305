"""A short name for the content of some arrays."""

import hashlib
from collections.abc import Iterable

import numpy as np


def arrays_fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Digest of the shapes, dtypes and bytes of `arrays`, in order, as 32 hexadecimal digits.

    Two sets of weights have the same fingerprint exactly when every array has the same shape,
    dtype and bits (BLAKE2b, 128 bits).
    """
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        array = np.asarray(array)
        # Not ascontiguousarray before the shape is read: it turns a scalar into shape (1,).
        digest.update(f"{array.shape}{array.dtype.str};".encode())
        # The bytes of an array of strings are addresses.
        text = repr(array.tolist()).encode() if array.dtype == object else None
        digest.update(np.ascontiguousarray(array).tobytes() if text is None else text)
    return digest.hexdigest()
