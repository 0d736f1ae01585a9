"""Values of Arrow tables as arrays and plain values."""

from __future__ import annotations

from typing import Any


def plain_value(scalar: Any) -> Any:
    """Returns an Arrow scalar as a NumPy array, a list of arrays or a plain value."""
    import pyarrow as pa

    if not isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return scalar.as_py()
    values = scalar.values
    if values is None:
        return None
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        # A null inside would turn the array into floats; the list keeps it visible to the check.
        return values.to_pylist() if values.null_count else values.to_numpy(zero_copy_only=False)
    if pa.types.is_nested(values.type):
        return [plain_value(value) for value in values]
    return values.to_pylist()
