"""The mark in each picture's file that says how it came about: XMP with IPTC's digital source type."""

from __future__ import annotations

import re

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""Created by a model that was trained on sampled content (IPTC's list of digital source types)."""

KEYWORD = "XML:com.adobe.xmp"
"""The keyword of the iTXt chunk in a PNG (XMP specification, part 3, section 1.1.5)."""

PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
"""Always the same bytes, so that equal pictures stay equal files."""

_STATED = re.compile(
    r"<Iptc4xmpExt:DigitalSourceType>([^<]*)<|\bIptc4xmpExt:DigitalSourceType\s*=\s*[\"']([^\"']*)[\"']"
)
"""A property is an element or an attribute."""


def source_type(packet: bytes) -> str | None:
    """The digital source type that an XMP packet states, or None.

    The packet may be anybody's: it is searched as text, and no XML parser unfolds it.
    """
    stated = _STATED.search(packet.decode("utf-8", "replace"))
    return None if stated is None else (stated[1] or stated[2] or "").strip() or None
