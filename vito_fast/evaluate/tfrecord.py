"""A reader of TFRecord files of ``tf.train.Example``, the form of ClickMe's data, without TensorFlow.

Source: TensorFlow's description of the format. A record is its length (8 bytes, little-endian), a masked CRC-32C of the
length, the data, and a masked CRC-32C of the data. The data is a protocol buffer. Only what an Example needs is read.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vito_fast.errors import UserError

Value = list[bytes] | list[int] | list[float]
LARGEST = 1 << 30
"""Bytes of a record at most: a longer one is a damaged length."""


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of the format: CRC-32C (Castagnoli), rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> Iterator[bytes]:
    """The records of a file in order. The lengths' checksums are verified, so a torn file is noticed.

    Raises:
        UserError: naming the file and the byte for a wrong length or an early end.
    """
    with open(path, "rb") as file:
        while header := file.read(12):
            at = file.tell() - len(header)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else LARGEST + 1
            if length > LARGEST or struct.unpack("<I", header[8:])[0] != masked_crc32c(header[:8]):
                raise UserError(f"{path} is no TFRecord file, or damaged at byte {at}: download it again")
            data = file.read(length)
            if len(data) < length or len(file.read(4)) < 4:
                raise UserError(f"{path} ends inside the record at byte {at}: download it again")
            yield data


def example(record: bytes) -> dict[str, Value]:
    """The features of a ``tf.train.Example`` by name: bytes, integers or floats. ValueError if it is none."""
    found: dict[str, Value] = {}
    for number, features in _fields(record):
        if number != 1 or not isinstance(features, bytes):
            continue
        for _, entry in _fields(features):
            parts = dict(_fields(_bytes(entry)))
            name, kinds = _bytes(parts.get(1, b"")).decode(), dict(_fields(_bytes(parts.get(2, b""))))
            for kind, values in kinds.items():
                found[name] = _values(kind, _bytes(values))
    return found


def _values(kind: int, data: bytes) -> Value:
    """A BytesList (1), FloatList (2) or Int64List (3), packed or not."""
    items = [value for number, value in _fields(data) if number == 1]
    if kind == 1:
        return [_bytes(value) for value in items]
    if kind == 2:
        return np.frombuffer(b"".join(_bytes(value) for value in items), "<f4").tolist()
    numbers = []
    for value in items:
        if isinstance(value, int):
            numbers.append(value)
        else:
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                numbers.append(one)
    return [value - (1 << 64) if value >> 63 else value for value in numbers]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of a message: varints as integers, all else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                number, at = _varint(data, at)
                yield tag >> 3, number
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"no protocol buffer: wire type {kind}")
        if at + size > len(data):
            raise ValueError("no protocol buffer: a field is longer than its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("no protocol buffer: an integer does not end")


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("no tf.train.Example: an integer in the place of a message")
    return value
