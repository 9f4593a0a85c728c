r"""The subset fonts of this package, made anew from the full ones: `python -m veneer_base.subset SOURCES`.

Needs fonttools and brotli. SOURCES is a folder with one subfolder per package, named as the package is:

    for p in fonts-noto-cjk fonts-noto-cjk-extra fonts-lxgw-wenkai fonts-arphic-ukai fonts-arphic-gbsn00lp \
             fonts-wqy-microhei; do apt-get download $p && dpkg -x ${p}_*.deb SOURCES/$p; done
    npm install --prefix /tmp/fonts @expo-google-fonts/zcool-xiaowei @fontsource/roboto ...   # node_modules is as good

The subsets carry names of their own, as the licences with reserved font names ask; only the alphabet's glyphs stay.
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

from veneer_base.alphabet import CHARACTERS, is_wide
from veneer_base.faces import FACES, Face


def write_subset(face: Face, sources: Path) -> None:
    """Writes the face's subset to its place in `fonts/`."""
    options = subset.Options(
        layout_features=[], hinting=False, notdef_outline=True, name_IDs=[0, 13, 14], glyph_names=False
    )
    options.drop_tables += [
        "GSUB",
        "GPOS",
        "GDEF",
        "BASE",
        "VORG",
        "vhea",
        "vmtx",
        "DSIG",
        "FFTM",
        "STAT",
        "MERG",
        "meta",
    ]
    font = TTFont(sources / face.source, fontNumber=face.number, lazy=True)
    wanted = {ord(c) for c in CHARACTERS if (face.wide if is_wide(c) else face.latin)} | {ord(" ")}
    missing = wanted - set(font.getBestCmap())
    if missing:
        raise ValueError(f"{face.source} lacks {''.join(map(chr, sorted(missing)))}")
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=wanted)
    subsetter.subset(font)
    family = f"Veneer {face.name.title().replace('-', ' ')}"
    for name_id, text in ((1, family), (2, "Regular"), (3, family), (4, family), (6, family.replace(" ", ""))):
        font["name"].setName(text, name_id, 3, 1, 0x409)
    font.flavor = None
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [family.replace(" ", "")]
        for key in ("FullName", "FamilyName"):
            if key in cff.topDictIndex[0].rawDict:
                cff.topDictIndex[0].rawDict[key] = family
    font.save(face.path, reorderTables=True)


def main() -> None:
    """Writes every face."""
    for face in FACES.values():
        write_subset(face, Path(sys.argv[1]))
        print(face.name, face.path.stat().st_size)


if __name__ == "__main__":
    main()
