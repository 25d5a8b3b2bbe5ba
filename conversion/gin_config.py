"""Reads a gin file (operative_config.gin) without importing anything that it names.

A gin file assigns values to parameters of functions, in scopes: `encoder/SelfAttention.num_heads =
%num_heads`, and to macros: `num_heads = 8`. Values are Python literals, macros (%name) and
references to functions (@module.name); statements may go on over several lines.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATEMENT = re.compile(r"^((?:[\w.\-]+/)*)([\w.]+)\s*=(.*)$", re.DOTALL)
_STRING = r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""
# Strings, which may hold any of the other things; comments; the two kinds of names; brackets.
_TOKEN = re.compile(rf"(?P<string>{_STRING})|(?P<comment>#[^\n]*)|(?P<name>[%@][\w./]+(?:\(\))?)")


class GinError(ValueError):
    """A gin file that cannot be read; the message names the file, the line and the fix."""


@dataclass(frozen=True)
class Reference:
    """`@scope/module.name`: a function or class, which is never looked up.

    As text it is the name without its module.
    """

    name: str

    def __str__(self) -> str:
        scope, slash, name = self.name.removesuffix("()").rpartition("/")
        return scope + slash + name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class _Macro:
    name: str


class GinConfig:
    """The assignments of a gin file.

    Args:
        path: the file.

    Raises:
        GinError: for text that is not gin, and for macros that refer to each other in a circle.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.macros: dict[str, Any] = {}
        self._bindings: dict[tuple[str, str, str], Any] = {}
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise GinError(f"{self.path}: is not a text file ({error}).") from error
        for line, statement in self._statements(text):
            self._assign(line, statement)

    def get(self, scope: str, name: str, parameter: str, default: Any = None) -> Any:
        """The value of `name.parameter` in a scope, or outside of any scope, or the default.

        Args:
            scope: "encoder", "decoder" or "".
            name: of a function or class, without its module.
        """
        for key in ((scope, name, parameter), ("", name, parameter)):
            if key in self._bindings:
                return self._resolve(self._bindings[key])
        return default

    def macro(self, name: str, default: Any = None) -> Any:
        """The value of a macro, or the default."""
        return self._resolve(self.macros[name]) if name in self.macros else default

    def _assign(self, line, statement):
        match = _STATEMENT.match(statement)
        if not match:
            if re.match(r"(import|from)\s", statement):
                return
            raise GinError(
                f"{self.path}, line {line}: {statement[:80]!r} is neither an assignment nor an "
                "import. Take the operative_config.gin that the training wrote."
            )
        scope, target, value = match.group(1).rstrip("/"), match.group(2), match.group(3)
        value = self._value(line, value)
        *function, parameter = target.split(".")
        if not function:
            self.macros[parameter] = value
        elif function == ["macro"] and parameter == "value":  # the long form of `scope = value`
            self.macros[scope] = value
        else:
            self._bindings[scope, function[-1], parameter] = value

    def _statements(self, text):
        """Line numbers and whole statements, without comments."""
        statement, first, depth = "", 1, 0
        for number, line in enumerate(text.splitlines(), start=1):
            line = _TOKEN.sub(lambda m: "" if m.group("comment") else m.group(0), line).rstrip()
            bare = _TOKEN.sub("", line)
            depth += sum(bare.count(c) for c in "([{") - sum(bare.count(c) for c in ")]}")
            first = first if statement else number
            statement += line.removesuffix("\\") + "\n"
            if depth <= 0 and not line.endswith("\\"):
                if statement.strip():
                    yield first, statement.strip()
                statement, depth = "", 0
        if statement.strip():
            raise GinError(
                f"{self.path}, line {first}: the statement {statement.strip()[:60]!r} does not "
                "end. The file is cut off: copy it again from its source."
            )

    def _value(self, line, text):
        """A literal, with `Reference` and `_Macro` where the text has names."""
        names = []

        def placeholder(match):
            if not match.group("name"):
                return match.group(0)
            names.append(match.group("name"))
            return f"(..., {len(names) - 1})"  # a literal that no gin file has

        def named(value):
            if isinstance(value, tuple) and value[:1] == (...,):
                name = names[value[1]]
                return _Macro(name[1:]) if name[0] == "%" else Reference(name[1:])
            if isinstance(value, (list, tuple)):
                return type(value)(named(item) for item in value)
            if isinstance(value, dict):
                return {key: named(item) for key, item in value.items()}
            return value

        try:
            return named(ast.literal_eval(_TOKEN.sub(placeholder, text).strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise GinError(
                f"{self.path}, line {line}: {text.strip()[:80]!r} is not a value. Expected a "
                "number, a string, True, False, None, a list, %macro or @function."
            ) from error

    def _resolve(self, value, seen=()):
        if isinstance(value, _Macro):
            if value.name in seen:
                raise GinError(
                    f"{self.path}: the macro %{value.name} refers to itself, through "
                    f"{' -> '.join(seen)}."
                )
            if value.name not in self.macros:
                raise GinError(
                    f"{self.path}: %{value.name} is used but never set. Add a line "
                    f"{value.name} = VALUE."
                )
            return self._resolve(self.macros[value.name], (*seen, value.name))
        if isinstance(value, (list, tuple)):
            return type(value)(self._resolve(item, seen) for item in value)
        if isinstance(value, dict):
            return {key: self._resolve(item, seen) for key, item in value.items()}
        return value
