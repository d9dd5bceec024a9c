"""Show the references of docstrings, `[`~Class.method`]` as transformers writes them, as code."""

import re
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`~?([^`\]]+)`\](?!\()")


class References(griffe.Extension):
    """Replace the references in every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the references in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(r"`\1`", obj.docstring.value)
