"""msgpack that strangers may send: bounded before it is built, and read field by field.

(1 MiB of empty arrays costs a plain unpacker 64 times its size in memory.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgpack

from net.errors import RemoteProtocolError

MAX_BYTES = 64 * 1024
MAX_ITEMS = 1024

T = TypeVar("T")


def pack(value: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """One map with text keys, and nothing behind it.

    Raises:
        RemoteProtocolError: anything else.
    """
    if len(data) > MAX_BYTES:
        raise RemoteProtocolError(f"{len(data)} bytes of msgpack: at most {MAX_BYTES} are read")
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_BYTES,
        max_array_len=MAX_ITEMS,
        max_map_len=64,
        max_ext_len=0,
        strict_map_key=True,
        raw=False,
    )
    try:
        unpacker.feed(data)
        value = unpacker.unpack()
    except Exception as error:  # msgpack raises its own, ValueError, UnicodeDecodeError and RecursionError's kin
        raise RemoteProtocolError(f"no well-formed msgpack ({type(error).__name__})") from error
    if unpacker.tell() != len(data):
        raise RemoteProtocolError("bytes behind the msgpack value")
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RemoteProtocolError("no msgpack map with text keys")
    return value


def field(fields: Mapping[str, Any], name: str, kind: type[T], *, max_length: int | None = None) -> T:
    """``fields[name]``, if it is a ``kind``.

    Raises:
        RemoteProtocolError: missing, of another type, or longer than ``max_length``.
    """
    value = fields.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RemoteProtocolError(f"{name!r} is {type(value).__name__}, not {kind.__name__}")
    if max_length is not None and len(value) > max_length:  # type: ignore[arg-type]
        raise RemoteProtocolError(f"{name!r} is longer than {max_length}")
    return value


def integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """``fields[name]``, if it is an integer from ``low`` to ``high``.

    Raises:
        RemoteProtocolError: anything else.
    """
    value = field(fields, name, int)
    if not low <= value <= high:
        raise RemoteProtocolError(f"{name!r} is {value}, not in {low} to {high}")
    return value


def number(fields: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """``fields[name]``, if it is a finite number from ``low`` to ``high``.

    Raises:
        RemoteProtocolError: anything else.
    """
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RemoteProtocolError(f"{name!r} is {value!r}, not a number in {low} to {high}")
    return float(value)


def items(fields: Mapping[str, Any], name: str, kind: type[T], *, max_items: int, max_length: int) -> list[T]:
    """``fields[name]``, if it is a list of at most ``max_items`` of ``kind``, each no longer than ``max_length``.

    Raises:
        RemoteProtocolError: anything else.
    """
    values = field(fields, name, list)
    if len(values) > max_items:
        raise RemoteProtocolError(f"{name!r} has {len(values)} items: at most {max_items} are read")
    return [field({name: value}, name, kind, max_length=max_length) for value in values]
