"""What config.json says of a folder of this library's own parts: which weight, which codec.

``quantization_config`` of method ``"headrace"``: ``format`` and ``modules_to_not_convert`` as they
were asked for, and ``weights``, a list of groups ``{"codec": parameters, "transposed": bool,
"weights": {name: [shape, digest]}}``.  The shape is what the codec sees; the digest is xxh3-128
over the digests of the parts in the order of their names.  Parts are stored as ``NAME_PART``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import xxhash

from headrace.quant.registry import codec_from_parameters

from .encoding_plan import PlannedWeight
from .errors import InputError

#: The word by which transformers' registry knows this library's encodings.
METHOD: Final = "headrace"


def recorded_weights(
    settings: Mapping[str, Any], where: str
) -> dict[str, tuple[PlannedWeight, str]]:
    """Return the encoded weights that a config.json of this method names, with their digests."""
    found: dict[str, tuple[PlannedWeight, str]] = {}
    groups = settings.get("weights")
    if not isinstance(groups, list) or not groups:
        raise InputError(f"{where}: its quantization_config names no encoded weights")
    for group in groups:
        try:
            codec = codec_from_parameters(group["codec"])
            transposed, members = group["transposed"], dict(group["weights"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: its quantization_config is damaged ({error})") from error
        for name, entry in members.items():
            sane = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list)
            if not sane or not all(type(n) is int and n >= 0 for n in entry[0]):
                raise InputError(f"{where}: its quantization_config says {entry!r:.80} of {name!r}")
            planned = PlannedWeight(codec, tuple(entry[0]), transposed is True)
            found[name] = (planned, str(entry[1]))
    return found


def weight_groups(weights: Mapping[str, tuple[PlannedWeight, str]]) -> list[dict[str, Any]]:
    """Return the ``weights`` entry of config.json for encoded weights and their digests."""
    groups: list[dict[str, Any]] = []
    for name, (planned, digest) in weights.items():
        key = {"codec": planned.codec.parameters(), "transposed": planned.transposed}
        group = next((g for g in groups if {k: g[k] for k in key} == key), None)
        if group is None:
            group = {**key, "weights": {}}
            groups.append(group)
        group["weights"][name] = [list(planned.shape), digest]
    return groups


def parts_digest(checksums: Mapping[str, str]) -> str:
    """Return one xxh3-128 hex digest for a weight from the digest of each of its parts."""
    text = " ".join(checksums[part] for part in sorted(checksums))
    return xxhash.xxh3_128_hexdigest(text.encode())


def settings_record(
    encoding: str | Mapping[str, Any], keep: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a folder of this library's own parts."""
    return {
        "quant_method": METHOD,
        "format": encoding if isinstance(encoding, str) else dict(encoding),
        "modules_to_not_convert": list(keep),
        "weights": [dict(group) for group in groups],
    }
