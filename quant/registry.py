"""Codecs by name: from a file header's parameters, and from a short format word.

Headers come from files, so everything in them is checked: an unknown codec, an unknown field or
a field of the wrong type is refused by name.  A new codec adds one line to ``codec_classes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .casts import Bfloat16Codec, ScaledFloat16Codec
from .coat import CoatCodec
from .codec import Codec
from .companded import Companded4Codec, Companded8Codec
from .fp4 import Fp4Codec
from .fp8 import Fp8Codec
from .fp8_grid import Fp8GridCodec
from .gptq_packed import GptqPackedCodec
from .int4_group import Int4GroupCodec
from .int8_blockwise import Int8BlockwiseCodec
from .int8_rowwise import Int8RowwiseCodec
from .mxfp4 import Mxfp4Codec
from .mxfp8 import Mxfp8Codec
from .nf4 import Nf4Codec
from .nvfp4 import Nvfp4Codec


def codec_classes() -> dict[str, type[Codec]]:
    """Return every codec class by its name.

    >>> from headrace.quant import codec_classes
    >>> codec_classes()["nf4"].__name__
    'Nf4Codec'
    """
    classes: tuple[type[Codec], ...] = (
        Bfloat16Codec,
        CoatCodec,
        Companded4Codec,
        Companded8Codec,
        Fp4Codec,
        Fp8Codec,
        Fp8GridCodec,
        GptqPackedCodec,
        Int4GroupCodec,
        Int8BlockwiseCodec,
        Int8RowwiseCodec,
        Mxfp4Codec,
        Mxfp8Codec,
        Nf4Codec,
        Nvfp4Codec,
        ScaledFloat16Codec,
    )
    return {cls.name: cls for cls in classes}


def codec_from_parameters(parameters: Mapping[str, Any]) -> Codec:
    """Rebuild a codec from what ``Codec.parameters`` returned.

    >>> codec_from_parameters({"codec": "nf4", "block_size": 128}).block_size
    128
    """
    classes = codec_classes()
    name = parameters.get("codec")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"codec {name!r} is not known; known are {sorted(classes)}")
    cls = classes[name]
    own = {key: value for key, value in parameters.items() if key != "codec"}
    types = {field.name: type(field.default) for field in fields(cls)}
    for key, value in own.items():
        if key not in types:
            raise ValueError(
                f"codec {name!r} has no parameter {key!r}; it has {sorted(types) or 'none'}"
            )
        if type(value) is not types[key]:
            raise ValueError(
                f"parameter {key!r} of codec {name!r} is {value!r}; it must be of type "
                f"{types[key].__name__}"
            )
    return cls(**own)


def codec_for_format(word: str) -> Codec:
    """Return the default weight codec of a format word such as ``"nf4"`` or ``"int8"``.

    >>> codec_for_format("int8").name
    'int8_rowwise'
    """
    formats: dict[str, Codec] = {
        "fp4": Fp4Codec(),
        "fp8": Fp8Codec(),
        "int4": Int4GroupCodec(),
        "int8": Int8RowwiseCodec(),
        "mxfp4": Mxfp4Codec(),
        "mxfp8": Mxfp8Codec(),
        "nf4": Nf4Codec(),
        "nvfp4": Nvfp4Codec(),
    }
    if word not in formats:
        raise ValueError(f"format {word!r} is not known; choose one of {sorted(formats)}")
    return formats[word]
