"""The source line of an address in a compiled kernel, from its DWARF line tables."""

import functools
from collections.abc import Iterator
from pathlib import Path

from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.descriptions import describe_form_class
from elftools.dwarf.die import DIE
from elftools.dwarf.dwarfinfo import DWARFInfo
from elftools.elf.elffile import ELFFile


def source_line(library: Path, address: int) -> str:
    """`file:line` of `address`: the innermost frame, inlined calls included, that lies in
    kernel.metal, else the innermost frame of all; `?` where no line is known."""
    frames = list(_frames(_dwarf(library), address))
    inside = [frame for frame in frames if frame.startswith("kernel.metal:")]
    return (inside or frames or ["?"])[0]


@functools.cache
def _dwarf(library: Path) -> DWARFInfo:
    # Stays open: the tables are read from the file as they are asked for.
    return ELFFile(library.open("rb")).get_dwarf_info()


def _frames(dwarf: DWARFInfo, address: int) -> Iterator[str]:
    for unit in dwarf.iter_CUs():
        if (here := _row(dwarf, unit, address)) is None:
            continue
        yield here
        covering = [
            die
            for die in unit.iter_DIEs()
            if die.tag == "DW_TAG_inlined_subroutine" and _covers(dwarf, die, address)
        ]
        for die in reversed(covering):  # a call lies after the call that holds it
            file = _file(dwarf, unit, die.attributes["DW_AT_call_file"].value)
            yield f"{file}:{die.attributes['DW_AT_call_line'].value}"


def _row(dwarf: DWARFInfo, unit: CompileUnit, address: int) -> str | None:
    before = None
    for entry in dwarf.line_program_for_CU(unit).get_entries():
        state = entry.state
        if state is None:
            continue
        if before is not None and before.address <= address < state.address:
            return f"{_file(dwarf, unit, before.file)}:{before.line}"
        before = None if state.end_sequence else state
    return None


def _file(dwarf: DWARFInfo, unit: CompileUnit, index: int) -> str:
    program = dwarf.line_program_for_CU(unit)
    first = 0 if program.header.version >= 5 else 1
    return Path(program.header.file_entry[index - first].name.decode()).name


def _covers(dwarf: DWARFInfo, die: DIE, address: int) -> bool:
    if "DW_AT_ranges" in die.attributes:
        return any(low <= address < high for low, high in _ranges(dwarf, die))
    low, high = die.attributes["DW_AT_low_pc"].value, die.attributes["DW_AT_high_pc"]
    relative = describe_form_class(high.form) == "constant"
    return low <= address < (low + high.value if relative else high.value)


def _ranges(dwarf: DWARFInfo, die: DIE) -> Iterator[tuple[int, int]]:
    top = die.cu.get_top_DIE().attributes
    base = top["DW_AT_low_pc"].value if "DW_AT_low_pc" in top else 0
    lists = dwarf.range_lists()
    for entry in lists.get_range_list_at_offset(die.attributes["DW_AT_ranges"].value, cu=die.cu):
        if hasattr(entry, "base_address"):
            base = entry.base_address
        else:
            offset = 0 if entry.is_absolute else base
            yield entry.begin_offset + offset, entry.end_offset + offset
