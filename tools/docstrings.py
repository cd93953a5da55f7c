"""For mkdocstrings: what docstrings write in their own way, as Markdown in Google style. Loaded by mkdocs.yml."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# The directive, its blank line, and the lines that are indented deeper than it.
CODE_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
# Arguments that share a description, and that description.
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*\n(?:\1 +.*\n)*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?([\w.]+)`")


def to_markdown(text: str, public: set[str]) -> str:
    """Fenced code blocks for code-block directives; an entry for each of the arguments that share one; links for roles
    that name something public, and code for the others.
    """

    def fenced(match: re.Match[str]) -> str:
        indent, language, code = match.groups()
        lines = [f"```{language}", *textwrap.dedent(code).strip("\n").splitlines(), "```"]
        return "\n".join(indent + line for line in lines) + "\n\n"

    def apart(match: re.Match[str]) -> str:
        indent, names, description = match.groups()
        return "".join(f"{indent}{name}: {description}" for name in names.split(", "))

    def linked(match: re.Match[str]) -> str:
        name = match[1].removeprefix("mixout_kernels.")
        return f"[`{name}`][mixout_kernels.{name}]" if name in public else f"`{name}`"

    text = CODE_BLOCK.sub(fenced, text + "\n")
    before, arguments, after = text.partition("\nArgs:\n")
    return ROLE.sub(linked, before + arguments + SHARED.sub(apart, after)).rstrip("\n")


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = set(map(str, pkg.exports or ()))
        pending: list[griffe.Object] = [pkg]
        while pending:
            for member in pending.pop().members.values():
                if isinstance(member, griffe.Alias):
                    continue
                if member.docstring:
                    member.docstring.value = to_markdown(member.docstring.value, public)
                pending.append(member)
