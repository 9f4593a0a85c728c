"""Resource names from what people write: `digits` for `datasets/digits`, `digits@3` for a version."""

VERSIONS = "versions"


def full(collection: str, name: str) -> str:
    """`adapters` and `digits` make `adapters/digits`; a name that is full already stays as it is."""
    return name if name.startswith(f"{collection}/") else f"{collection}/{name}"


def short(name: str) -> str:
    """What people call it: `adapters/digits/versions/3` is `digits@3`, a digest cut to 12 digits."""
    parts = name.split("/")
    if len(parts) == 4:
        return f"{parts[1]}@{parts[3][:12]}"
    return parts[-1]


def version(collection: str, name: str) -> str:
    """`digits@3` makes `adapters/digits/versions/3`; without `@` it is `full`."""
    whole = full(collection, name)
    parent, at, number = whole.partition("@")
    return f"{parent}/{VERSIONS}/{number}" if at else whole


def adapter_to_ask(name: str) -> str:
    """As the inference service takes it: `digits`, `digits@3` (a version) or `digits@canary` (an alias)."""
    whole = full("adapters", name)
    _, at, which = whole.partition("@")
    return version("adapters", name) if at and which.isdigit() else whole
