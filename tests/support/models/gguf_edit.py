"""Spoil a GGUF file: change numbers of its tensors, write it again with other key-values or without tensors.

In: a file, what to change. Out: the file, changed in place. Checks nothing.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Numbers = "np.ndarray[Any, np.dtype[Any]]"


def change_tensors(path: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace tensors by what `change` makes of all of them; each keeps its type, which is F16 or F32."""
    reader = gguf.GGUFReader(path, "r+")
    held = {tensor.name: tensor for tensor in reader.tensors}
    plain = {name: np.array(tensor.data) for name, tensor in held.items()}
    changed = {name: np.array(value) for name, value in change(plain).items()}
    for name, value in changed.items():
        assert not np.array_equal(value, plain[name]), name
        held[name].data[...] = value
    reader.data.flush()


def copy_gguf(path: Path, fields: Mapping[str, Any] | None = None, drop: Collection[str] = ()) -> None:
    """Write a file again with other values of some keys that it has, and without the tensors `drop`."""
    reader, values = gguf.GGUFReader(path), dict(fields or {})
    target = path.with_suffix(".copy")
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, values.pop(name, field.contents()), field.types[0], sub_type=inner)
    assert not values, values
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.replace(path)
