"""Words for a command line, quoted where needed."""

from __future__ import annotations

import re
import shlex

# What Hydra reads as it is.
_PLAIN = re.compile(r"[\w./:@%+-]+( +[\w./:@%+-]+)*", re.ASCII)
_NO_TEXT = ("false", "null", "true")


def key_value(key: str, value: object) -> str:
    """Returns `KEY=VALUE` as Hydra reads it: the value is quoted where need be.

    >>> key_value("ckpt_path", "runs/a"), key_value("ckpt_path", "x,y")
    ('ckpt_path=runs/a', 'ckpt_path="x,y"')
    """
    text = str(value)
    if _is_read(text):
        return f"{key}={text}"
    # A backslash is one of two before a quotation mark only.
    escaped = re.sub(r'(\\*)"', r"\1\1\\" + '"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'{key}="{escaped}"'


def shell_line(*words: str) -> str:
    """Returns words as they are typed in a shell.

    >>> print(shell_line("tensorboard", "--logdir", "a b"))
    tensorboard --logdir 'a b'
    """
    return shlex.join(words)


def _is_read(text: str) -> bool:
    """Returns whether Hydra takes a text, as it is, for this string."""
    if not _PLAIN.fullmatch(text) or text.lower() in _NO_TEXT:
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False  # a number
