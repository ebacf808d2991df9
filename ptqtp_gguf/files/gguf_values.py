"""Values as GGUF stores them: a cursor over bytes from outside that never reads past their end, nor makes more of them
than they can hold."""

from __future__ import annotations

import struct

from ..errors import InputError

MAX_NESTING = 4  # arrays of arrays
MAX_ARRAYS = 1 << 16  # that stand within arrays, of one file
MAX_ENTRIES = 1 << 24  # of an array; vocabularies have less than a million

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64 = 2, 4, 5, 6, 7, 8, 9, 10, 11


class Truncated(InputError):
    """The bytes end where more are needed."""


class Cursor:
    """Reads little-endian values from a buffer and never past its end."""

    def __init__(self, data: memoryview, where: str) -> None:
        self.data, self.where, self.pos = data, where, 0
        self.inner = 0  # arrays within arrays so far

    def fail(self, text: str, kind: type[InputError] = InputError) -> InputError:
        return kind(f"{self.where}: {text} (at byte {self.pos})")

    def take(self, n: int, what: str) -> memoryview:
        if n > len(self.data) - self.pos:
            left = len(self.data) - self.pos
            raise self.fail(f"truncated: {what} needs {n} bytes, {left} are left", Truncated)
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code), what))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q", f"length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def array_head(self, depth: int) -> tuple[int, int]:
        kind, n = self.number("<I", "array type"), self.number("<Q", "array length")
        if kind not in SCALARS and kind not in (STRING, ARRAY):
            raise self.fail(f"unknown array type {kind}")
        if depth >= MAX_NESTING:
            raise self.fail(f"arrays nested deeper than {MAX_NESTING}")
        smallest = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8 if kind == STRING else 12
        if n > (len(self.data) - self.pos) // smallest:
            raise self.fail(f"array of {n} entries does not fit into the file", Truncated)
        self.inner += n if kind == ARRAY else 0
        if n > MAX_ENTRIES or self.inner > MAX_ARRAYS:
            raise self.fail(f"array of {n} entries; the limit is {MAX_ENTRIES}, and {MAX_ARRAYS} arrays within arrays")
        return kind, n

    def skip(self, kind: int, depth: int = 0) -> None:
        if kind in SCALARS:
            self.take(struct.calcsize(SCALARS[kind]), "a value")
        elif kind == STRING:
            self.take(self.number("<Q", "length of a string"), "a string")
        elif kind == ARRAY:
            inner, n = self.array_head(depth)
            if inner in SCALARS:
                self.take(n * struct.calcsize(SCALARS[inner]), "an array")
            elif inner == STRING:
                self.skip_strings(n)
            else:
                for _ in range(n):
                    self.skip(inner, depth + 1)
        else:
            raise self.fail(f"unknown value type {kind}")

    def skip_strings(self, n: int) -> None:
        """A vocabulary has hundreds of thousands; so this loop is a bare one."""
        data, pos, end, length = self.data, self.pos, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(n):
            after = pos + 8 + length(data, pos)[0] if end - pos >= 8 else end + 1
            if after > end:
                self.pos = pos
                self.skip(STRING)  # raises, and says why
            pos = after
        self.pos = pos

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in SCALARS:
            code = SCALARS[kind]
            return struct.unpack(code, self.take(struct.calcsize(code), "a value"))[0]
        if kind == STRING:
            return self.text("a string")
        if kind != ARRAY:
            raise self.fail(f"unknown value type {kind}")
        inner, n = self.array_head(depth)
        if inner in SCALARS:
            code = f"<{n}{SCALARS[inner][1]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code), "an array")))
        return [self.value(inner, depth + 1) for _ in range(n)]
