"""The one name for what files hold, which is known only once it is checked."""

from typing import Any

# an object of a JSON or YAML file or one row of a data set: key -> null, bool, number, text, list or object
JsonObject = dict[str, Any]
Fields = dict[str, object]  # a row as its source has it, or in our names
