"""Analyses machine code of NVIDIA GPUs as printed by ``cuobjdump -sass``.

Instructions are counted on the shortest path through the tile's store. So no optional branch is counted, whether few
tiles or all tiles take it.
"""

from __future__ import annotations

import re
from collections import deque
from functools import cached_property

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
JUMP = re.compile(r"^BRA\b.*?(0x[0-9a-f]+)")
MATRIX_INSTRUCTION = re.compile(r"\b(?:UTCHMMA|UTCQMMA|HGMMA|HMMA)[.\w]*")

LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")


class Listing:
    """A kernel's instructions in order, and the possible successors of each."""

    def __init__(self, sass: str) -> None:
        found = [match.groups() for match in map(LINE.match, sass.splitlines()) if match]
        self.instructions = [text for _, text in found]
        number = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.after: list[list[int]] = []
        for i, text in enumerate(self.instructions):
            bare = PREDICATE.sub("", text)
            jump = JUMP.match(bare)
            conditional = bare != text or (jump is not None and re.match(r"BRA\S*\s+!?U?P\d", bare) is not None)
            after = []
            if jump and (there := number.get(int(jump[1], 16))) is not None:
                after.append(there)
            if (conditional or not (jump or bare.startswith(("EXIT", "RET")))) and i + 1 < len(found):
                after.append(i + 1)
            self.after.append(after)

    @property
    def matrix_instructions(self) -> tuple[str, ...]:
        """Names of the matrix instructions in the kernel."""
        return tuple(sorted({kind for text in self.instructions for kind in MATRIX_INSTRUCTION.findall(text)}))

    def epilogue(self) -> int | None:
        """Instructions from the last matrix instruction, through the tile's store if there is one, to the end.

        None if there is no matrix instruction.
        """
        matrix = [i for i, text in enumerate(self.instructions) if MATRIX_INSTRUCTION.search(text)]
        if not matrix:
            return None
        distance = self._distances(matrix[-1])
        stores = [i for i in distance if "UTMASTG" in self.instructions[i]]
        first = min(stores, key=distance.__getitem__, default=matrix[-1])
        onward = self._distances(first)
        ends = [onward[i] for i in onward if self.instructions[i].startswith("EXIT")]
        return distance[first] + min(ends) if ends else None

    def _distances(self, start: int) -> dict[int, int]:
        """Lengths of the shortest paths from ``start`` to every instruction that can follow it."""
        distance, waiting = {start: 0}, deque([start])
        while waiting:
            i = waiting.popleft()
            for there in self.after[i]:
                if there not in distance:
                    distance[there] = distance[i] + 1
                    waiting.append(there)
        return distance

    @cached_property
    def products(self) -> list[list[int]]:
        """The innermost loops with a matrix instruction, each in order."""
        return [sorted(loop) for loop in self._innermost(set(range(len(self.instructions))))]

    def spills_in_a_product(self) -> bool:
        """Whether the loop of a matrix product reads or writes local memory."""
        return any(LOCAL_MEMORY.search(self.instructions[i]) for loop in self.products for i in loop)

    def serialised(self) -> bool:
        """Whether, in the loop of a product, each of Hopper's matrix instructions waits for the one before.

        This is so if each ends its own group (gsb0) and a wait for all groups comes before the next one.
        """
        return any(re.fullmatch("w?(Mw)+M?", self._waits(loop)) for loop in self.products)

    def _waits(self, loop: list[int]) -> str:
        """A loop as letters: m matrix instruction, M one that ends a group, w wait for all groups, p other wait."""
        kinds = ""
        for text in (self.instructions[i] for i in loop):
            if "HGMMA" in text:
                kinds += "M" if "gsb0" in text else "m"
            elif "WARPGROUP.DEPBAR" in text:
                kinds += "w" if re.search(r"gsb0, 0x0\b", text) else "p"
        return kinds

    def _innermost(self, among: set[int]) -> list[set[int]]:
        """The innermost loops with a matrix instruction.

        They are the strongly connected components that fall apart when their entry is removed.
        """
        numbers = sorted(among)
        position = {i: n for n, i in enumerate(numbers)}
        sources = [position[i] for i in numbers for j in self.after[i] if j in among]
        ends = [position[j] for i in numbers for j in self.after[i] if j in among]
        graph = coo_array(([True] * len(ends), (sources, ends)), shape=(len(numbers),) * 2)
        _, label = connected_components(graph, directed=True, connection="strong")
        parts: dict[int, set[int]] = {}
        for i, part in zip(numbers, label):
            parts.setdefault(part, set()).add(i)
        loops = []
        for loop in parts.values():
            if len(loop) > 1 and any(MATRIX_INSTRUCTION.search(self.instructions[i]) for i in loop):
                entries = {j for i, after in enumerate(self.after) if i not in loop for j in after if j in loop}
                loops += self._innermost(loop - (entries or {min(loop)})) or [loop]
        return loops
