"""The processing contract: everything outside the weights that decides what the model reads.

Owns its fields, their plain JSON form and its digest. Precision is outside. `processor` makes and checks
contracts.
"""

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import get_origin, get_type_hints

from veneer_digests import contract_digest
from veneer_processing.errors import ContractMismatchError, ProcessingError


@dataclass(frozen=True, slots=True)
class ProcessingContract:
    """What is sealed in an adapter; two with one digest read every conversation alike.

    Attributes:
        model_digest: digest of the base model.
        tokenizer_digest: SHA-256 of tokenizer.json.
        template_digest: SHA-256 of the chat template's text.
        min_pixels: least area of a picture after resizing, in pixels.
        max_pixels: greatest area of a picture after resizing, in pixels.
        patch_size: edge of a patch, in pixels.
        merge_size: patches along each edge that merge into one visual token.
        temporal_patch_size: frames in a patch.
        interpolation: how a picture is resized.
        image_mean: of red, green and blue, taken away after scaling to 0..1.
        image_std: likewise, divided by.
        picture_rule: name of the rule by which a file becomes RGB (`pictures`).
        mask_rule: name of the rule by which a conversation is cut and learned (`template`).
    """

    model_digest: str
    tokenizer_digest: str
    template_digest: str
    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    interpolation: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    picture_rule: str
    mask_rule: str

    @property
    def digest(self) -> str:
        """Its identity, as protos/DIGESTS.md fixes it: 64 lower-case hexadecimal digits."""
        return _digest(self)

    def to_dict(self) -> dict[str, str | int | list[float]]:
        """Its fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "ProcessingContract":
        """The contract that `to_dict` wrote.

        Raises:
            ProcessingError: a key is missing, unknown or of another type; all of them are named.
        """
        types = get_type_hints(cls)
        problems = [f"unknown {name[:80]!r}" for name in sorted(values.keys() - types.keys())]
        taken: dict[str, object] = {}
        for name, kind in types.items():
            value = values.get(name)
            if get_origin(kind) is tuple:
                if isinstance(value, list) and all(type(each) in (int, float) for each in value):
                    taken[name] = tuple(map(float, value))
                    continue
                kind = list
            elif type(value) is kind:
                taken[name] = value
                continue
            problems.append(f"{name} must be of type {kind.__name__}, got {str(value)[:40]!r}")
        if problems:
            raise ProcessingError("a processing contract: " + "; ".join(problems))
        return cls(**taken)  # type: ignore[arg-type]  # each was checked against the field's type above

    def require(self, other: "ProcessingContract") -> None:
        """Checks that another contract equals this one.

        Raises:
            ContractMismatchError: it does not; every difference is listed.
        """
        differences = tuple(
            f"{field.name}: this model has {mine!r}, the contract {theirs!r}"
            for field in fields(self)
            if (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        )
        if differences:
            raise ContractMismatchError(differences)


@lru_cache(256)
def _digest(contract: ProcessingContract) -> str:
    """Kept, for each answer names it."""
    return contract_digest(contract.to_dict())
