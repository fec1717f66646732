"""Qt's resource archives (.rcc), as far as GCompris uses them: which files they hold, and what is in them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

DIRECTORY, COMPRESSED, ZSTD = 2, 1, 4


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in an archive.

    Raises:
        ValueError: it is not such an archive, or compressed in a way that GCompris does not use.
    """
    raw = archive.read_bytes()
    if raw[:4] != b"qres":
        raise ValueError(f"{archive} does not begin like a Qt resource archive")
    version, tree, data, names = struct.unpack_from(">4i", raw, 4)
    width = 14 if version == 1 else 22  # later ones have a time behind each node

    def name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", raw, names + offset)
        begin = names + offset + 6  # behind the length stands a hash
        return raw[begin : begin + 2 * length].decode("utf-16-be")

    def content(flags: int, offset: int) -> bytes:
        (length,) = struct.unpack_from(">I", raw, data + offset)
        found = raw[data + offset + 4 : data + offset + 4 + length]
        if flags & ZSTD:
            raise ValueError(f"{archive} has files compressed with zstd")
        return zlib.decompress(found[4:]) if flags & COMPRESSED else found

    def walk(index: int, above: str) -> Iterator[tuple[str, bytes]]:
        node = tree + index * width
        name_offset, flags = struct.unpack_from(">iH", raw, node)
        path = f"{above}/{name(name_offset)}".lstrip("/") if index else ""
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">2i", raw, node + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        else:
            (offset,) = struct.unpack_from(">i", raw, node + 10)
            yield path, content(flags, offset)

    yield from walk(0, "")
