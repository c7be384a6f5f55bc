"""Instruction data as LLaVA made it (2304.08485, section 3): a text-only language model reads a picture's captions and
boxes in its place and writes conversations, detailed descriptions and complex reasoning about it.

    symbols.py   pictures in words: captions and boxes of COCO, Visual Genome, or JSON lines
    prompts.py   the prompts of the language model, from files that a user can copy and change
    checks.py    what is wrong with a reply
    write.py     requests, replies, checks, and the files that come out
"""

from isthmus.data.instruct.checks import Checks
from isthmus.data.instruct.prompts import KINDS, Kind, Prompt, copy_prompts, load_prompts
from isthmus.data.instruct.symbols import Box, Symbols, read_symbols
from isthmus.data.instruct.write import Report, Written, instruct, write_rows

__all__ = [
    "KINDS",
    "Box",
    "Checks",
    "Kind",
    "Prompt",
    "Report",
    "Symbols",
    "Written",
    "copy_prompts",
    "instruct",
    "load_prompts",
    "read_symbols",
    "write_rows",
]
