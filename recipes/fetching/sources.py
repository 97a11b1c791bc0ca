"""Which files of a package are used, and what is known of each: split, caption, licence, language, speaker.

A pick function walks the unpacked packages and yields one `Item` a file; `fetch_data.py` measures and stores them.
Splits are by source file, from a hash of the file's name, so they never change when a set is added or left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .clients import Archive
from .formats import copyright_rules, licence_of, lua_dialogue, prompt_list

VAL_SHARE = 0.05
TOON_SHARE = 0.10


@dataclass
class Item:
    """One file to use. `relative` is its stable name inside the set.

    `group` (sound effects) names an instrument, or one creature of a game: its files belong on one side of a split.
    """

    file: Path
    relative: str
    kind: str
    split: str
    text: str | None = None
    licence: str | None = None
    language: str | None = None
    speaker: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set: `keep` is a regular expression for the members worth unpacking, `licence` holds where no file says.

    `modality` is images, speech, music or sounds. Raise `revision` when the choice of files changes: finished sets are
    redone.
    `coloured` asks every picture for colour, which leaves line art out.
    `synthesis` marks a set that is spoken by a text-to-speech program, which runs after everything else.
    """

    name: str
    modality: str
    what: str
    licence: str
    archives: tuple[Archive, ...]
    keep: str
    pick: Callable[[Source, Path], Iterator[Item]]
    revision: int = 1
    coloured: bool = False
    optional: bool = False
    synthesis: bool = False


def share(key: str) -> float:
    """A number in [0, 1) from the sha1 of a name: the same on every machine and in every run."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:12], 16) / 16**12


def split_of(key: str) -> str:
    return "val" if share(key) < VAL_SHARE else "train"


def words(stem: str) -> str:
    """A file name as words: `arcDeTriomphe2` -> `arc de triomphe`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    return " ".join(re.sub(r"[_+\-\d]+", " ", spaced).split()).lower()


def files(work: Path, archive: str, pattern: str) -> Iterator[tuple[Path, str]]:
    """(file, path below the archive's folder) of every file whose path matches, sorted."""
    root = work / archive
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_file() and re.search(pattern, relative):
            yield path, relative


def rules_of(work: Path, archive: str) -> list[tuple[str, str]]:
    found = [path for path, _ in files(work, archive, r"/doc/[^/]+/copyright$")]
    return copyright_rules(found[0].read_text("utf-8", "replace")) if found else []


def pictures(
    source: Source,
    work: Path,
    pattern: str,
    kind: str,
    below: str = "",
    split: str = "",
    prefix: str = "",
    caption: bool = True,
) -> Iterator[Item]:
    """Pictures of the first archive; `below` is cut from the names, `prefix` is added to look a licence up."""
    archive = source.archives[0].folder
    rules = rules_of(work, archive)
    for path, relative in files(work, archive, pattern):
        short = relative.removeprefix(below)
        yield Item(
            path,
            short,
            kind,
            split or split_of(f"{source.name}/{short}"),
            (words(path.stem) or None) if caption else None,
            licence_of(rules, prefix + short, source.licence),
        )


# ---- images ----

GCOMPRIS = "gcompris/src/activities/"
GCOMPRIS_PHOTOS = (
    r"explore_(world_animals|farm_animals|monuments)/resource/.*|categorization/resource/images/(monuments|fishes|renewable|tools|others)/.*"
    r"|erase/resource/.*|clickgame/resource/sea.*|explore_world_music/resource/music/.*|details/resource/image/.*_background.*"
)
PAINTED = r"gogh|paul_gauguin|tanguy|eglise_dauvers|cassat"


def pick_gcompris(source: Source, work: Path) -> Iterator[Item]:
    for item in pictures(source, work, rf"^{GCOMPRIS}({GCOMPRIS_PHOTOS})\.webp$", "photo", "gcompris/"):
        if re.search(PAINTED, item.relative, re.I):
            item.kind = "art"
        if re.search(r"explore_world_music", item.relative):
            item.text = None  # these are named after countries
        elif item.text:
            item.text = re.sub(r" background$", "", item.text)
        yield item
    yield from pictures(source, work, rf"^{GCOMPRIS}lang/resource/words_sample/[^/]+\.webp$", "art", "gcompris/")


SCRATCH_DRAWN = (
    r"party-room|room\d|spotlight-stage|woods-and-bench|school2|brick-wall2|basketball-court1|chalkboard|xy-grid"
)


def pick_scratch(source: Source, work: Path) -> Iterator[Item]:
    for item in pictures(source, work, r"Media/Backgrounds/.*\.(jpg|png|gif)$", "photo", "usr/share/scratch/"):
        if not re.search(SCRATCH_DRAWN, item.relative):
            yield item


def pick_lomiri(source: Source, work: Path) -> Iterator[Item]:
    year = source.name[-5:] + "/"  # the licence list names the folder of the release
    for item in pictures(source, work, r"\.(jpg|png)$", "photo", "usr/share/backgrounds/", prefix=year, caption=False):
        if not re.search(r"umang|Fossa|Painting-Colors|warty", item.relative):  # gradients and a logo
            yield item


def pick_mate(source: Source, work: Path) -> Iterator[Item]:
    yield from pictures(source, work, r"mate/nature/.*\.jpg$", "photo", "usr/share/backgrounds/mate/")


PLASMA = {
    "photo": ("BytheWater", "ColorfulCups", "EveningGlow", "FallenLeaf", "Kite", "OneStandsOut", "Path", "summer_1am"),
    "art": ("Altai", "Autumn", "Canopee", "Patak", "SafeLanding", "Volna"),
}


def pick_plasma(source: Source, work: Path) -> Iterator[Item]:
    """One picture a wallpaper: the widest landscape one up to 2,560 pixels (more only slows a random crop down)."""
    base = "usr/share/wallpapers/"
    for kind, names in PLASMA.items():
        for name in names:
            sizes = []
            for path, relative in files(
                work, source.archives[0].folder, rf"^{base}{name}/contents/images/\d+x\d+\.(jpg|png)$"
            ):
                width, height = (int(number) for number in path.stem.split("x"))
                if width > height:
                    sizes.append((width <= 2560, width if width <= 2560 else -width, height, path, relative))
            if sizes:
                path, relative = max(sizes)[3:]
                meta = work / source.archives[0].folder / base / name / "metadata.json"
                plugin = json.loads(meta.read_text("utf-8")).get("KPlugin", {}) if meta.exists() else {}
                short = relative.removeprefix(base)
                split = split_of(f"{source.name}/{name}")
                yield Item(path, short, kind, split, None, plugin.get("License") or source.licence)


def pick_mvtb(source: Source, work: Path) -> Iterator[Item]:
    yield from pictures(
        source, work, r"^mvtbdata/images/.*\.(jpg|png)$", "photo", "mvtbdata/", "test_photo", caption=False
    )


SKIMAGE = "astronaut|chelsea|coffee|rocket|motorcycle_left|hubble_deep_field|retina|ihc"


def pick_skimage(source: Source, work: Path) -> Iterator[Item]:
    yield from pictures(source, work, rf"^skimage/data/({SKIMAGE})\.(png|jpg)$", "photo", "skimage/data/", "test_photo")


def pick_sklearn(source: Source, work: Path) -> Iterator[Item]:
    yield from pictures(
        source, work, r"^sklearn/datasets/images/\w+\.jpg$", "photo", "sklearn/datasets/images/", "test_photo"
    )


def emoji_key(code: str) -> str:
    """A codepoint list without variation selectors and leading zeros: packages write them differently."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def pick_fluent(source: Source, work: Path) -> Iterator[Item]:
    """Emoji that openmoji has a name for; flags and skin-tone variants are left out (near copies of one another)."""
    table = json.loads((work / "openmoji/package/data/openmoji.json").read_text("utf-8"))
    names = {emoji_key(entry["hexcode"]): entry for entry in table}
    for item in pictures(source, work, r"/assets/.*\.webp$", "emoji", "package/assets/"):
        entry = names.get(emoji_key(item.file.stem))
        if entry and not entry["skintone"] and entry["group"] != "flags":
            item.text = entry["annotation"]
            yield item


def pick_noto(source: Source, work: Path) -> Iterator[Item]:
    """The same concepts in another drawing style, 64 pixels: a test of style shift, never trained on."""
    for entry in json.loads((work / "emoji-datasource-google/package/emoji.json").read_text("utf-8")):
        path = work / "emoji-datasource-google/package/img/google/64" / entry["image"]
        if path.is_file() and entry["category"] != "Flags":
            yield Item(path, entry["image"], "emoji", "test_style", (entry["name"] or entry["short_name"]).lower())


TUX = "usr/share/tuxpaint/stamps/"


def stamp_texts(path: Path) -> dict[str, str]:
    """language -> caption; the first line of the file is English."""
    first, *rest = path.read_text("utf-8", "replace").splitlines() or [""]
    texts = {"en": first.strip()}
    for line in rest:
        language, found, text = line.partition(".utf8=")
        if found and text.strip():
            texts[language.strip()] = text.strip()
    return texts


def pick_tux_images(source: Source, work: Path) -> Iterator[Item]:
    for path, relative in files(work, "tuxpaint-stamps-default", rf"^{TUX}.*\.png$"):
        short = relative.removeprefix(TUX)
        # Mirrored and numbered versions of a stamp share its hash, so that they share its split.
        value = share("tuxpaint/" + re.sub(r"(_mirror|_flip|_?\d+)+$", "", short[:-4]))
        split = "test_toon" if value < TOON_SHARE else "val" if value < TOON_SHARE + VAL_SHARE else "train"
        note = path.with_suffix(".txt")
        yield Item(path, short, "stamp", split, (stamp_texts(note)["en"] or None) if note.exists() else None)


def pick_tux_speech(source: Source, work: Path) -> Iterator[Item]:
    for path, relative in files(work, "tuxpaint-stamps-default", rf"^{TUX}.*_desc(_\w+)?\.(ogg|wav)$"):
        stem, _, language = path.stem.rpartition("_desc")
        language = language.lstrip("_") or "en"
        note = path.with_name(stem + ".txt")
        short = relative.removeprefix(TUX)
        text = stamp_texts(note).get(language) if note.exists() else None
        yield Item(path, short, "speech", split_of(f"tuxpaint/{short}"), text, None, language, f"tuxpaint-{language}")


def pick_wesnoth(source: Source, work: Path) -> Iterator[Item]:
    base = "usr/share/games/wesnoth/1.16/data/core/images/"
    yield from pictures(source, work, rf"^{base}(portraits|story)/.*\.(png|jpg|webp)$", "art", base)


def pick_qabcs(source: Source, work: Path) -> Iterator[Item]:
    base = "usr/share/qabcs/"
    yield from pictures(source, work, rf"^{base}abcs/all/pics/(animals|food|instrument|misc)/.*\.png$", "art", base)


def pick_openclipart(source: Source, work: Path) -> Iterator[Item]:
    """Clip art of things. File names carry cut-off author names, so the caption is made of the folder names."""
    base = "usr/share/openclipart/png/"
    for item in pictures(source, work, rf"^{base}.*\.png$", "art", base):
        if not re.search(r"recreation/games/|roadsigns/|duplicates/", item.relative):
            item.text = ", ".join(words(part) for part in reversed(item.relative.split("/")[:-1]))
            yield item


def pick_textures(source: Source, work: Path) -> Iterator[Item]:
    """Walls, floors and ground seen from the front; normal, gloss and glow maps (`_nm` ...) are no pictures."""
    base = "base/textures/"  # how the licence list names the archives' `textures/`
    for item in pictures(source, work, r"^textures/.*\.(jpg|png)$", "texture", "textures/", prefix=base, caption=False):
        if not re.search(r"_(nm|sm|gm|rm|nh)\.\w+$|sky|fonts?/|menu", item.relative):
            yield item


# ---- speech ----


def pick_asterisk(source: Source, work: Path) -> Iterator[Item]:
    language = source.name.rsplit("-", 1)[1]
    listing = next(iter(files(work, f"asterisk-core-sounds-{language}", r"core-sounds-\w+\.txt$")))[0]
    prompts = prompt_list(listing.read_text("utf-8", "replace"))
    base = "usr/share/asterisk/sounds/"
    for path, relative in files(work, source.archives[0].folder, rf"^{base}.*\.g722$"):
        voice, _, name = relative.removeprefix(base).partition("/")
        split = "test" if language == "en" else split_of(f"{source.name}/{name}")
        text = prompts.get(name.removesuffix(".g722"))
        yield Item(path, name, "speech", split, text, None, language, f"asterisk-{voice.rsplit('_', 1)[-1]}")


FILLETS = "usr/share/games/fillets-ng/"


def fillets_lines(work: Path, language: str) -> dict[tuple[str, str], tuple[str, str, str | None]]:
    """(level, line) -> (font, English, translation); the font stands for the character who speaks."""
    lines = {}
    for path, _ in files(work, "fillets-ng-data", rf"/script/.*/dialogs_{language}\.lua$"):
        for name, line in lua_dialogue(path.read_text("utf-8", "replace")).items():
            lines[path.parent.name, name] = line
    return lines


def pick_fillets(source: Source, work: Path) -> Iterator[Item]:
    language = source.name.rsplit("-", 1)[1]
    lines = fillets_lines(work, language)
    for path, relative in files(work, source.archives[0].folder, rf"^{FILLETS}sound/.*\.ogg$"):
        short = relative.removeprefix(FILLETS + "sound/")
        font, _, text = lines.get((path.parent.parent.name, path.stem), ("", "", None))
        speaker = f"fillets-{language}" + (f"-{font.removeprefix('font_')}" if font else "")
        yield Item(path, short, "speech", split_of(f"{source.name}/{short}"), text, None, language, speaker)


def pick_librivox(source: Source, work: Path) -> Iterator[Item]:
    base = "usr/share/pocketsphinx/test/data/librivox/"
    root = work / "pocketsphinx-testdata" / base
    texts = {}
    for line in (root / "transcription").read_text("utf-8").splitlines():
        if match := re.fullmatch(r"<s> (.*) </s> \((\S+)\)", line.strip()):
            texts[match[2]] = match[1]
    for path in sorted(root.glob("*.wav")):
        yield Item(path, path.name, "speech", "test", texts.get(path.stem), None, "en", "librivox")


def pick_klettres(source: Source, work: Path) -> Iterator[Item]:
    base = "usr/share/klettres/"
    for path, relative in files(work, "klettres-data", rf"^{base}.*\.ogg$"):
        short = relative.removeprefix(base)
        language = short.split("/")[0]
        yield Item(path, short, "speech", split_of(f"klettres/{short}"), None, None, language, f"klettres-{language}")


def pick_english_lines(source: Source, work: Path) -> Iterator[Item]:
    """The English lines of Fillets, each once; `file` is where the sound will be once it is spoken."""
    seen = set()
    for (level, name), (_, english, _) in sorted(fillets_lines(work, "en").items()):
        text = " ".join(english.split())
        if len(text) >= 8 and re.search(r"[a-z]{2}", text) and text not in seen:
            seen.add(text)
            short = f"{level}/{name}.wav"
            split = split_of(f"{source.name}/{short}")
            yield Item(Path(short), short, "speech", split, text, None, "en", "piper-joe")


def pick_music(source: Source, work: Path) -> Iterator[Item]:
    """Whole tracks. A package whose name says hold music is test only; elsewhere 15 % of the tracks are test."""
    for path, _ in files(work, source.archives[0].folder, r"\.(ogg|g722)$"):
        value = share(f"{source.name}/{path.name}")
        split = "test" if "moh" in source.name or value < 0.15 else "val" if value < 0.2 else "train"
        yield Item(path, path.name, "music", split, words(path.stem) or None)


# ---- sound effects ----

# What a file is by its name: the first that fits. A ride's bell is a cymbal, a rim shot is a snare.
SOUND_KINDS = (
    ("", r"^loop |^empty"),
    ("hat", r"hat(?!ch)|(^| )[co]?hh(?!a)|^ho |cymbal (closed|open|pedal)"),
    ("cymbal", r"crash|ride|splash|china|paiste|gong|cymbal (hard|soft)|elec cymbal|^(cc|rc|cra) "),
    ("kick", r"kick|bass ?drum|drum bass|(^| )bd|hse k "),
    ("snare", r"snare|(^| )sn |^(sd|sr) "),
    ("tom", r"(?<!s)tom|^(ft|t1|t2) "),
    ("bell", r"bell|agogo|chime|triangle|^mc cb|waterglass|glass rub"),
    ("hand drum", r"bongo|conga|djembe|tabla|dununba|kenkeni|sangban|cajon"),
    ("stick", r"clap|(?<!dragon)(?<!thunder)stick|clave|wood ?block|snap|(^| )rim|castanet"),
    ("magic", r"^magic|faeriefire"),
    (
        "weapon",
        r"^(axe|bow|club|crossbow|dagger|dart|fist|flail|hatchet|knife|mace|sling|spear|staff|sword|throw|torch)",
    ),
    ("cry", r"^(?!skeleton|wose|squishy|horn|lich|bass).* (die|hit|growl|shriek|laugh) |^(groan|ugg|wail|hiss)"),
)
LAYER = r"\b(hardest|hard|med|softest|soft|miss|big|small|puny|die|hit|growl|shriek|fire|old|female|\d+\w?)\b"


def sound_kind(stem: str) -> str:
    """Class of a sound by its file's name, "" where the name says nothing."""
    name = re.sub(r"[_\-.]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)).lower() + " "
    joined = name.replace(" ", "") + " "
    return next((k for k, found in SOUND_KINDS if re.search(found, name) or re.search(found, joined)), "")


def sound_group(source: str, folder: str, stem: str, kind: str) -> str:
    """What keeps the takes of one instrument together: kit and class in a kit, else the name without its numbers."""
    name = re.sub(r"[_\-.\d]+", " ", stem).lower()
    name = " ".join(re.sub(LAYER, " ", name).split()) or stem
    return f"{source}/{folder}/{kind or name}" if folder else f"{source}/{name}"


def pick_sounds(source: Source, work: Path) -> Iterator[Item]:
    """One-shots and effects with a class by their name. sonic-pi-samples is test as a whole, for reconstruction;
    whoever classifies splits within the classes, by group."""
    archive = source.archives[0].folder
    rules = rules_of(work, archive)
    for path, relative in files(work, archive, r"\.(ogg|wav|flac|mp3)$"):
        short = re.sub(r"^.*?/(samples|drumkits|stamps|Sounds|sounds)/", "", relative)
        folder = short.rpartition("/")[0]
        kit = folder if "drumkits/" in relative else ""
        animal = re.search(r"^animals/|^Animal/", short)
        kind = "animal" if animal else sound_kind(path.stem)
        listed = re.sub(r"^usr/share/(scratch/|sonic-pi/(?=samples))", "", relative).replace("samples/", "etc/samples/")
        if kit:  # the licence list names the archive that became the folder
            listed = f"drumkits/{kit.removesuffix(' v4')}.h2drumkit"
        licence = licence_of(rules, listed, source.licence)
        group = sound_group(source.name, kit, path.stem, kind)
        split = "test" if "sonic-pi" in source.name else split_of(group)
        yield Item(path, short, kind, split, words(path.stem) or None, licence, group=group)
