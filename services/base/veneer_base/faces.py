"""The font faces that pages are set in, and which of them the base never saw in training.

Owns the table. The files in `fonts/` are subsets made by `subset.py`; their licences stand beside them.
"""

import dataclasses
import importlib.resources
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Face:
    """One subset font.

    Attributes:
        name: of the file in `fonts/`, without its ending.
        source: where the full font comes from, relative to the folder of unpacked packages (see `subset.py`).
        number: of the face within a font collection.
        wide: whether it has the Chinese characters.
        latin: whether it has the Latin ones, marks and digits.
        held_out: whether it is kept for evaluation.
    """

    name: str
    source: str
    number: int = 0
    wide: bool = False
    latin: bool = True
    held_out: bool = False

    @property
    def path(self) -> Path:
        """The subset font's file."""
        with importlib.resources.as_file(importlib.resources.files("veneer_base") / "fonts") as folder:
            return folder / f"{self.name}.otf"


_NOTO = "fonts-noto-cjk/usr/share/fonts/opentype/noto/"
_NOTO_EXTRA = "fonts-noto-cjk-extra/usr/share/fonts/opentype/noto/"
_WENKAI = "fonts-lxgw-wenkai/usr/share/fonts/truetype/lxgw-wenkai/"
_SIMPLIFIED_CHINESE = 2  # the number of the SC face in Noto's collections

WIDE_FACES = (
    Face("sans-light", _NOTO_EXTRA + "NotoSansCJK-Light.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("sans", _NOTO + "NotoSansCJK-Regular.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("sans-bold", _NOTO + "NotoSansCJK-Bold.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("serif-light", _NOTO_EXTRA + "NotoSerifCJK-Light.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("serif", _NOTO + "NotoSerifCJK-Regular.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("serif-bold", _NOTO + "NotoSerifCJK-Bold.ttc", _SIMPLIFIED_CHINESE, wide=True),
    Face("kai", _WENKAI + "LXGWWenKai-Regular.ttf", wide=True),
    Face("kai-bold", _WENKAI + "LXGWWenKai-Bold.ttf", wide=True),
    Face("kai-old", "fonts-arphic-ukai/usr/share/fonts/truetype/arphic/ukai.ttc", wide=True),
    Face("display-serif", "@expo-google-fonts/zcool-xiaowei/400Regular/ZCOOLXiaoWei_400Regular.ttf", wide=True),
    Face("hei", "fonts-wqy-microhei/usr/share/fonts/truetype/wqy/wqy-microhei.ttc", wide=True, held_out=True),
    Face(
        "song",
        "fonts-arphic-gbsn00lp/usr/share/fonts/truetype/arphic-gbsn00lp/gbsn00lp.ttf",
        wide=True,
        latin=False,  # it lacks the yen sign
        held_out=True,
    ),
)


def _fontsource(name: str, package: str, weight: int = 400, *, held_out: bool = False) -> Face:
    file = f"@fontsource/{package}/files/{package}-latin-{weight}-normal.woff2"
    return Face(name, file, held_out=held_out)


LATIN_FACES = (
    _fontsource("latin-arimo", "arimo"),
    _fontsource("latin-arimo-bold", "arimo", 700),
    _fontsource("latin-tinos", "tinos"),
    _fontsource("latin-tinos-bold", "tinos", 700),
    _fontsource("latin-roboto", "roboto"),
    _fontsource("latin-roboto-bold", "roboto", 700),
    _fontsource("latin-roboto-mono", "roboto-mono"),
    _fontsource("latin-inter", "inter"),
    _fontsource("latin-lato", "lato"),
    _fontsource("latin-open", "open-sans"),
    _fontsource("latin-fira", "fira-sans"),
    _fontsource("latin-source-serif", "source-serif-4"),
    _fontsource("latin-merriweather", "merriweather"),
    _fontsource("latin-pt-serif", "pt-serif"),
    _fontsource("latin-courier", "courier-prime"),
    _fontsource("latin-plex-mono", "ibm-plex-mono"),
    _fontsource("latin-plex-serif", "ibm-plex-serif", held_out=True),
    _fontsource("latin-cousine", "cousine", held_out=True),
)

FACES = {face.name: face for face in (*WIDE_FACES, *LATIN_FACES)}
TRAINING_WIDE = tuple(face for face in WIDE_FACES if not face.held_out)
TRAINING_LATIN = tuple(face for face in LATIN_FACES if not face.held_out)
HELD_OUT_WIDE = tuple(face for face in WIDE_FACES if face.held_out)
HELD_OUT_LATIN = tuple(face for face in LATIN_FACES if face.held_out)
