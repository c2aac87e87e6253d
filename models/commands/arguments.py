"""What the commands share about their arguments and complaints."""

import json
import sys
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, such as constructor arguments; ValueError when it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'want a JSON object, as in {{"depth": 3}}, got {text}')
    return value


def complain(text: str, code: int) -> int:
    """Print one line of complaint, and return the exit code `code`."""
    print("layercast:", " ".join(text.split()), file=sys.stderr)
    return code
